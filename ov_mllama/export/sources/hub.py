"""The Hugging Face hub: downloads, and previews, which show a checkpoint before its weights are downloaded."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import hf_hub_url, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.file_download import DryRunFileInfo
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx, tqdm

from ov_mllama.export.sources.files import HEADER_MAX_BYTES, INDEX, WEIGHTS, read_header
from ov_mllama.export.sources.model_id import OLLAMA
from ov_mllama.export.sources.ollama import find_model
from ov_mllama.runtime.errors import AccessError, DiskError, InputError, NotFoundError, UserError

DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "golden.*"]
IGNORE_PATTERNS = ["*/*"]  # of trainers' intermediate states, and other formats of the same weights
FIRST_BYTES = 1 << 16  # of a file; most headers end within
SMALL_TENSOR_BYTES = 4096  # integers up to here are previewed too: shapes and settings that quantisation stores
INTEGERS = ("U8", "I8", "I16", "I32", "I64")
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model"}
REQUESTS, TIMEOUT_S = 8, 30
LOCAL_FIX = re.compile(
    r"(run `git lfs pull` in \S+, or )?download (it|the file|the checkpoint)( again)?(,? completely)?"
)


@contextlib.contextmanager
def hub_errors(model_id: str) -> Iterator[None]:
    """Raise errors of the hub and of its cache as a user's.

    Raises:
        AccessError: a gated repository, without access for the token at hand.
        NotFoundError: no such repository, or no network to fetch it; as `check_not_ollamas`.
        DiskError: if the cache cannot be written.
    """
    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:
        raise AccessError(
            f"{model_id} is gated: accept its licence on https://huggingface.co/{model_id}, then log in with "
            "`huggingface_hub.login()` or set HF_TOKEN."
        ) from error
    except (RepositoryNotFoundError, ValueError) as error:  # ValueError: not of the form "owner/name"
        check_not_ollamas(model_id)
        raise NotFoundError(
            f"'{model_id}' is neither a folder here nor a repository on the Hugging Face hub; check the spelling, and "
            "for a private repository log in with `huggingface_hub.login()`."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise DiskError(
                number,
                f"{model_id} could not be written to {HF_HUB_CACHE} ({error.strerror}): free disk space, or set "
                "HF_HOME to a folder on another disk",
            ) from error
        check_not_ollamas(model_id)
        raise NotFoundError(
            f"{model_id} could not be fetched from the Hugging Face hub ({type(error).__name__}) and is not in the "
            "local cache; check the network, or give the folder of a checkpoint on this disk."
        ) from error


def check_not_ollamas(model_id: str) -> None:
    """Raise a NotFoundError if a name that the hub does not know is one of Ollama's models on this disk."""
    try:
        find_model(f"{OLLAMA}{model_id}")
    except UserError:
        return
    raise NotFoundError(f"'{model_id}' is a model of Ollama's here: write {OLLAMA}{model_id}.")


def download(model_id: str) -> Path:
    """Download a checkpoint, and return its folder in the hub's cache.

    Raises:
        AccessError, NotFoundError, DiskError: as `hub_errors`.
    """
    with hub_errors(model_id):
        return Path(snapshot_download(model_id, allow_patterns=DOWNLOAD_PATTERNS, ignore_patterns=IGNORE_PATTERNS))


def has_weights(folder: Path) -> bool:
    """Return whether all of a checkpoint's weights are in a folder: a download may have been interrupted."""
    index = folder / INDEX
    if not index.is_file():  # a single shard's index may still be missing
        return any("-of-" not in path.name for path in folder.glob("*.safetensors"))
    return not absent_shards(index, {path.name for path in folder.iterdir()})


def absent_shards(index: Path, names: set[str]) -> list[str]:
    """Return the files of an index that are not among `names`; none if it is not needed, or broken (`weight_files`
    refuses that)."""
    if WEIGHTS in names or not index.is_file():
        return []
    try:
        shards = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return []
    return sorted(shards - names)


# ---- Previews -------------------------------------------------------------------------------------------------------


def preview(model_id: str, scratch: Path) -> tuple[Path, int]:
    """Fetch a checkpoint's configs and the headers of its weights.

    Args:
        scratch: an empty folder for the preview.
    Returns:
        the folder and the bytes that `download` will fetch: the hub's cache and 0 if the weights are there; else
        `scratch` with the configs and, of each safetensors file, a stand-in of the same header and size, which takes no
        disk: its tensors can be listed and placed, but are zeros.
    Raises:
        AccessError, NotFoundError, DiskError: as `hub_errors`.
        InputError: if the repository lacks a tokenizer or a file that its index names, or for a broken header.
    """
    with hub_errors(model_id):
        configs = Path(
            snapshot_download(model_id, allow_patterns=["*.json"], ignore_patterns=[*IGNORE_PATTERNS, "tokenizer.json"])
        )
        if has_weights(configs):  # what is small may still be missing, as where transformers loaded the model alone
            small = [pattern for pattern in DOWNLOAD_PATTERNS if pattern != "*.safetensors"]
            return Path(snapshot_download(model_id, allow_patterns=small, ignore_patterns=IGNORE_PATTERNS)), 0
        listing = snapshot_download(
            model_id,
            allow_patterns=DOWNLOAD_PATTERNS,
            ignore_patterns=IGNORE_PATTERNS,
            dry_run=True,
            tqdm_class=SilentBar,
        )
    size = sum(file.file_size or 0 for file in listing if file.will_download)
    if not size:
        return configs, 0
    absent = absent_shards(configs / INDEX, {file.filename for file in listing})
    if absent:
        raise InputError(
            f"{model_id} on the hub lacks {len(absent)} of the files that its {INDEX} names, such as {absent[0]}: "
            "choose another repository."
        )
    if (configs / "config.json").is_file() and not {file.filename for file in listing} & TOKENIZER_FILES:
        raise InputError(
            f"{model_id} on the hub has no tokenizer (tokenizer.json or tokenizer.model): choose another repository."
        )
    for path in configs.glob("*.json"):
        shutil.copy(path, scratch)
    write_stand_ins(model_id, [file for file in listing if file.filename.endswith(".safetensors")], scratch)
    return scratch, size


class SilentBar(tqdm):
    """A progress bar that is not shown."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{**options, "disable": True})


def write_stand_ins(model_id: str, files: list[DryRunFileInfo], folder: Path) -> None:
    """Write stand-ins of safetensors files on the hub, with their headers and their small tensors of integers."""
    with hub_errors(model_id), ThreadPoolExecutor(REQUESTS) as pool:
        heads = list(pool.map(lambda file: head_of(model_id, file), files))
        for file, head in zip(files, heads, strict=True):
            with (folder / file.filename).open("wb") as stand_in:
                stand_in.write(head)
                stand_in.truncate(file.file_size)
        wanted = [(file, place) for file in files for place in small_tensors(folder / file.filename)]
        values = list(pool.map(lambda each: fetch_bytes(model_id, each[0], *each[1]), wanted))
        for (file, (start, _)), value in zip(wanted, values, strict=True):
            with (folder / file.filename).open("r+b") as stand_in:
                stand_in.seek(start)
                stand_in.write(value)


def head_of(model_id: str, file: DryRunFileInfo) -> bytes:
    """Return a safetensors file's first bytes up to the end of its header; of another file the first ones."""
    size = file.file_size or 0
    head = fetch_bytes(model_id, file, 0, min(size, FIRST_BYTES)) if size else b""
    end = 8 + int.from_bytes(head[:8], "little")
    if end > min(size, HEADER_MAX_BYTES):
        return head[:256]
    return head[:end] if end <= len(head) else head + fetch_bytes(model_id, file, len(head), end)


def small_tensors(path: Path) -> list[tuple[int, int]]:
    """Return the places in a safetensors file of small tensors of integers, as first byte and end."""
    text, tensors = read_header(path)
    places = []
    for tensor in tensors.values():
        start, end = tensor["data_offsets"]
        if tensor["dtype"] in INTEGERS and 0 <= start < end <= start + SMALL_TENSOR_BYTES:
            places.append((8 + len(text) + start, 8 + len(text) + end))
    return places


def fetch_bytes(model_id: str, file: DryRunFileInfo, start: int, end: int) -> bytes:
    """Fetch the bytes of a file on the hub from `start` up to, not including, `end`.

    Raises:
        NotFoundError: if the server sends the file instead.
    """
    url = hf_hub_url(model_id, file.filename, revision=file.commit_hash)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
        hf_raise_for_status(response)
        if response.status_code != 206 and (start, end) != (0, file.file_size):
            raise NotFoundError(
                f"{model_id} cannot be checked before it is downloaded, its server sends no parts of files: download "
                "it, and give its folder."
            )
        return response.read()


@contextlib.contextmanager
def as_on_the_hub(folder: Path, model_id: str) -> Iterator[None]:
    """Raise errors about a preview with its hub id instead of its folder, and another fix than to download it again."""
    try:
        yield
    except InputError as error:
        text = LOCAL_FIX.sub("choose another repository", str(error).replace(f"{folder}{os.sep}", f"{model_id}: "))
        raise InputError(text.replace(str(folder), model_id)) from error
