"""Tracing of an nn.Module to an OpenVINO model, its ports and its state. The only file that uses OpenVINO's internals.

The modules are in `graphs.py`, their example inputs in `convert.py`.
"""

import contextlib
import warnings

import openvino as ov
import torch
import transformers
from openvino import opset13 as ops
from openvino.frontend.pytorch import patch_model
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from openvino.passes import MakeStateful, Manager
from torch import nn

from ov_mllama.runtime.shapes import MllamaShapes

TESTED_OPENVINO = "2026.4.1"  # the version whose internals this file was written for


def trace(module: nn.Module, example: dict) -> ov.Model:
    """Return `module` as an OpenVINO model, its ports still unnamed.

    Args:
        example: keyword arguments of `module.forward`; their values do not matter, their shapes only where the module
            asks for them in Python.
    """
    with torch.no_grad(), quiet(), traceable_16bit(module):
        # check_trace would run it twice more, to compare outputs that traceable_16bit makes meaningless; the graph is
        # compared with transformers on shapes other than the example's instead (tests/runtime/test_parity.py)
        decoder = TorchScriptPythonDecoder(module, example_input=example, trace_kwargs={"check_trace": False})
        return ov.convert_model(decoder, example_input=example)


@contextlib.contextmanager
def traceable_16bit(module: nn.Module):
    """Put the 16-bit weights of `module`'s linear and embedding layers into the graph unchanged, within the context.

    This is OpenVINO's own way (openvino/frontend/pytorch/patch_model.py; Optimum Intel uses the same): the IR's
    constants share the memory-mapped safetensors, nothing is converted or copied, and tracing skips those layers'
    arithmetic. Side effects: within the context `torch.bmm` is replaced for the process, so trace in one thread at a
    time; and all other 16-bit parameters (norms, gates, position embeddings) become f32 in place for good, exactly: the
    module computes the same afterwards, but is no longer the checkpoint bit for bit.

    Raises:
        ImportError: if this OpenVINO lacks it.
    """
    attribute = "_openvino_module_extension_patch_orig_forward"
    make_traceable = getattr(patch_model, "__make_16bit_traceable", None)
    if make_traceable is None:
        raise ImportError(
            f"OpenVINO {ov.get_version()} has no __make_16bit_traceable to convert 16-bit weights without a copy: "
            f"install openvino=={TESTED_OPENVINO}."
        )
    make_traceable(module, attribute)
    try:
        yield
    finally:
        patch_model.unpatch_model(module, attribute)


@contextlib.contextmanager
def quiet():
    """Silence warnings of torch and transformers about tracing: deprecations, and branches that no input takes."""
    verbosity = transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=torch.jit.TracerWarning)
        warnings.simplefilter("ignore", category=FutureWarning)
        transformers.logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(verbosity)


def name_ports(model: ov.Model, inputs: dict[str, list], outputs: list[str]) -> None:
    """Name the model's ports in order; `inputs` maps names to partial shapes (-1 is dynamic).

    Raises:
        RuntimeError: if the graph has other ports than expected, as when the tracer dropped an unused input.
    """
    if (len(model.inputs), len(model.outputs)) != (len(inputs), len(outputs)):
        raise RuntimeError(
            f"The traced graph has {len(model.inputs)} inputs and {len(model.outputs)} outputs where {len(inputs)} and "
            f"{len(outputs)} were expected; use the exact versions of requirements.txt."
        )
    for port, (name, shape) in zip(model.inputs, inputs.items(), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()


def make_stateful(model: ov.Model, shapes: MllamaShapes) -> None:
    """Move the text KV cache into the model's state, and add input `beam_idx` (i32 [batch]), which reorders its rows.

    Only the caches named in `shapes.past_names` become state: the image's `cross_attn_key_values` stay inputs, although
    their names contain "key_values" too.
    """
    ports = {port.get_any_name(): port for port in model.inputs}
    beam_idx = ops.parameter([-1], ov.Type.i32, name="beam_idx")
    beam_idx.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beam_idx])
    for name in shapes.past_names:
        consumers = ports[name].get_target_inputs()
        reordered = ops.gather(ports[name], beam_idx, ops.constant(0, dtype=ov.Type.i64))
        for consumer in consumers:
            consumer.replace_source_output(reordered.output(0))
    model.validate_nodes_and_infer_types()
    manager = Manager()
    manager.register_pass(MakeStateful(dict(zip(shapes.past_names, shapes.present_names, strict=True))))
    manager.run_passes(model)

    # A cache starts with no positions but with as many rows as input_ids has: [batch, kv heads, 0, head_dim]
    batch = ops.gather(ops.shape_of(ports["input_ids"]), ops.constant([0]), ops.constant(0))
    rest = ops.constant([shapes.num_kv_heads, 0, shapes.head_dim], dtype=ov.Type.i64)
    empty = ops.broadcast(ops.constant(0.0, dtype=ov.Type.f32), ops.concat([batch, rest], 0))
    for op in model.get_ops():
        if op.get_type_name() == "ReadValue":
            op.set_arguments([empty.output(0)])
    model.validate_nodes_and_infer_types()
