"""Writes mlx.safetensors with MLX 0.32.4 on a CPU, in an environment of its own, as MLX is no dependency:

    python -m venv mlx && mlx/bin/pip install mlx==0.32.4 mlx-cpu==0.32.4 && mlx/bin/python tests/export/mlx_fixture.py

A matrix has `weight`, `scales`, `biases` and what MLX dequantises them to, `expected`.
"""

from pathlib import Path

import mlx.core as mx

CASES = {  # bits, group size, type
    "bf16_4": (4, 64, mx.bfloat16),
    "bf16_4_small": (4, 32, mx.bfloat16),
    "bf16_8": (8, 64, mx.bfloat16),
    "f16_4": (4, 64, mx.float16),
    "f16_8": (8, 32, mx.float16),
    "f32_4": (4, 128, mx.float32),
}

mx.set_default_device(mx.cpu)
mx.random.seed(0)
tensors = {}
for name, (bits, size, dtype) in CASES.items():
    weight = mx.random.normal((8, 256)).astype(dtype)
    parts = mx.quantize(weight, group_size=size, bits=bits)
    tensors |= {f"{name}.{part}": tensor for part, tensor in zip(("weight", "scales", "biases"), parts, strict=True)}
    tensors[f"{name}.expected"] = mx.dequantize(*parts, group_size=size, bits=bits)
mx.save_safetensors(str(Path(__file__).with_name("mlx.safetensors")), tensors)
