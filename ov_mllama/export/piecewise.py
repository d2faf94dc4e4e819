"""Static quantisation of the vision encoder a few layers at a time, so that NNCF's work on those alone is in memory.

    model -> pieces; for each: run it for the next one's calibration data, quantise it, connect it -> model

NNCF collects the statistics of the unquantised model, layer by layer: a piece calibrated with the outputs of
unquantised pieces gets the data it would get inside the model. A piece is quantised by `compress.py`; this file depends
on the node names of a traced `VisionEncoder`.
"""

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.properties.hint import inference_precision

from ov_mllama.export.costs import PIECE_LAYERS
from ov_mllama.runtime.errors import DiskError, InputError

FIRST_NORM = re.compile(r"__module\.vision_model\.transformer\.layers\.0\.input_layernorm/.*/MVN")
LAST_LINEAR = re.compile(r"__module\.vision_model\.((?:global_)?transformer)\.layers\.(\d+)\.mlp\.fc2/.*/Add")

Sample = dict[str, np.ndarray]  # a model's inputs by port name
Quantize = Callable[[ov.Model, list[Sample]], ov.Model]


def quantize_in_pieces(
    model: ov.Model, samples: Iterable[Sample], quantize: Quantize, folder: Path, layers: int = PIECE_LAYERS
) -> ov.Model:
    """Return the model with each of its pieces quantised separately.

    Args:
        model: the vision encoder; not changed.
        samples: to calibrate with; read once.
        quantize: takes a piece and its calibration data, and returns the piece quantised.
        folder: for the pieces' outputs, in temporary files: for the 11B, 60 MB per tile.
        layers: of a piece, at most.
    Returns:
        a model with the same ports.
    Raises:
        InputError: as `layer_outputs`.
        DiskError: as `on_disk`.
    """
    pieces = split(model, layers)
    data = [{name: on_disk(array, folder) for name, array in sample.items()} for sample in samples]
    parameters = model.clone().get_parameters()
    known = {parameter.output(0).any_name: parameter.output(0) for parameter in parameters}
    while pieces:
        piece = pieces.pop(0)
        names = [port.any_name for port in piece.inputs]
        inputs = [{name: sample[name] for name in names} for sample in data]
        if pieces:
            run(piece, inputs, data, folder)
        connect(quantize(piece, inputs), known)
        needed = {port.any_name for later in pieces for port in later.inputs}
        data = [{name: array for name, array in sample.items() if name in needed} for sample in data]
    return ov.Model([known[port.any_name] for port in model.outputs], parameters)


# ---- Splitting ------------------------------------------------------------------------------------------------------


def split(model: ov.Model, layers: int) -> list[ov.Model]:
    """Return the model's pieces in order; inputs of each are those it needs of the model's inputs and earlier outputs.

    The last one has the model's outputs; the others end with an encoder layer, and its output, f32 [1, rows, channels],
    is theirs. Weights are shared with the model.

    Raises:
        InputError: as `layer_outputs`.
    """
    ends = piece_ends(model, layers)
    return [cut(model, ends[:index], end) for index, end in enumerate([*ends, None])]


def piece_ends(model: ov.Model, layers: int) -> list[str]:
    """Return the nodes to cut after: every so many layers, at states that the projector reads, at each encoder's end.

    Raises:
        InputError: as `layer_outputs`.
    """
    ends = [node.get_friendly_name() for node in embeddings(model) if is_read_by_projector(node)]
    for outputs in layer_outputs(model).values():
        length = 0
        for node in outputs:
            length += 1
            if is_read_by_projector(node) or length == layers or node is outputs[-1]:
                ends.append(node.get_friendly_name())
                length = 0
    return ends


def layer_outputs(model: ov.Model) -> dict[str, list[ov.Node]]:
    """Return the nodes that compute the layers' outputs, in order, by encoder: "transformer", "global_transformer".

    Raises:
        InputError: if the graph's nodes are not named as in a traced vision encoder.
    """
    found = {"transformer": {}, "global_transformer": {}}
    for node in model.get_ops():
        if match := LAST_LINEAR.fullmatch(node.get_friendly_name()):
            encoder, index = match.groups()
            found[encoder][int(index)] = residual_sum(node)
    for encoder, layers in found.items():
        if not layers or sorted(layers) != list(range(len(layers))):
            raise InputError(
                f"The vision encoder cannot be split to be quantised: its graph has the {encoder} layers "
                f"{sorted(layers) or 'none'}. Convert it again with the exact versions of requirements.txt."
            )
    return {encoder: [layers[index] for index in range(len(layers))] for encoder, layers in found.items()}


def embeddings(model: ov.Model) -> list[ov.Node]:
    """Return the node that computes the first layer's input; none in a graph whose nodes are named otherwise."""
    return [
        node.input_value(0).get_node() for node in model.get_ops() if FIRST_NORM.fullmatch(node.get_friendly_name())
    ]


def is_read_by_projector(node: ov.Node) -> bool:
    """Return whether the projector reads a layer's input or output, as the next layer's norm and residual sum do."""
    return len(node.output(0).get_target_inputs()) > 2


def residual_sum(node: ov.Node) -> ov.Node:
    """Return the last node of an encoder layer: after its last linear layer comes a gate, if any, then the sum."""
    while True:
        node = next(iter(node.output(0).get_target_inputs())).get_node()
        if node.get_type_name() != "Multiply":
            return node


def cut(model: ov.Model, before: list[str], end: str | None) -> ov.Model:
    """Return the piece of a model after the nodes `before`, up to the node `end`; None: up to the model's outputs.

    Ports that are not the model's are named like their nodes.
    """
    copy = model.clone()  # the graph; weights are shared
    nodes = {node.get_friendly_name(): node for node in copy.get_ops()}
    parameters, results = copy.get_parameters(), copy.get_results()
    if end:
        nodes[end].output(0).get_tensor().set_names({end})
        results = [ops.result(nodes[end].output(0))]
    for name in before:
        output = nodes[name].output(0)
        parameter = ops.parameter(output.get_partial_shape(), output.get_element_type(), name=name)
        output.replace(parameter.output(0))
        parameter.output(0).get_tensor().set_names({name})
        parameters.append(parameter)
    piece = ov.Model(results, parameters).clone()  # drops the rest of the graph, so that unused parameters show
    for parameter in piece.get_parameters():
        if not parameter.output(0).get_target_inputs():
            piece.remove_parameter(parameter)
    return piece


# ---- Running and connecting pieces ----------------------------------------------------------------------------------


def run(piece: ov.Model, inputs: list[Sample], data: list[Sample], folder: Path) -> None:
    """Add the piece's outputs for `inputs` to each sample of `data`, in f32 as NNCF's statistics."""
    compiled = ov.Core().compile_model(piece, "CPU", {inference_precision: ov.Type.f32})
    for sample, outputs in zip(data, map(compiled, inputs), strict=True):
        sample.update({port.any_name: on_disk(array, folder) for port, array in outputs.items()})


def on_disk(array: np.ndarray, folder: Path) -> np.ndarray:
    """Return a copy mapped from an unnamed temporary file, which is freed with it.

    Raises:
        DiskError: if the folder's disk is full.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(array.tobytes())  # not through the mapping, where a full disk would end the process
            file.flush()
            return np.memmap(file, array.dtype, "r+", shape=array.shape)
    except OSError as error:
        raise DiskError(
            error.errno,
            f"{folder} cannot hold the calibration data ({error.strerror}): free disk space, or use fewer images",
        ) from error


def connect(piece: ov.Model, known: dict[str, ov.Output]) -> None:
    """Connect the piece's inputs to the `known` outputs of the same names, and add its own outputs to those."""
    for port in piece.inputs:
        for reader in port.get_target_inputs():
            reader.replace_source_output(known[port.any_name])
    for port in piece.outputs:
        known[port.any_name] = port.get_node().input_value(0)
