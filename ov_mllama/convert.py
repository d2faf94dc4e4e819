"""Checkpoint -> OpenVINO IR: the two graphs of `ov_mllama_graphs.py` traced, their state hidden, and written down.

This file knows how OpenVINO wants a model written down. It does not know how the IRs are run (`ov_mllama_helper.py`) or
made smaller (`ov_mllama_compression.py`).
"""

import contextlib
import shutil
import warnings
from pathlib import Path

import openvino as ov
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from openvino.frontend.pytorch import patch_model
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import nn
from transformers import AutoConfig, AutoProcessor, GenerationConfig, MllamaConfig, MllamaForConditionalGeneration

from ov_mllama.files import (
    CONVERTER_VERSION,
    LANGUAGE_MODEL_NAME,
    VISION_ENCODER_NAME,
    check_room,
    fingerprint,
    is_current,
    save_ir,
    whole,
    writing,
)
from ov_mllama.graphs import LanguageModel, MllamaShapes, VisionEncoder

# Bytes at the peak for a checkpoint of any size, whose weights stay on disk; the 11B's vision encoder took 0.7 GB
CONVERSION_MEMORY = 1.2e9


# ---- Tracing --------------------------------------------------------------------------------------------------------


def vision_encoder_example(config: MllamaConfig) -> dict[str, torch.Tensor]:
    """Example inputs for the vision encoder (shapes in `VisionEncoder.forward`); values do not matter.

    Tracing runs the module and keeps every activation: 10 GB for the 11B tower and its four tiles. So the mask is empty
    here, and the layers, whose rows follow its length, see no rows; the graph records lengths and splits all the same.
    """
    vision = config.vision_config
    return {
        "pixel_values": torch.zeros(vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size),
        "aspect_ratio_ids": torch.ones(1, dtype=torch.int64),
        "aspect_ratio_mask": torch.zeros(0, dtype=torch.int64),
    }


def language_model_example(shapes: MllamaShapes) -> dict:
    """Example inputs for two rows of two new tokens after two old ones and three image rows."""
    batch, queries, past, rows = 2, 2, 2, 3
    heads, dim = shapes.num_kv_heads, shapes.head_dim

    def key_value(key_shape, value_shape, layers):
        return [(torch.zeros(key_shape), torch.zeros(value_shape)) for _ in layers]

    return {
        "input_ids": torch.ones(batch, queries, dtype=torch.int64),
        "attention_mask": torch.ones(batch, past + queries, dtype=torch.int64),
        "position_ids": torch.arange(past, past + queries).expand(batch, -1),
        "cross_attention_bias": torch.zeros(batch, 1, queries, rows),
        "cross_attention_rows": torch.ones(batch, queries, 1),
        "logits_to_keep": torch.tensor(1),
        "cross_attn_key_values": key_value((batch, heads, dim, rows), (batch, heads, rows, dim), shapes.cross_layers),
        "past_key_values": key_value((batch, heads, past, dim), (batch, heads, past, dim), shapes.self_layers),
    }


@contextlib.contextmanager
def traceable_16bit(module: nn.Module):
    """Inside, linear and embedding layers of `module` put their 16-bit weights into the graph as they are.

    OpenVINO's own patching (openvino/frontend/pytorch/patch_model.py; Optimum Intel uses the same): the IR's constants
    share the memory-mapped safetensors, nothing is converted or copied, and tracing skips those layers' arithmetic.
    """
    attribute = "_openvino_module_extension_patch_orig_forward"
    patch_model.__make_16bit_traceable(module, attribute)
    try:
        yield
    finally:
        patch_model.unpatch_model(module, attribute)


@contextlib.contextmanager
def quiet():
    """Hides what torch and transformers say about tracing: deprecations, and branches that no input of ours takes."""
    verbosity = transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=torch.jit.TracerWarning)
        warnings.simplefilter("ignore", category=FutureWarning)
        transformers.logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(verbosity)


def trace(module: nn.Module, example: dict) -> ov.Model:
    """`module` as an OpenVINO model, its ports still without names."""
    with torch.no_grad(), quiet(), traceable_16bit(module):
        # check_trace would run it twice more, to compare outputs that traceable_16bit makes meaningless; the graph is
        # compared with transformers on shapes other than the example's instead (tests/test_parity.py)
        decoder = TorchScriptPythonDecoder(module, example_input=example, trace_kwargs={"check_trace": False})
        return ov.convert_model(decoder, example_input=example)


def name_ports(model: ov.Model, inputs: dict[str, list], outputs: list[str]) -> None:
    """Names the model's ports in order; `inputs` maps names to partial shapes (-1 is dynamic).

    Raises:
        RuntimeError: the graph has other ports than expected, as when the tracer dropped an unused input.
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
    """Moves the text KV cache inside the model and lets input `beam_idx` (i32 [batch]) reorder its rows.

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
    apply_make_stateful_transformation(model, dict(zip(shapes.past_names, shapes.present_names, strict=True)))

    # A cache starts with no columns but with as many rows as input_ids has: [batch, kv heads, 0, head_dim]
    batch = ops.gather(ops.shape_of(ports["input_ids"]), ops.constant([0]), ops.constant(0))
    rest = ops.constant([shapes.num_kv_heads, 0, shapes.head_dim], dtype=ov.Type.i64)
    empty = ops.broadcast(ops.constant(0.0, dtype=ov.Type.f32), ops.concat([batch, rest], 0))
    for op in model.get_ops():
        if op.get_type_name() == "ReadValue":
            op.set_arguments([empty.output(0)])
    model.validate_nodes_and_infer_types()


def convert_vision_encoder(model: MllamaForConditionalGeneration) -> ov.Model:
    """The vision tower, the projector and the cross-attention K/V projections as one OpenVINO model, for one image."""
    shapes, vision = MllamaShapes.from_config(model.config), model.config.vision_config
    ov_model = trace(VisionEncoder(model), vision_encoder_example(model.config))
    tiles, size = vision.max_num_tiles, vision.image_size
    inputs = {
        "pixel_values": [tiles, vision.num_channels, size, size],
        "aspect_ratio_ids": [1],
        "aspect_ratio_mask": [tiles],
    }
    name_ports(ov_model, inputs, shapes.cross_kv_names)
    return ov_model


def convert_language_model(model: MllamaForConditionalGeneration) -> ov.Model:
    """The language model as one stateful OpenVINO model (ports as in `LanguageModel.forward`, plus `beam_idx`)."""
    shapes = MllamaShapes.from_config(model.config)
    ov_model = trace(LanguageModel(model), language_model_example(shapes))
    heads, dim = shapes.num_kv_heads, shapes.head_dim
    inputs = {
        "input_ids": [-1, -1],
        "attention_mask": [-1, -1],
        "position_ids": [-1, -1],
        "cross_attention_bias": [-1, 1, -1, -1],
        "cross_attention_rows": [-1, -1, 1],
        "logits_to_keep": [],
    }
    for name in shapes.cross_kv_names:
        inputs[name] = [-1, heads, dim, -1] if name.endswith(".key") else [-1, heads, -1, dim]
    for name in shapes.past_names:
        inputs[name] = [-1, heads, -1, dim]
    name_ports(ov_model, inputs, ["logits", *shapes.present_names])
    make_stateful(ov_model, shapes)
    return ov_model


# ---- Files ----------------------------------------------------------------------------------------------------------


def checkpoint_folder(model_id: str | Path) -> Path:
    """The local folder of a checkpoint: itself, or the hub's cached download.

    Raises:
        ValueError: not a Mllama checkpoint, or its folder holds no safetensors.
        FileNotFoundError: no such folder or repository, or no network to fetch it.
        PermissionError: the repository is gated and the token at hand has no access.
    """
    folder = Path(model_id)
    if not folder.is_dir():
        folder = _download(str(model_id))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: give the folder of a Hugging Face checkpoint or a hub id.")
    model_type = AutoConfig.from_pretrained(folder).model_type
    if model_type != "mllama":
        raise ValueError(
            f"{model_id} is a '{model_type}' checkpoint; this converter takes Llama 3.2 Vision ones (model_type "
            "'mllama'), such as meta-llama/Llama-3.2-11B-Vision-Instruct."
        )
    if not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} has a config but no *.safetensors weights: download it completely, or save the model with "
            "save_pretrained(..., safe_serialization=True). Pickled .bin weights are not loaded."
        )
    return folder


def _download(model_id: str) -> Path:
    try:
        return Path(snapshot_download(model_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except GatedRepoError as error:
        raise PermissionError(
            f"{model_id} is gated: accept its licence on https://huggingface.co/{model_id}, then log in with "
            "`huggingface_hub.login()` or set HF_TOKEN."
        ) from error
    except (RepositoryNotFoundError, ValueError) as error:  # ValueError: not of the form "owner/name"
        raise FileNotFoundError(
            f"'{model_id}' is neither a folder here nor a repository on the Hugging Face hub; check the spelling, and "
            "for a private repository log in with `huggingface_hub.login()`."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{model_id} could not be fetched from the Hugging Face hub ({type(error).__name__}) and is not in the "
            "local cache; check the network, or give the folder of a checkpoint on this disk."
        ) from error


def checkpoint_stamp(folder: Path) -> dict[str, str]:
    """What the IRs that this version of the converter makes of a checkpoint say of their origin."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return {"converter_version": CONVERTER_VERSION, "checkpoint": fingerprint(*files)}


def convert_mllama(model_id: str | Path, out_dir: str | Path, language_model: bool = True) -> Path:
    """Converts a Mllama checkpoint to OpenVINO; whatever `out_dir` already holds of it, whole, is kept.

    Args:
        model_id: hub id or local folder of any Mllama checkpoint (11B, 90B, Guard, fine-tunes). A bfloat16 or float16
            checkpoint keeps its weights bit for bit; a float32 one is stored as float16.
        out_dir: folder for `openvino_vision_encoder.xml`, `openvino_language_model.xml` (and their .bin), the config,
            the generation config and the processor with its chat template.
        language_model: False leaves it to `compress(..., checkpoint=model_id)`, which then never writes it in 16 bit.
    Returns:
        out_dir as a Path.
    Raises:
        ValueError, FileNotFoundError, PermissionError: as `checkpoint_folder`, each naming the fix.
        OSError, MemoryError: too little room (`check_room`); parts that are done are kept, and a rerun does the rest.
    """
    out_dir = Path(out_dir)
    source = checkpoint_folder(model_id)
    stamp = checkpoint_stamp(source)
    parts = {"vision encoder": (out_dir / VISION_ENCODER_NAME, VisionEncoder, convert_vision_encoder)}
    if language_model:
        parts["language model"] = (out_dir / LANGUAGE_MODEL_NAME, LanguageModel, convert_language_model)
    if all(is_current(path, stamp) for path, _, _ in parts.values()):
        print(f"✅ {out_dir} already holds the converted model")
        return out_dir

    print("⌛ Load original model")
    model = load_checkpoint(source)
    sizes = {what: 2 * sum(weight.numel() for weight in parts[what][1](model).parameters()) for what in parts}
    missing = sum(size for what, size in sizes.items() if not is_current(parts[what][0], stamp))
    check_room(out_dir, missing, CONVERSION_MEMORY, "close other programs")
    with writing(out_dir):
        save_companions(source, model, out_dir)
        for what, (path, _, convert) in parts.items():
            if not is_current(path, stamp):  # asked again: another process may just have made it
                print(f"⌛ Convert {what}, {sizes[what] / 1e6:,.0f} MB...")
                save_ir(convert(model), path, stamp)
                print(f"✅ {what.capitalize()} successfully converted")
    print(f"✅ Model successfully converted and can be found in {out_dir}")
    return out_dir


def load_checkpoint(folder: Path) -> MllamaForConditionalGeneration:
    """The checkpoint in 16 bit on the CPU, its weights memory-mapped from the safetensors files."""
    dtype = AutoConfig.from_pretrained(folder).dtype
    dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float16
    return MllamaForConditionalGeneration.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()


def save_companions(source: Path, model: MllamaForConditionalGeneration, out_dir: Path) -> None:
    """Everything beside the IRs that running the model needs: config, generation config, processor, chat template; and
    the golden answer, where the checkpoint brings one."""
    with whole(out_dir) as folder:
        model.config.save_pretrained(folder)
        if (source / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(source).save_pretrained(folder)
        AutoProcessor.from_pretrained(source).save_pretrained(folder)
        for path in source.glob("golden.*"):
            shutil.copy(path, folder)
