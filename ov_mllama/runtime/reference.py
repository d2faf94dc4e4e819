"""Two conventions of Mllama: Meta's reference code, on which the weights were trained, and today's transformers.

docs/upstream.md measures their two differences. The version of transformers in a checkpoint's config.json tells which
one it was made for: Meta's own have 4.45.0.dev0.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from .errors import InputError


class Reference(NamedTuple):
    """A convention; as `_asdict` part of an IR's stamp.

    Attributes:
        vision_layers: states of the vision layers `intermediate_layers_indices` that the projector reads, their
            "inputs" or their "outputs".
        row_mask: "on": cross-attention layers skip tokens that see no image; "off": only the MLP does.
    """

    vision_layers: str
    row_mask: str

    @classmethod
    def of(cls, stamp: dict[str, str]) -> "Reference":
        """Return the reference in an IR's stamp; KeyError for a draft model's, which follows none."""
        return cls(*(stamp[key] for key in cls._fields))


META = Reference("inputs", "on")  # llama-models 0.3.0, and the checkpoints on the hub
BEFORE_4_55 = Reference("inputs", "off")  # transformers 4.45 to 4.54
TRANSFORMERS = Reference("outputs", "off")  # transformers since 4.55.3
NAMES = {"meta": META, "transformers": TRANSFORMERS}


def reference_of(source: Path, name: str = "auto") -> tuple[Reference, str]:
    """Return the reference to convert a checkpoint with, and the reason, for display.

    Args:
        source: folder of the checkpoint.
        name: "meta", "transformers", or "auto": Meta's for version 4.45.0.dev0; the layers' inputs for others before
            4.55; else transformers'. Meta's weights saved again by a later version need "meta".
    Raises:
        InputError: for another name.
    """
    if name in NAMES:
        return NAMES[name], "as given"
    if name != "auto":
        raise InputError(f"reference='{name}' is unknown: choose one of auto, {', '.join(NAMES)}.")
    version = json.loads((source / "config.json").read_text(encoding="utf-8")).get("transformers_version")
    why = f"config.json was written by transformers {version}" if version else "config.json names no transformers"
    if version == "4.45.0.dev0":
        return META, why
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    if numbers and tuple(map(int, numbers.groups())) < (4, 55):
        return BEFORE_4_55, why
    return TRANSFORMERS, why


def described(reference: Reference) -> str:
    """Describe a reference in words, such as "Meta's: the projector reads inputs of vision layers, ..."."""
    whose = {META: "Meta's", TRANSFORMERS: "transformers'"}.get(reference, "transformers' before 4.55")
    text = "are left alone" if reference.row_mask == "on" else "attend to every tile"
    return f"{whose}, the projector reads {reference.vision_layers} of vision layers, tokens before an image {text}"
