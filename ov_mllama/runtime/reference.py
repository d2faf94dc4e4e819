"""Two conventions of Mllama: Meta's reference code, on which the weights were trained, and today's transformers.

They differ in two things, measured in docs/upstream.md. Which one a checkpoint was made for follows from the version of
transformers that wrote its config.json: Meta's own says 4.45.0.dev0.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple


class Reference(NamedTuple):
    """A convention; as `_asdict` part of an IR's stamp.

    Attributes:
        vision_layers: states of the vision layers `intermediate_layers_indices` that the projector reads, their
            "inputs" or their "outputs".
        row_mask: "on": cross-attention layers leave tokens that see no image alone; "off": they skip the MLP only.
    """

    vision_layers: str
    row_mask: str

    @classmethod
    def of(cls, stamp: dict[str, str]) -> "Reference":
        """That of an IR's stamp.

        Raises:
            KeyError: the stamp is a draft model's, which follows none.
        """
        return cls(*(stamp[key] for key in cls._fields))


META = Reference("inputs", "on")  # llama-models 0.3.0, and the checkpoints on the hub
BEFORE_4_55 = Reference("inputs", "off")  # transformers 4.45 to 4.54
TRANSFORMERS = Reference("outputs", "off")  # transformers since 4.55.3
NAMES = {"meta": META, "transformers": TRANSFORMERS}


def reference_of(source: Path, name: str = "auto") -> tuple[Reference, str]:
    """The convention to convert a checkpoint in, and why, for people.

    Args:
        source: folder of the checkpoint, whose config.json says which transformers wrote it.
        name: "meta", "transformers", or "auto": Meta's for 4.45.0.dev0; the layers' inputs for other versions before
            4.55; else transformers'. Meta's weights saved again by a later version need "meta".
    Raises:
        ValueError: another name.
    """
    if name in NAMES:
        return NAMES[name], "as asked for"
    if name != "auto":
        raise ValueError(f"reference='{name}' is none of auto, {', '.join(NAMES)}.")
    version = json.loads((source / "config.json").read_text(encoding="utf-8")).get("transformers_version")
    why = f"config.json was written by transformers {version}" if version else "config.json names no transformers"
    if version == "4.45.0.dev0":
        return META, why
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    if numbers and tuple(map(int, numbers.groups())) < (4, 55):
        return BEFORE_4_55, why
    return TRANSFORMERS, why


def described(reference: Reference) -> str:
    """A convention in words, such as "Meta's: the projector reads inputs of vision layers, ..."."""
    whose = {META: "Meta's", TRANSFORMERS: "transformers'"}.get(reference, "transformers' before 4.55")
    alone = "are left alone" if reference.row_mask == "on" else "attend to every tile"
    return f"{whose}, the projector reads {reference.vision_layers} of vision layers, tokens before an image {alone}"
