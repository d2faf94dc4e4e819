"""Images of a folder, and hashes of their contents."""

import fnmatch
import hashlib
import logging
import os
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from ov_mllama.runtime.errors import InputError, NotFoundError
from ov_mllama.runtime.images import SUFFIXES

logger = logging.getLogger(__name__)

# folders of thumbnails, resource forks and deleted files that a NAS or a system adds; most others are hidden
SYSTEM_FOLDERS = ("@eadir", "@recycle", "#recycle", "$recycle.bin", "__macosx", "system volume information")


def check_folder(folder: Path | None) -> Path:
    """Return the folder of images, absolute.

    Raises:
        InputError: if none is given, or it is a file.
        NotFoundError: if it does not exist.
    """
    if folder is None:
        raise InputError("No folder of images is given: name one, with make as PICTURES=folder.")
    if folder.is_file():
        raise InputError(f"{folder} is a file: give its folder, and --include '{folder.name}' for this image alone.")
    if not folder.is_dir():
        raise NotFoundError(f"{folder} does not exist: check the path of the folder of images.")
    return folder.resolve()


def find_images(
    folder: Path, recursive: bool = True, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[Path]:
    """Return the images of a folder by file suffix, sorted. Hidden files, among them macOS' resource forks, and
    SYSTEM_FOLDERS are left out. Links are followed; each folder is read once, so links in a circle end.

    Args:
        include, exclude: patterns of names, or of paths within the folder, such as "*.jpg" and "drafts".
    Raises:
        NotFoundError: if there are none.
    """
    found: list[Path] = []
    broken, seen, links = [], set(), [str(folder)]
    while links:  # after all real folders, whose paths go before those through a link
        for root, folders, names in os.walk(links.pop(0), onerror=warn_of_unread):
            if (real := os.path.realpath(root)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if recursive and not is_system(name))
            links += [str(link) for name in folders if (link := Path(root, name)).is_symlink()]
            images = [Path(root, name) for name in names if Path(name).suffix.lower() in SUFFIXES]
            for path in images:
                if is_system(path.name) or not is_selected(path.relative_to(folder), include, exclude):
                    continue
                (found if path.is_file() else broken).append(path)
    if broken:
        logger.warning("❗ %d links lead nowhere, or are no files, such as %s", len(broken), broken[0])
    if not found:
        selected = " that --include and --exclude leave" if include or exclude else ""
        raise NotFoundError(f"{folder} holds no images{selected} ({', '.join(sorted(SUFFIXES))}): check the path.")
    return sorted(found)


def warn_of_unread(error: OSError) -> None:
    """Log a folder that cannot be read."""
    logger.warning("❗ %s is left out: %s", error.filename, error.strerror)


def is_system(name: str) -> bool:
    """Return whether a file or folder is hidden, or added by a system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def is_selected(path: Path, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether patterns, in which case does not count, select a path within the folder, by its name, its path, or
    those of a folder that it is in."""
    names = {*path.parts, *(each.as_posix() for each in (path, *path.parents))}

    def matches(patterns: Iterable[str]) -> bool:
        lowered = [pattern.lower().removeprefix("./").rstrip("/") for pattern in patterns]
        return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in lowered for name in names)

    return (not include or matches(include)) and not matches(exclude)


def select(paths: list[Path], limit: int | None, shuffle: bool) -> list[Path]:
    """Return the first `limit` images, or as many random ones, the same each time."""
    if shuffle:
        paths = random.Random(0).sample(paths, len(paths))  # noqa: S311
    return paths[:limit]


def content_id(path: Path) -> str:
    """Return the SHA-256 of a file; if it cannot be read, of its path, marked as such."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return f"unread {hashlib.sha256(os.fsencode(path)).hexdigest()}"


def by_content(paths: list[Path]) -> dict[str, list[Path]]:
    """Return the paths of each different content by its `content_id`, in the paths' order."""
    files: dict[str, list[Path]] = {}
    with ThreadPoolExecutor(4) as pool:  # hashing releases Python's lock
        ids = tqdm(pool.map(content_id, paths), desc="Reading", total=len(paths), unit="image", leave=False)
        for key, path in zip(ids, paths, strict=True):
            files.setdefault(key, []).append(path)
    return files


def printable(text: object) -> str:
    """Return a path or an argument as valid UTF-8: on Linux they are arbitrary bytes."""
    return os.fsencode(str(text)).decode(errors="replace")
