"""The source of a checkpoint: its files, and how they are read. `find.py` finds it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ov_mllama.export.sources.tensors import Tensor
from ov_mllama.runtime.reference import Reference


@dataclass(frozen=True)
class Source:
    """A checkpoint's files and how they are read.

    Attributes:
        kind: for people, such as "16-bit safetensors" or "bitsandbytes nf4".
        config: as transformers reads it, of the unquantised model; None of an adapter.
        settings: files that say how the weights are meant: config.json, adapter_config.json.
        weights: files of weights.
        tensors: return all tensors by stored names, in 16 bit when they are read.
        adapter: the adapter_config.json of a LoRA adapter, whose base is another source; empty for a model.
        quantized: whether any are stored in fewer bits.
        reference: that the weights were trained with, if the kind tells.
        save_settings: write config, tokenizer and templates into a folder, where the weights' files hold them; None
            where they are beside the weights.
        form: name of the weights' format for an IR that takes all of them over, such as "q4_k_m".
    """

    kind: str
    config: Any
    settings: list[Path]
    weights: list[Path]
    tensors: Callable[[], dict[str, Tensor]]
    adapter: dict[str, Any] = field(default_factory=dict)
    quantized: bool = False
    reference: Reference | None = None
    save_settings: Callable[[Path], None] | None = None
    form: str = ""
