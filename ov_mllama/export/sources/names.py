"""Names: the place of each stored tensor in the model, by transformers' renaming rules and without tools' prefixes."""

import re

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ov_mllama.export.sources.files import ADAPTER_FIX
from ov_mllama.export.sources.tensors import Tensor
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.shapes import EXTRA_EMBEDDINGS

# buffers that older versions of transformers saved and newer ones compute
IGNORED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")
# what trainers add to the names of a model that they wrap
WRAPPERS = (
    *("base_model.model.", "base_layer.", "module.", "_orig_mod."),
    *("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."),
)


class TensorNames:
    """The names that a model has for the tensors of a checkpoint, by transformers' own renaming rules.

    Args:
        model: on the meta device.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.expected = model, model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def of(self, name: str) -> str | None:
        """Return the model's name for a checkpoint's tensor; None if it has none."""
        for renamings, converters in ((self.renamings, self.converters), ([], [])):
            place, _ = rename_source_key(name, renamings, converters, self.model.base_model_prefix, self.expected)
            if place in self.expected:
                return place
        return None

    def tied(self, name: str) -> set[str]:
        """Return the names that share a tensor with `name`."""
        pairs = getattr(self.model, "all_tied_weights_keys", {}).items()
        return {other for pair in pairs if name in pair for other in pair if other != name}


def unwrapped(name: str) -> str:
    """Return a tensor's name without what trainers add to it, in any mix."""
    for part in WRAPPERS:
        name = re.sub(rf"(^|\.){re.escape(part)}", r"\1", name)
    return name


def place(tensors: dict[str, Tensor], model: torch.nn.Module, label: object) -> dict[str, Tensor]:
    """Return the tensors by the model's names.

    Args:
        tensors: by stored names.
        model: on the meta device.
        label: of the checkpoint, for errors.
    Raises:
        InputError: for missing or unexpected tensors, two for one place, integers, or tensors of another shape than the
            model's, with numbers, names and the fix.
    """
    names = TensorNames(model)
    placed: dict[str, Tensor] = {}
    unexpected, reshaped, doubled, integers = [], [], [], []
    for name, tensor in tensors.items():
        where = names.of(unwrapped(name)) or names.of(name)
        if where is None:
            unexpected += [name] * (not IGNORED.search(name))
            continue
        doubled += [name] * (where in placed)
        integers += [f"{name} ({tensor.dtype})"] * (not tensor.dtype.is_floating_point)
        expected = tuple(names.expected[where].shape)
        placed[where] = tensor = with_all_rows(where, tensor, model)
        if tensor.shape != expected:
            reshaped.append(f"{name}: {list(tensor.shape)} instead of {list(expected)}")
    missing = [name for name in names.expected if name not in placed and not names.tied(name) & {*placed}]
    complaints = [
        f"{len(missing)} of {len(names.expected)} tensors are missing, such as {missing[0]}" if missing else "",
        f"{len(unexpected)} are unexpected, such as {unexpected[0]}" if unexpected else "",
        f"{len(reshaped)} have another shape, such as {reshaped[0]}" if reshaped else "",
        f"{len(doubled)} are there twice under different names, such as {doubled[0]}" if doubled else "",
        f"{len(integers)} are integers without scales, such as {integers[0]}" if integers else "",
    ]
    if any(complaints):
        raise InputError(f"{label}: {'; '.join(filter(None, complaints))}. To fix it, {fix_for(unexpected, names)}")
    return placed


def with_all_rows(name: str, tensor: Tensor, model: torch.nn.Module) -> Tensor:
    """Return a table of embeddings with the rows that transformers' `resize_token_embeddings` leaves out: for
    `vocab_size` tokens MllamaTextModel has EXTRA_EMBEDDINGS more, which then stand for no token. Other tensors stay."""
    config = model.config
    if not (name.endswith("embed_tokens.weight") and hasattr(config, "image_token_index") and len(tensor.shape) == 2):
        return tensor
    rows, vocabulary = tensor.shape[0], config.text_config.vocab_size
    if not max(vocabulary, config.image_token_index + 1) <= rows < vocabulary + EXTRA_EMBEDDINGS:
        return tensor
    missing = vocabulary + EXTRA_EMBEDDINGS - rows

    def read() -> torch.Tensor:
        stored = tensor.read()
        return torch.cat([stored, stored.new_zeros(missing, stored.shape[1])])

    return Tensor((rows + missing, tensor.shape[1]), tensor.dtype, read)


def fix_for(unexpected: list[str], names: TensorNames) -> str:
    """Return the fix for tensors of these names, which the model does not know."""
    if any("lora_" in name for name in unexpected):
        return ADAPTER_FIX
    for name in unexpected[:1]:
        for part in (name[: dot.end()] for dot in re.finditer(r"\.", name)):
            if names.of(name.removeprefix(part)):
                return f"remove '{part}' from the tensors' names."
    return "download it again, or save the whole model with transformers' save_pretrained, with its own config.json."
