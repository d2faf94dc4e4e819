"""A check of Ollama's files against what is known of the real ones, for those who have them: the project never had."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.convert import convert_mllama
from ov_mllama.export.quality import caption_log_probs
from ov_mllama.export.settings import own_name
from ov_mllama.export.sources.gguf import GgufFile, read_gguf
from ov_mllama.export.sources.gguf_names import tensors_of
from ov_mllama.export.sources.model_id import is_gguf
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME
from ov_mllama.runtime.memory import trim_memory

# Of the 11B that Ollama serves, from dumps that people published (ollama#10730, danbev/learning-ai)
TENSORS = 908  # of one file; of two together 396 + 512
DIGESTS = ("9999d473417a", "11f274007f09", "ece5e659647a")  # SHA-256 of the one file, and of the two before
GATES = {"blk.3.cross_attn_attn_gate": 0.000545501708984375, "blk.3.cross_attn_mlp_gate": 0.006256103515625}

Row = tuple[str, str, str, str]  # what is compared, the expected value, the found one, "equal" or "different"


def compare_header(name: str) -> list[Row]:
    """Return what the headers and the first gates of a model's files are, beside what is known of the 11B's.

    Args:
        name: as for `Checkpoint`.
    Raises:
        InputError: if it is no model in GGUF, or not the 11B.
    """
    if not is_gguf(name):
        raise InputError(f"{name} is no model in GGUF: give ollama:NAME or the path of a .gguf file.")
    return list(rows_of([read_gguf(path) for path in Checkpoint(name).source.weights]))


def rows_of(files: list[GgufFile]) -> Iterator[Row]:
    """Yield the rows of `compare_header`."""
    count = sum(len(file.tensors) for file in files)
    yield "tensors", str(TENSORS), str(count), verdict(count == TENSORS)
    for number, file in enumerate(files, 1):
        with file.path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()[:12]
        expected = DIGESTS[0] if len(files) == 1 else DIGESTS[number]
        yield f"SHA-256, {file.path.stat().st_size / 1e9:.3f} GB", expected, digest, verdict(digest == expected)
    stored = {name: tensor for file in files for name, tensor in file.tensors.items()}
    for name, value in GATES.items():
        if name not in stored:
            raise InputError(f"{name} is missing: only the 11B's files can be checked.")
        found = stored[name].data.reshape(-1).view(np.float32)[0]
        yield name, f"{value:.9g}", f"{found:.9g}", verdict(found == np.float32(value))


def verdict(equal: bool) -> str:
    """Return a word on a comparison."""
    return "equal" if equal else "different"


def compare_orders(name: str, folder: Path, samples: list[dict]) -> list[tuple[str, ...]]:
    """Return each caption and the mean log-probabilities of its tokens, in nats: with the rows of the cross-attention's
    projections put back from llama.cpp's order, as the program does, and with these rows as they are stored.

    Args:
        name: of the model, as for `Checkpoint`.
        folder: for the IRs of both, in a folder each, which stay there.
        samples: {"image", "question", "caption"}, such as `samples.calibration_samples`.
    """
    results = []
    for undone in (True, False):
        checkpoint = Checkpoint(name)
        files = [read_gguf(path) for path in checkpoint.source.weights]
        read = partial(tensors_of, files, checkpoint.config, reordered_cross=undone)
        checkpoint.source = replace(checkpoint.source, tensors=read)
        model_dir = convert_mllama(checkpoint, folder / ("put-back" if undone else "as-stored"))
        form = checkpoint.own_form
        results.append(caption_log_probs(model_dir, own_name(form) if form else LANGUAGE_MODEL_NAME, samples))
        trim_memory()
    captions = [sample["caption"][:40] for sample in samples]
    return [(caption, *(f"{value:.4f}" for value in pair)) for caption, *pair in zip(captions, *results, strict=True)]
