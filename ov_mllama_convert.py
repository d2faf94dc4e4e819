"""Checkpoint -> OpenVINO IR: the two graphs of Mllama, traced from the checkpoint's own sub-modules.

This file knows how a `MllamaForConditionalGeneration` computes and how OpenVINO wants it written down. It does not
know how the IRs are run (`ov_mllama_helper.py`) or made smaller (`ov_mllama_compression.py`).
"""

import contextlib
import hashlib
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import openvino as ov
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from openvino.frontend.pytorch import patch_model
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoProcessor, GenerationConfig, MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import apply_rotary_pos_emb, repeat_kv

# Raise it whenever a graph's inputs, outputs or meaning change: IRs of another version are rebuilt, never loaded.
CONVERTER_VERSION = "1"

VISION_ENCODER_NAME = "openvino_vision_encoder.xml"
LANGUAGE_MODEL_NAME = "openvino_language_model.xml"

# Additive mask value. Finite and inside float16's range, so that no precision turns a masked row into NaN
# ("!!!!" answers, openvino_notebooks#2442); exp() of it is exactly zero in every precision.
MASKED = torch.finfo(torch.float16).min


@dataclass(frozen=True)
class MllamaShapes:
    """Every number and tensor name that the two IRs, the runtime and the tests share, read from the checkpoint.

    Attributes:
        max_num_tiles: tiles of an image's canvas, real or padding.
        patches_per_tile: rows of one tile after the vision tower, class token included (1601 for 560/14 pixels).
        hidden_size, num_heads, num_kv_heads, head_dim: of the language model.
        self_layers, cross_layers: indices of its self- and cross-attention layers.
        vocab_size: columns of the logits. `<|image|>` has an embedding but no logit: its id may equal `vocab_size`.
    """

    max_num_tiles: int
    patches_per_tile: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    self_layers: tuple[int, ...]
    cross_layers: tuple[int, ...]
    vocab_size: int

    @classmethod
    def from_config(cls, config: MllamaConfig) -> "MllamaShapes":
        text, vision = config.text_config, config.vision_config
        cross_layers = tuple(sorted(i for i in text.cross_attention_layers if i < text.num_hidden_layers))
        return cls(
            max_num_tiles=vision.max_num_tiles,
            patches_per_tile=(vision.image_size // vision.patch_size) ** 2 + 1,
            hidden_size=text.hidden_size,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.hidden_size // text.num_attention_heads,
            self_layers=tuple(i for i in range(text.num_hidden_layers) if i not in cross_layers),
            cross_layers=cross_layers,
            vocab_size=text.vocab_size,
        )

    @property
    def cross_kv_names(self) -> list[str]:
        """Outputs of the vision IR, inputs of the language IR (shapes in `VisionEncoder.forward`)."""
        return [f"cross_attn_key_values.{i}.{part}" for i in self.cross_layers for part in ("key", "value")]

    @property
    def past_names(self) -> list[str]:
        return [f"past_key_values.{i}.{part}" for i in self.self_layers for part in ("key", "value")]

    @property
    def present_names(self) -> list[str]:
        return [f"present.{i}.{part}" for i in self.self_layers for part in ("key", "value")]


# ---- The two graphs -------------------------------------------------------------------------------------------------


class VisionEncoder(nn.Module):
    """One image's tiles -> cross-attention keys and values of every cross-attention layer.

    Mllama's tower masks only padding -> padding attention: real patches do look at padding tiles, the model was trained
    so. With the real patches first, two attentions without a mask say the same as one with a [rows, rows] mask: real
    queries see every key, padding queries see the real keys. It is exact, and an image of one tile costs half.
    """

    def __init__(self, model: MllamaForConditionalGeneration):
        super().__init__()
        self.shapes = MllamaShapes.from_config(model.config)
        self.vision_model = model.model.vision_model
        self.projector = model.model.multi_modal_projector
        layers = model.model.language_model.layers
        self.cross_attentions = nn.ModuleList(layers[i].cross_attn for i in self.shapes.cross_layers)

    def forward(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask):
        """
        Args:
            pixel_values: f32 [max_num_tiles, channels, height, width] of one image; padding tiles are zeros.
            aspect_ratio_ids: i64 [1], 1-based index of the canvas in `supported_aspect_ratios`, 0 for "no image".
            aspect_ratio_mask: i64 [max_num_tiles], 1 for real tiles, which come first.
        Returns:
            for each cross-attention layer, in order: key f32 [1, kv heads, head_dim, rows], normalised, transposed and
            scaled, and value f32 [1, kv heads, rows, head_dim], with rows = max_num_tiles * patches_per_tile in tile
            order. Keys are ready for a plain `query @ key`; heads are not repeated.
        """
        tower, tiles, patches = self.vision_model, self.shapes.max_num_tiles, self.shapes.patches_per_tile
        alignment = -patches % 8  # Meta pads each tile to a multiple of 8 rows, and those rows take part as padding
        real_rows = aspect_ratio_mask.sum() * patches

        x = self.embed(pixel_values, aspect_ratio_ids)
        x = torch.cat([x.reshape(1, tiles * patches, -1), x.new_zeros(1, tiles * alignment, x.shape[-1])], dim=1)
        intermediate = []
        for layer in _progress(tower.transformer.layers, "Tracing vision encoder"):
            x = self.encoder_layer(layer, x, real_rows)
            intermediate.append(x)

        x = tower.layernorm_post(x)
        x = torch.cat(
            [
                self.add_tile_embedding(x[:, : tiles * patches], aspect_ratio_ids),
                self.add_tile_embedding(x[:, tiles * patches :], aspect_ratio_ids),
            ],
            dim=1,
        )
        for layer in tower.global_transformer.layers:
            x = self.encoder_layer(layer, x, real_rows)

        chosen = torch.stack([intermediate[i] for i in tower.intermediate_layers_indices], dim=-1)
        features = torch.cat([x, chosen.flatten(2)], dim=-1)[:, : tiles * patches]
        states = self.projector(features)
        return tuple(tensor for attention in self.cross_attentions for tensor in self.key_value(attention, states))

    def embed(self, pixel_values, aspect_ratio_ids):
        """Pixels -> [1, tiles, patches, channels] with class token and position embeddings."""
        tower = self.vision_model
        x = tower.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        x = tower.pre_tile_positional_embedding(x[None], aspect_ratio_ids)
        x = tower.apply_class_embedding(x[0])
        return tower.layernorm_pre(tower.gated_positional_embedding(x[None], aspect_ratio_ids))

    def add_tile_embedding(self, x, aspect_ratio_ids):
        """Adds each tile's embedding to its rows; x is [1, tiles * rows of a tile, channels]."""
        by_tile = x.reshape(1, self.shapes.max_num_tiles, -1, x.shape[-1])
        return self.vision_model.post_tile_positional_embedding(by_tile, aspect_ratio_ids).reshape(x.shape)

    def encoder_layer(self, layer, x, real_rows):
        attended = self.valid_first_attention(layer.self_attn, layer.input_layernorm(x), real_rows)
        x = x + (layer.gate_attn.tanh() * attended if layer.is_gated else attended)
        mlp = layer.mlp(layer.post_attention_layernorm(x))
        return x + (layer.gate_ffn.tanh() * mlp if layer.is_gated else mlp)

    @staticmethod
    def valid_first_attention(attention, x, real_rows):
        """The tower's masked attention as two unmasked ones; the first `real_rows` rows of x are real patches."""

        def heads(projected):
            return projected.view(1, -1, attention.num_heads, attention.head_dim).transpose(1, 2)

        query, key, value = heads(attention.q_proj(x)), heads(attention.k_proj(x)), heads(attention.v_proj(x))
        real = F.scaled_dot_product_attention(query[:, :, :real_rows], key, value)
        padding = F.scaled_dot_product_attention(
            query[:, :, real_rows:], key[:, :, :real_rows], value[:, :, :real_rows]
        )
        return attention.o_proj(torch.cat([real, padding], dim=2).transpose(1, 2).flatten(2))

    @staticmethod
    def key_value(attention, states):
        """What a cross-attention layer computes from the image alone: done once here, never per token."""
        split = (1, -1, attention.num_key_value_heads, attention.head_dim)
        key = attention.k_norm(attention.k_proj(states).view(split)) * attention.scaling
        value = attention.v_proj(states).view(split)
        return key.permute(0, 2, 3, 1), value.transpose(1, 2)


class LanguageModel(nn.Module):
    """One step of the language model with every piece of state explicit; `make_stateful` hides the text KV cache."""

    def __init__(self, model: MllamaForConditionalGeneration):
        super().__init__()
        self.shapes = MllamaShapes.from_config(model.config)
        self.text_model = model.model.language_model
        self.lm_head = model.lm_head

    def forward(
        self,
        input_ids,
        attention_mask,
        position_ids,
        cross_attention_bias,
        cross_attention_rows,
        logits_to_keep,
        cross_attn_key_values,
        past_key_values,
    ):
        """
        Args:
            input_ids: i64 [batch, query].
            attention_mask: i64 [batch, past + query]; a 0 hides that column of the KV cache from every query.
            position_ids: i64 [batch, query], for the rotary embedding only: causality goes by cache column.
            cross_attention_bias: f32 [batch, 1, query, rows], added to the scores of text against image rows. Any axis
                may be 1, so "everything may be seen" is a single zero.
            cross_attention_rows: f32 [batch, query, 1], 0 for tokens that may see no image: their MLP in the
                cross-attention layers is switched off, as transformers does (its attention is not, transformers#39379).
            logits_to_keep: i64 scalar, how many of the last positions get logits.
            cross_attn_key_values: (key, value) for each cross-attention layer, as the vision encoder wrote them.
            past_key_values: (key, value) for each self-attention layer, f32 [batch, kv heads, past, head_dim].
        Returns:
            logits f32 [batch, logits_to_keep, vocab], then the grown key and value of each self-attention layer.
        """
        x = self.text_model.embed_tokens(input_ids)
        rotary = self.text_model.rotary_emb(x, position_ids)
        bias = self.causal_bias(input_ids, attention_mask)
        cross_kv, past, present = iter(cross_attn_key_values), iter(past_key_values), []
        for index, layer in enumerate(_progress(self.text_model.layers, "Tracing language model")):
            if index in self.shapes.cross_layers:
                x = self.cross_attention_layer(layer, x, *next(cross_kv), cross_attention_bias, cross_attention_rows)
            else:
                x, key_value = self.self_attention_layer(layer, x, rotary, bias, *next(past))
                present.extend(key_value)
        x = x[:, x.shape[1] - logits_to_keep :]
        return self.lm_head(self.text_model.norm(x)), *present

    @staticmethod
    def causal_bias(input_ids, attention_mask):
        """f32 [batch, 1, query, past + query]: 0 where a query may look, MASKED elsewhere."""
        columns = attention_mask.shape[1]
        queries = input_ids.shape[1]
        column = torch.arange(columns)
        query = torch.arange(queries) + (columns - queries)
        allowed = (column[None, :] <= query[:, None])[None, None] & attention_mask[:, None, None, :].bool()
        return torch.where(allowed, 0.0, MASKED)

    def self_attention_layer(self, layer, x, rotary, bias, past_key, past_value):
        attention = layer.self_attn
        batch, queries, _ = x.shape
        normed = layer.input_layernorm(x)

        def heads(projected):
            return projected.view(batch, queries, -1, attention.head_dim).transpose(1, 2)

        query, key = apply_rotary_pos_emb(heads(attention.q_proj(normed)), heads(attention.k_proj(normed)), *rotary)
        key = torch.cat([past_key, key], dim=2)
        value = torch.cat([past_value, heads(attention.v_proj(normed))], dim=2)
        groups = attention.num_key_value_groups
        attended = F.scaled_dot_product_attention(
            query, repeat_kv(key, groups), repeat_kv(value, groups), attn_mask=bias
        )
        x = x + attention.o_proj(attended.transpose(1, 2).reshape(batch, queries, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x, (key, value)

    def cross_attention_layer(self, layer, x, key, value, bias, rows):
        """Text attends to image rows. Query heads that share a key are folded into the query axis: [B, kv, G*Q, D]."""
        attention, shapes = layer.cross_attn, self.shapes
        batch, queries, _ = x.shape
        query = attention.q_proj(layer.input_layernorm(x)).view(batch, queries, shapes.num_heads, shapes.head_dim)
        query = attention.q_norm(query).transpose(1, 2)
        scores = query.reshape(batch, shapes.num_kv_heads, -1, shapes.head_dim) @ key
        groups = shapes.num_heads // shapes.num_kv_heads
        scores = scores.view(batch, shapes.num_kv_heads, groups, queries, -1) + bias[:, :, None]
        weights = scores.softmax(dim=-1).view(batch, shapes.num_kv_heads, groups * queries, -1)
        attended = (weights @ value).view(batch, shapes.num_heads, queries, shapes.head_dim)
        attended = attention.o_proj(attended.transpose(1, 2).reshape(batch, queries, -1))
        x = x + layer.cross_attn_attn_gate.tanh() * attended
        mlp = layer.mlp(layer.post_attention_layernorm(x))
        return x + layer.cross_attn_mlp_gate.tanh() * (rows * mlp)


def _progress(layers, description):
    """A bar over a module's layers: tracing runs `forward` once, so it advances as the graph is recorded."""
    return tqdm(layers, desc=description, unit="layer", leave=False)


# ---- Tracing --------------------------------------------------------------------------------------------------------


def vision_encoder_example(config: MllamaConfig) -> dict[str, torch.Tensor]:
    """Example inputs for the vision encoder (shapes in `VisionEncoder.forward`); values do not matter.

    No tile is real here. The split of the rows is recorded just the same, and attention between 6432 rows, most of what
    tracing the 11B tower would compute, becomes attention to none.
    """
    vision = config.vision_config
    return {
        "pixel_values": torch.zeros(vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size),
        "aspect_ratio_ids": torch.ones(1, dtype=torch.int64),
        "aspect_ratio_mask": torch.zeros(vision.max_num_tiles, dtype=torch.int64),
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


def fingerprint(folder: Path) -> str:
    """A cheap identity of a checkpoint: its config and, of each weight file, the size and 64 samples of 64 KiB."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size, sample = path.stat().st_size, 1 << 16
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(sample, size // 64)):
                file.seek(start)
                digest.update(file.read(sample))
    return digest.hexdigest()[:16]


def save_ir(model: ov.Model, path: Path, stamp: dict[str, str]) -> None:
    """Writes an IR with its `stamp` (see `ir_stamp`) so that `path` exists only once it is whole: into a folder beside
    it, then renamed, .xml last."""
    for key, value in stamp.items():
        model.set_rt_info(value, ["mllama", key])
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as scratch:
        part = Path(scratch) / path.name
        # 16-bit weights are stored as they are; what is left in f32 (norms, rotary frequencies) must stay exact
        ov.save_model(model, part, compress_to_fp16=False)
        path.unlink(missing_ok=True)
        part.with_suffix(".bin").replace(path.with_suffix(".bin"))
        part.replace(path)


def ir_stamp(path: Path) -> dict[str, str]:
    """What `save_ir` wrote into an IR about its origin: `converter_version`, `checkpoint`, if compressed `samples`.

    Returns an empty dict for an IR that is missing, incomplete or made by another program.
    """
    weights = path.with_suffix(".bin")
    if not (path.is_file() and weights.is_file()):
        return {}
    text = path.read_text(encoding="utf-8")
    if not text.rstrip().endswith("</net>"):
        return {}
    last_byte = max(
        (int(o) + int(s) for o, s in re.findall(r'<data [^>]*?offset="(\d+)" size="(\d+)"', text)), default=0
    )
    if weights.stat().st_size < last_byte:
        return {}
    section = text.rpartition("<mllama>")[2].partition("</mllama>")[0]
    return dict(re.findall(r'<(\w+) value="([^"]*)"', section))


def checkpoint_stamp(folder: Path) -> dict[str, str]:
    """The stamp of the IRs that this version of the converter makes of a checkpoint."""
    return {"converter_version": CONVERTER_VERSION, "checkpoint": fingerprint(folder)}


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
    """
    out_dir = Path(out_dir)
    source = checkpoint_folder(model_id)
    stamp = checkpoint_stamp(source)
    parts = {"vision encoder": (out_dir / VISION_ENCODER_NAME, convert_vision_encoder)}
    if language_model:
        parts["language model"] = (out_dir / LANGUAGE_MODEL_NAME, convert_language_model)
    missing = {what: part for what, part in parts.items() if ir_stamp(part[0]) != stamp}
    if not missing:
        print(f"✅ {out_dir} already holds the converted model")
        return out_dir

    out_dir.mkdir(parents=True, exist_ok=True)
    for leftover in out_dir.glob(".partial-*"):
        shutil.rmtree(leftover)
    print("⌛ Load original model")
    model = load_checkpoint(source)
    save_companions(source, model, out_dir)
    for what, (path, convert) in missing.items():
        print(f"⌛ Convert {what}...")
        ov_model = convert(model)
        save_ir(ov_model, path, stamp)
        del ov_model
        print(f"✅ {what.capitalize()} successfully converted")
    print(f"✅ Model successfully converted and can be found in {out_dir}")
    return out_dir


def load_checkpoint(folder: Path) -> MllamaForConditionalGeneration:
    """The checkpoint in 16 bit on the CPU, its weights memory-mapped from the safetensors files."""
    dtype = AutoConfig.from_pretrained(folder).dtype
    dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float16
    return MllamaForConditionalGeneration.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()


def save_companions(source: Path, model: MllamaForConditionalGeneration, out_dir: Path) -> None:
    """Everything beside the IRs that running the model needs: config, generation config, processor, chat template."""
    model.config.save_pretrained(out_dir)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(out_dir)
    AutoProcessor.from_pretrained(source).save_pretrained(out_dir)
