"""Quantised checkpoints: which file reads which method of `quantization_config`.

Each file has two functions: `describe(quantization)` returns a phrase for people, or refuses what it does not read by
config alone; `decode(tensors, quantization)` returns the tensors in 16 bit by the names of the unquantised checkpoint.
"""

from collections.abc import Callable
from typing import NamedTuple

from ov_mllama.export.sources import bitsandbytes, compressed_tensors, fp8, gptq, mlx
from ov_mllama.export.sources.files import FIX
from ov_mllama.export.sources.tensors import Tensor
from ov_mllama.runtime.errors import InputError

Tensors = dict[str, Tensor]


class Method(NamedTuple):
    """A method of quantisation.

    Attributes:
        describe: return a phrase such as "bitsandbytes nf4"; raises InputError for variants that are not read.
        decode: return the tensors dequantised when they are read.
    """

    describe: Callable[[dict], str]
    decode: Callable[[Tensors, dict], Tensors]


METHODS: dict[str, Method] = {  # by `quant_method`
    "bitsandbytes": Method(bitsandbytes.describe, bitsandbytes.decode),
    "compressed-tensors": Method(compressed_tensors.describe, compressed_tensors.decode),
    "fp8": Method(fp8.describe, fp8.decode),
    "fbgemm_fp8": Method(fp8.describe, fp8.decode),
    "gptq": Method(gptq.describe_gptq, gptq.decode_gptq),
    "awq": Method(gptq.describe_awq, gptq.decode_awq),
    "auto-round": Method(gptq.describe_auto_round, gptq.decode_auto_round),
    "intel/auto-round": Method(gptq.describe_auto_round, gptq.decode_auto_round),
    "mlx": Method(mlx.describe, mlx.decode),
}


def method_of(quantization: dict) -> Method:
    """Return the method of a checkpoint's `quantization_config`.

    Raises:
        InputError: for one that is not read.
    """
    older = "load_in_4bit" in quantization or "load_in_8bit" in quantization  # before `quant_method` was written
    name = str(quantization.get("quant_method") or ("bitsandbytes" if older else ""))
    if name not in METHODS:
        raise InputError(
            f"The checkpoint is quantised with '{name}', which is not read (only {', '.join(METHODS)}): {FIX}"
        )
    return METHODS[name]
