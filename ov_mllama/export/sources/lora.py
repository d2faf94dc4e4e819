"""LoRA adapters, as peft saves them, merged into their base's weights when these are read.

A matrix W [out, in] becomes W + scaling * (B @ A), of an embedding W + scaling * (B @ A)^T; tensors without "lora_" in
their names replace the base's (modules_to_save, biases). As peft 0.21.2 merges an adapter that it loads: A and B in
float32 (cast_adapter_dtype), the sum rounded to the type of W (Linear.merge), of an embedding the summand first too
(Embedding.merge). fan_in_fan_out means nothing for the linear layers that these models have.
"""

import json
import math
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ov_mllama.export.sources.files import ADAPTER_FIX, INDEX, WEIGHTS, hint
from ov_mllama.export.sources.names import TensorNames, unwrapped
from ov_mllama.export.sources.tensors import Tensor
from ov_mllama.runtime.errors import InputError

CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PAIR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(?!weight$)[^.]+)?(?:\.weight)?")
SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")  # in names that were saved without peft
QUANTISED = re.compile(r"(-unsloth)?-bnb-4bit$")
CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)")  # a hub repository's folder in a cache
# variants of LoRA by their setting, and ways to begin that change the base's weights
VARIANTS = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "velora_config", "lora_bias"),
    *("monteclora_config", "kasa_config", "layer_replication", "target_parameters", "trainable_token_indices"),
)
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
CHUNK_ELEMENTS = 1 << 24  # of a matrix merged at a time, in float32
ALPHA_LIMIT = 1e30
ROWS = 16  # a chunk's rows are a multiple of: a product of fewer may be rounded otherwise than as part of the whole


@dataclass
class Pair:
    """The two factors of one matrix's change.

    Attributes:
        module: the layer's stored name.
        embedding: whether the layer is an embedding, whose factors are transposed.
        factors: A [rank, in] and B [out, rank] by "A" and "B".
    """

    module: str
    embedding: bool
    factors: dict[str, Tensor]


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, and no complete model."""
    model = any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    alone = any(folder.glob("adapter_model.*")) or not (folder / "config.json").is_file()
    return (folder / CONFIG).is_file() and alone and not model


def adapter_settings(folder: Path) -> dict:
    """Return a folder's adapter_config.json.

    Raises:
        InputError: if it is invalid, or of an adapter that is not read.
    """
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, variants = settings.get("peft_type"), [name for name in VARIANTS if settings.get(name)]
        for name in ("rank_pattern", "alpha_pattern"):
            _ = [re.compile(pattern) for pattern, _ in (settings.get(name) or {}).items()]
    except (ValueError, AttributeError, RecursionError, re.error) as error:
        raise InputError(f"{folder / CONFIG} is no adapter's config{hint(folder / CONFIG)}") from error
    problem = f"{variants[0]}: {settings[variants[0]]}" if variants else ""
    problem = f"peft_type {kind}" if kind != "LORA" else problem
    if not problem and settings.get("init_lora_weights") not in BEGINNINGS:
        problem = f"init_lora_weights: {settings['init_lora_weights']}, which changes the base's weights too"
    if problem:
        raise InputError(f"{folder} is an adapter that is not merged here ({problem}): {ADAPTER_FIX}")
    return settings


def adapter_files(folder: Path) -> list[Path]:
    """Return the file of an adapter's weights; none if it is not there.

    Raises:
        InputError: if there is only a pickled one.
    """
    if (folder / ADAPTER_WEIGHTS).is_file():
        return [folder / ADAPTER_WEIGHTS]
    if (folder / "adapter_model.bin").is_file():
        raise InputError(
            f"{folder} holds a pickled adapter_model.bin, which is not loaded: load the adapter with peft and save it "
            "again with save_pretrained."
        )
    return []


def base_names(settings: dict, folder: Path) -> list[str]:
    """Return folders and hub ids that the base may be found under, likeliest first: of a quantised base its 16-bit
    original comes first."""
    name = str(settings.get("base_model_name_or_path") or "").rstrip("/\\")
    cached = CACHED.search(name)
    names = [name] if name else []
    names += [f"{cached[1]}/{cached[2]}"] if cached else []
    names = [each for name in names for each in dict.fromkeys((QUANTISED.sub("", name), name))]
    return [str(folder / name) if (folder / name).is_dir() else name for name in names]


def merge(
    base: dict[str, Tensor], adapter: dict[str, Tensor], settings: dict, names: TensorNames, label: object
) -> dict[str, Tensor]:
    """Return a base's tensors with an adapter merged into them when they are read.

    Args:
        base: by the model's names.
        adapter: by stored names.
        settings: its adapter_config.json.
        names: of the model.
        label: of the adapter, for errors.
    Raises:
        InputError: for tensors that have no place, no partner, or that do not fit their place.
    """
    pairs, merged, lost = {}, dict(base), []
    for stored, tensor in adapter.items():
        name = SAVED.sub("", unwrapped(stored))
        found = PAIR.fullmatch(name)
        place = names.of(f"{found[1]}.weight" if found else name)
        if place not in base or ("lora_" in name and not found):
            lost.append(stored)
        elif found:
            pair = pairs.setdefault(place, Pair(found[1], bool(found[2]), {}))
            check(found[3] not in pair.factors, label, f"{stored} is there twice, under the names of two adapters")
            pair.factors[found[3]] = tensor
        else:
            merged[place] = replacement(base[place], tensor, stored, label)
    check(
        not lost, label, f"{len(lost)} of {len(adapter)} tensors have no place in its base, such as {(lost or [''])[0]}"
    )
    check(bool(adapter), label, "it holds no tensors")
    for place, pair in pairs.items():
        merged[place] = changed(merged[place], pair, place, settings, label)
    return merged


def check(holds: bool, label: object, problem: str) -> None:
    """Raise an InputError about an adapter unless a condition holds."""
    if not holds:
        raise InputError(
            f"{label} is no adapter that can be merged here: {problem}; give another base, or {ADAPTER_FIX}"
        )


def replacement(base: Tensor, saved: Tensor, stored: str, label: object) -> Tensor:
    """Return a tensor of the adapter in place of the base's, in the base's type."""
    problem = f"{stored} is {list(saved.shape)} instead of {list(base.shape)}"
    resized = len(saved.shape) == len(base.shape) == 2 and saved.shape[1] == base.shape[1]
    check(saved.shape == base.shape, label, problem + ", a vocabulary that was resized" * resized)
    if saved.dtype == base.dtype:
        return saved
    return Tensor(base.shape, base.dtype, lambda: saved.read().to(base.dtype))


def changed(base: Tensor, pair: Pair, place: str, settings: dict, label: object) -> Tensor:
    """Return a matrix of the base with the pair merged into it when it is read."""
    absent = [f"lora_{side}" for side in "AB" if side not in pair.factors]
    check(not absent, label, f"{pair.module} has no {' and no '.join(absent)}")
    a, b = pair.factors["A"], pair.factors["B"]
    factors = f"lora_A {list(a.shape)} and lora_B {list(b.shape)} of {pair.module}"
    check(
        len(a.shape) == len(b.shape) == len(base.shape) == 2, label, f"{factors} are no matrices, as of a convolution"
    )
    product = (b.shape[0], a.shape[1])
    fits = a.shape[0] == b.shape[1] and (product[::-1] if pair.embedding else product) == base.shape
    check(fits, label, f"{factors} do not fit {list(base.shape)}")
    modules = (place.removesuffix(".weight"), pair.module)
    rank = of_pattern(settings.get("rank_pattern"), modules, settings.get("r"))
    check(a.shape[0] == rank != 0, label, f"{factors} do not have the rank {rank} of {CONFIG}")
    alpha = of_pattern(settings.get("alpha_pattern"), modules, settings.get("lora_alpha"))
    check(isinstance(alpha, int | float) and abs(alpha) < ALPHA_LIMIT, label, f"its lora_alpha is {alpha}, no number")
    scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return Tensor(base.shape, base.dtype, partial(read_merged, base, pair, scaling))


def of_pattern(patterns: dict | None, modules: tuple[str, ...], default):
    """Return the value of the first pattern that matches the end of a module's name, as peft's `get_pattern_key`.

    Args:
        patterns: values by regular expression.
        modules: the module's names, in today's transformers and as stored.
    """
    for module in modules:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
    return default


def read_merged(base: Tensor, pair: Pair, scaling: float) -> torch.Tensor:
    """Return a matrix of the base with a pair merged into it, some rows at a time."""
    merged = base.read().clone() if base.mapped else base.read()
    a, b = (pair.factors[side].read().float() for side in "AB")
    rows = max(ROWS, CHUNK_ELEMENTS // merged.shape[1] // ROWS * ROWS)
    for start in range(0, len(merged), rows):
        some = slice(start, start + rows)
        if pair.embedding:
            merged[some] += (b @ a[:, some]).T.mul_(scaling).to(merged.dtype)
        else:
            merged[some] += (b[some] @ a).mul_(scaling)
    return merged


def overlay(adapter: Path, base: Path, folder: Path) -> None:
    """Copy a base's settings, tokenizer and templates into a folder, and an adapter's own in their places.

    The base's config stays, its golden answer is left out, and so are its chat templates if the adapter has one.

    Raises:
        InputError: if the adapter's tokenizer_config.json cannot be read.
    """
    own = {path.name: path for path in texts(adapter) if path.name != "config.json"}
    template = {}
    if "tokenizer_config.json" in own:
        path = own["tokenizer_config.json"]
        try:
            template = json.loads(path.read_text(encoding="utf-8")).get("chat_template") or {}
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: download it again, or remove it for the base's.") from error
    its_own = bool(template) or any(name.startswith("chat_template.") for name in own)
    for path in texts(base):
        if not path.name.startswith("golden.") and not (its_own and path.name.startswith("chat_template.")):
            shutil.copy(path, folder)
    for path in own.values():
        shutil.copy(path, folder)
    if isinstance(template, str) and not any(folder.glob("chat_template.*")):  # else transformers' processor lacks it
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def texts(folder: Path) -> list[Path]:
    """Return a folder's files that may be settings, a tokenizer or a template."""
    files = [
        path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt")
    ]
    return [path for path in files if not path.name.endswith(".index.json")]
