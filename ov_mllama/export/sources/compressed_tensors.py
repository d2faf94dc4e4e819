"""Checkpoints of compressed-tensors (llm-compressor, vLLM): FP8, INT8, and INT8 or INT4 packed in int32, dequantised.

Layout and rounding as in compressed-tensors 0.20.1: quantization/lifecycle/forward_helpers.py (`_dequantize`, in the
scale's type) and compressors/pack_quantized/helpers.py (`unpack_from_int32`).
"""

import re
from dataclasses import replace
from functools import partial

import torch

from ov_mllama.export.sources.blocks import Blocks, check_rest, check_shape, unchanged, unpacked
from ov_mllama.export.sources.files import AGAIN, FIX
from ov_mllama.export.sources.names import unwrapped
from ov_mllama.export.sources.tensors import Packed, Tensor, four_bit_bytes
from ov_mllama.runtime.errors import InputError

FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
# of activations and the KV cache, which are not quantised here
ACTIVATIONS = re.compile(r"(^|\.)(input|output|[qkv])_(scale|zero_point)$")
# names of modules in files of transformers 4 and in models of transformers 5: targets have either
RENAMED = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("vision_model.", "model.vision_model."),
    ("multi_modal_projector", "model.multi_modal_projector"),
)


def describe(quantization: dict) -> str:
    """Return a phrase such as "compressed-tensors pack-quantized, 4 bit".

    Raises:
        InputError: for a format, sparsity or transform that is not read.
    """
    sparsity = (quantization.get("sparsity_config") or {}).get("format") or "dense"
    if sparsity != "dense":
        raise InputError(f"The checkpoint has sparse weights of compressed-tensors ({sparsity}): {FIX}")
    if (quantization.get("transform_config") or {}).get("config_groups"):
        raise InputError(f"The checkpoint has rotated weights of compressed-tensors (transform_config): {FIX}")
    kinds = []
    for group in groups_of(quantization):
        form, weights = group.get("format") or quantization.get("format"), group["weights"]
        bits, kind, strategy = weights.get("num_bits", 8), weights.get("type", "int"), strategy_of(weights)
        read = strategy in ("tensor", "channel", "group", "block") and bits in ((8,) if kind == "float" else (4, 8))
        if form not in FORMATS or not read:
            raise InputError(
                f"The checkpoint is in compressed-tensors' format {form} ({bits}-bit {kind}, one scale for each "
                f"{strategy}), which is not read: {FIX}"
            )
        kinds.append(f"{form}, {bits} bit")
    return f"compressed-tensors {' and '.join(dict.fromkeys(kinds))}"


def groups_of(quantization: dict) -> list[dict]:
    """Return the `config_groups` that quantise weights.

    Raises:
        InputError: if there is none.
    """
    groups = quantization.get("config_groups")
    listed = groups.values() if isinstance(groups, dict) else ()
    quantised = [group for group in listed if isinstance(group, dict) and group.get("weights")]
    if not quantised:
        raise InputError(f"The checkpoint's quantization_config has no config_groups with weights: {AGAIN}")
    return quantised


def strategy_of(weights: dict) -> str:
    """Return the part of a matrix that shares a scale: "tensor", "channel", "group", "block" or another."""
    size = weights.get("group_size")
    return weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")


def decode(tensors: dict[str, Tensor], quantization: dict) -> dict[str, Tensor]:
    """Return the tensors dequantised when they are read, in the type of their scales.

    Raises:
        InputError: for a weight without scale, a scale without weight, or shapes that do not match.
    """
    groups = groups_of(quantization)
    parts = {name for name in tensors if name.rpartition(".")[2] in PARTS}
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensors if name in parts)
    rest = {name: tensor for name, tensor in tensors.items() if name not in parts and not ACTIVATIONS.search(name)}
    stored = {module: rest.pop(f"{module}.weight", None) for module in modules}
    check_rest(rest)
    for module, weight in stored.items():
        layer = {part: tensors[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in tensors}
        if weight is not None:
            layer["weight"] = weight
        rest[f"{module}.weight"] = dequantised(module, layer, group_of(module, groups)["weights"])
    return rest


def group_of(module: str, groups: list[dict]) -> dict:
    """Return the group of a module: by its name, else by a pattern, else by its class, as `match_targets`.

    Raises:
        InputError: if none of several is for it.
    """
    if len(groups) == 1:
        return groups[0]
    name = unwrapped(module)
    pairs = [pair for one, other in RENAMED for pair in ((one, other), (other, one))]
    names = {name, *(there + name.removeprefix(here) for here, there in pairs if name.startswith(here))}
    kind = "Embedding" if "embed" in name.rpartition(".")[2] else "Linear"
    targets = {target: group for group in groups for target in group.get("targets") or ()}
    exact = [target for target in targets if target in names]
    patterns = sorted(target for target in targets if target.startswith("re:"))
    matching = [target for target in patterns if any(re.match(target.removeprefix("re:"), name) for name in names)]
    for target in [*exact, *matching, kind]:
        if target in targets:
            return targets[target]
    raise InputError(f"{module} is quantised, but none of the {len(groups)} config_groups is for it: {AGAIN}")


def dequantised(module: str, layer: dict[str, Tensor], weights: dict) -> Tensor:
    """Return a module's weight, computed when it is read.

    Args:
        layer: the module's tensors by the last part of their names.
        weights: settings of its group.
    Raises:
        InputError: for tensors that are missing or of another shape.
    """
    packed, scale, bits = layer.get("weight_packed"), layer.get("weight_scale"), weights.get("num_bits", 8)
    stored = layer.get("weight") if packed is None else packed
    if stored is None or scale is None or (packed and "weight_shape" not in layer):
        part = "weight" if stored is None else "weight_scale" if scale is None else "weight_shape"
        raise InputError(f"{module}.{part} is missing beside {module}.{next(iter(layer))}: {AGAIN}")
    rows, columns = layer["weight_shape"].read().tolist() if packed else stored.shape
    unpack = partial(signed, bits=bits, columns=columns) if packed else unchanged
    blocks = Blocks((rows, columns), block_of(weights, rows, columns), scale.dtype, stored.read, scale.read, unpack)
    check_shape(f"{module}.weight_scale", scale, blocks.grid)
    if packed:
        check_shape(f"{module}.weight_packed", packed, (rows, -(-columns * bits // 32)))
    if "weight_zero_point" in layer:
        blocks = replace(blocks, zero_point=partial(zero_points, layer["weight_zero_point"], bits, blocks.grid))
    if "weight_g_idx" in layer:
        blocks = replace(blocks, order=order_of(layer["weight_g_idx"].read().long(), blocks.block[1]))
    sequential = blocks.block[0] == 1 and blocks.order is None and columns % blocks.block[1] == 0
    if packed and bits == 4 and sequential and fits_half(scale.read()):
        packed_bytes = four_bit_bytes(rows, columns, blocks.block[1])
        return replace(blocks.tensor(), pack=partial(pack, blocks), packed_bytes=packed_bytes)
    return blocks.tensor()


def block_of(weights: dict, rows: int, columns: int) -> tuple[int, int]:
    """Return the rows and columns that share a scale, by a group's settings."""
    high, wide = weights.get("block_structure") or (rows, columns)
    sizes = {"tensor": (rows, columns), "channel": (1, columns), "block": (high, wide)}
    return sizes.get(strategy_of(weights)) or (1, weights["group_size"])


def signed(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return the numbers that are `unpacked`, which are stored without sign: i8 [rows, columns]."""
    return (unpacked(packed, bits, columns).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def zero_points(tensor: Tensor, bits: int, grid: tuple[int, int]) -> torch.Tensor:
    """Return the zero points of a grid of blocks, which are packed along the rows if they are packed."""
    stored = tensor.read()
    return signed(stored.T, bits, grid[0]).T if stored.dtype == torch.int32 else stored


def order_of(index: torch.Tensor, size: int) -> torch.Tensor | None:
    """Return the group of each column; None if groups are in order, as they are without an index (-1)."""
    in_order = torch.equal(index, torch.arange(len(index)) // size)
    return None if in_order or bool((index < 0).any()) else index


def fits_half(scale: torch.Tensor) -> bool:
    """Return whether scales are the same in float16, but for its rounding."""
    return torch.allclose(scale.half().float(), scale.float(), rtol=2**-11, atol=0)


def pack(blocks: Blocks) -> Packed:
    """Return a 4-bit matrix as it is stored, with groups of columns in order."""
    (rows, groups), size = blocks.grid, blocks.block[1]
    values = (blocks.unpack(blocks.stored()) + 8).to(torch.uint8)
    scales = blocks.scale().reshape(rows, groups, 1).half()
    zeros = torch.zeros(rows, groups) if blocks.zero_point is None else blocks.zero_point()
    zeros = (zeros.reshape(rows, groups, 1) + 8).to(torch.uint8)
    return Packed(values.view(rows, groups, size).numpy(), zeros.numpy(), scales.numpy())
