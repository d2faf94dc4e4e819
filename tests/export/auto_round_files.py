"""Write quantised files with auto-round 0.16.1, in a process of its own: it changes torch, logging and the environment.

    python tests/export/auto_round_files.py FOLDER

FOLDER/source: a tiny Mllama in bfloat16. FOLDER/gptq: the same, quantised as a whole. FOLDER/layers.safetensors: for
each of CASES the parts of a layer, and its `weight` as auto-round itself computes with it.
"""

import gc
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# name: packing, bits, group size, symmetric, columns shuffled over the groups
CASES = {
    "gptq": ("less one", 4, 32, False, False),
    "gptq-sym": ("less one", 4, 32, True, False),
    "gptq-channel": ("less one", 4, -1, False, False),
    "gptq-2": ("less one", 2, 64, False, False),
    "gptq-3": ("less one", 3, 32, False, False),
    "gptq-8": ("less one", 8, 32, False, False),
    "raw": ("raw", 4, 128, False, False),
    "raw-3": ("raw", 3, 64, False, False),
    "raw-8": ("raw", 8, -1, True, False),
    "raw-shuffled": ("raw", 4, 32, False, True),
    "awq": ("awq", 4, 64, False, False),
    "awq-sym": ("awq", 4, 32, True, False),
}
ROWS, COLUMNS = 96, 256


def rounding(weight: torch.Tensor, bits: int, size: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zero points [rows, groups]; zero points are 1 to 2 ** bits - 1, which all packings hold."""
    groups = weight.unflatten(1, (-1, size))
    top = 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if sym:
        return (groups.abs().amax(-1) / 2 ** (bits - 1)).half().float(), torch.full_like(low, 2 ** (bits - 1))
    scales = ((high - low) / top).half().float()
    return scales, (-low / scales).round().clamp(1, top)


def layer_of(case: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one of CASES."""
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    packing, bits, size, sym, shuffled = CASES[case]
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    scales, zeros = rounding(linear.weight.data, bits, size if size > 0 else COLUMNS, sym)
    if packing == "awq":
        layer = WQLinear_GEMM.from_linear(linear, bits, size, scales=scales.T, zeros=zeros.T, device="cpu")
        weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, bits, size).T
    else:
        kind = {"raw": qlinear_torch, "less one": qlinear_torch_zp}[packing].QuantLinear
        layer = kind(bits, size, COLUMNS, ROWS, False, g_idx=shuffled)
        layer.device = "cpu"
        layer.pack(linear, scales, zeros, None, device="cpu")
        if shuffled:
            layer.g_idx = layer.g_idx[torch.randperm(COLUMNS)]
        weight = layer(torch.eye(COLUMNS, dtype=torch.float16)).T
    return {**layer.state_dict(), "weight": weight}


def main(folder: Path) -> None:
    from auto_round import AutoRound

    from tiny_mllama import make_checkpoint

    torch.manual_seed(0)
    tensors = {f"{case}.{part}": tensor for case in CASES for part, tensor in layer_of(case).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "layers.safetensors")
    source = str(make_checkpoint(folder / "source", kv_heads=4))
    gc.freeze()  # auto-round collects garbage after each layer: most of the time, with all that it imports
    options = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu", "enable_torch_compile": False}
    rounded = AutoRound(source, bits=4, group_size=32, sym=False, **options)
    rounded.quantize_and_save(output_dir=str(folder / "saved"), format="auto_gptq")
    next((folder / "saved").rglob("config.json")).parent.rename(folder / "gptq")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
