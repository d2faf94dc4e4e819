"""Captions of all images of a folder.

Ray Data distributes the images among processes that load the model once; `--address` names a Ray cluster, whose
machines see the same folders and have this project installed. Each batch becomes one file in the folder `--out`,
written atomically, so a run that was killed can be resumed. `pandas.read_parquet("captions.parquet")` reads all rows:

    id: SHA-256 of the image file; files with equal content are one row
    path: the first file with it; bytes of its name that are not UTF-8 become U+FFFD
    question, answer
    finish: "stop", or "length" if the token limit was reached
    error: why there is no answer: not an image, or results that are not finite
    model: name of the model's folder; language_model, vision_encoder: stamps of its IRs; max_new_tokens: token limit

With another model or IR all images are captioned again, and with a higher token limit those whose answers reached the
lower one; the new answers are added as rows.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from tqdm.auto import tqdm

from ov_mllama.chat.proxies import bypass_proxy_for_loopback
from ov_mllama.cli import user_path
from ov_mllama.export.prepare import files_to_load, print_load_estimate
from ov_mllama.runtime.errors import InputError, NumericalError, TemplateError
from ov_mllama.runtime.generation import end_tokens
from ov_mllama.runtime.images import SUFFIXES, open_picture
from ov_mllama.runtime.ir import check_model_dir, exclusive_lock
from ov_mllama.runtime.prompts import prompts_about
from ov_mllama.serving import load, positive
from ov_mllama.serving.arguments import add_checkpoint_arguments, prepared

logger = logging.getLogger(__name__)

COLUMNS = ("id", "path", "question", "answer", "finish", "error", "model", "language_model", "vision_encoder")
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.\d+")  # name of a file of results while it is written
SCHEMA = pa.schema([*((name, pa.string()) for name in COLUMNS), ("max_new_tokens", pa.int64())])


class Captioner:
    """Worker that captions batches of images; each process has one.

    Args:
        model_dir: folder of a converted model.
        question: about each image.
        out: folder of the results.
        max_new_tokens: token limit of each answer.
        threads: of this process; None for all.
    """

    def __init__(self, model_dir: str, question: str, out: str, max_new_tokens: int, threads: int | None):
        # each image is used once: no cache
        self.model, self.processor = load(Path(model_dir), threads=threads, image_cache_bytes=0)
        self.question, self.out, self.max_new_tokens = question, Path(out), max_new_tokens
        self.columns: dict = dict.fromkeys(COLUMNS) | {"question": question, "max_new_tokens": max_new_tokens}
        self.columns |= identity(Path(model_dir))

    def __call__(self, batch: dict) -> dict:
        """Caption a batch and write its file of results.

        Args:
            batch: columns "id" and "path" (bytes).
        Returns:
            columns "id", "skipped" (why a row was not written, else "") and "fatal" (why no more can be, else "").
        """
        rows, samples = [], []
        skipped: dict[str, str] = {}
        for key, path in zip(batch["id"], map(os.fsdecode, batch["path"]), strict=True):
            row = self.columns | {"id": str(key), "path": printable(path)}
            try:
                Path(path).open("rb").close()
                samples.append({"image": open_picture(path), "question": self.question, "row": row})
            except (OSError, MemoryError) as error:  # another run may find the file, or more memory
                reason = getattr(error.__cause__ or error, "strerror", None) or "too little memory"
                skipped[row["id"]] = f"{row['path']} cannot be read ({reason})."
            except InputError as error:
                row["error"] = printable(str(error))
            rows.append(row)
        fatal = ""
        try:
            skipped |= self.answer(samples)
            write([row for row in rows if row["id"] not in skipped], self.out)
        except TemplateError as error:  # as for any other image
            fatal = str(error)
        except OSError as error:  # a full disk: later answers would be lost
            fatal = f"{self.out} cannot be written to: {error}"
        reasons = [skipped.get(row["id"], "") for row in rows]
        return {"id": batch["id"], "skipped": reasons, "fatal": [fatal] * len(rows)}

    def answer(self, samples: list[dict]) -> dict[str, str]:
        """Fill in the rows of images: in one batch, or one by one if that needs too much memory or one image gives
        results that are not finite. Returns why images were skipped, by id: too little memory even for one."""
        try:
            answers = self.answers(samples) if samples else []
        except (MemoryError, NumericalError) as error:
            if len(samples) > 1:
                return {key: reason for sample in samples for key, reason in self.answer([sample]).items()}
            row = samples[0]["row"]
            if isinstance(error, MemoryError):  # another run may find more
                return {row["id"]: str(error)}
            row["error"] = str(error)
            return {}
        for sample, (answer, finish) in zip(samples, answers, strict=True):
            sample["row"] |= {"answer": answer, "finish": finish}
        return {}

    def answers(self, samples: list[dict]) -> list[tuple[str, str]]:
        """Return answers and finish reasons of a batch."""
        inputs = prompts_about(self.processor, samples)
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        rows, ends = output[:, inputs["input_ids"].shape[1] :].tolist(), {*end_tokens(self.model.generation_config)}
        texts = self.processor.batch_decode(rows, skip_special_tokens=True)
        return [(text, "length" if ends.isdisjoint(row) else "stop") for text, row in zip(texts, rows, strict=True)]


def write(rows: list[dict], out: Path) -> None:
    """Write a file of results, if there are any. Its name is a hash of images, question and model."""
    if not rows:
        return
    keys = ("id", "question", "language_model", "vision_encoder", "max_new_tokens")
    content = json.dumps([[row.get(key) for key in keys] for row in rows])
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    write_table(pa.Table.from_pylist(rows, SCHEMA), out / f"{name}.parquet")


def write_table(table: pa.Table, path: Path) -> None:
    """Write a file of results atomically."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}")  # readers of the folder ignore hidden files
    pq.write_table(table, temporary)
    temporary.replace(path)


def identity(model_dir: Path) -> dict[str, str]:
    """Return the columns that identify a model: name of its folder, and stamps of the IRs that are loaded.

    Raises:
        NotFoundError, InputError: see `check_model_dir`.
    """
    language, vision = files_to_load(model_dir)
    stamps = check_model_dir(model_dir, (language, vision))
    texts = [" ".join(f"{key}={value}" for key, value in sorted(stamps[name].items())) for name in (language, vision)]
    return {"model": model_dir.resolve().name, "language_model": texts[0], "vision_encoder": texts[1]}


def printable(path: str) -> str:
    """Return a path as valid UTF-8: on Linux names are arbitrary bytes."""
    return os.fsencode(path).decode(errors="replace")


def unique(paths: list[Path]) -> dict[str, bytes]:
    """Return the first path of each different image by id, a hash of its content; of its path if it cannot be read."""

    def hash_file(row: dict) -> dict:  # local, so pickled by value: Ray's processes need not import PyTorch
        try:
            with open(row["path"], "rb") as file:  # noqa: PTH123 - bytes
                return {"id": hashlib.file_digest(file, "sha256").hexdigest(), "path": row["path"]}
        except OSError:
            return {"id": f"unread {hashlib.sha256(row['path']).hexdigest()}", "path": row["path"]}

    hashed = ray.data.from_items([{"path": os.fsencode(path)} for path in paths]).map(hash_file).iter_rows()
    first: dict[str, bytes] = {}
    for row in tqdm(hashed, desc="Reading", total=len(paths), unit="image", leave=False):
        first[row["id"]] = min(row["path"], first.get(row["id"], row["path"]))
    return dict(sorted(first.items(), key=lambda item: item[1]))


def threads_per_worker(workers: int, threads: int | None) -> int | None:
    """Return the threads of each worker: `threads`, or its share of the cores; None (all) for a single one.

    Raises:
        InputError: if no machine has as many cores, as Ray would wait for one.
    """
    limit = int(max(node["Resources"].get("CPU", 0) for node in ray.nodes()))
    if threads and threads > limit:
        raise InputError(f"No machine here has {threads} cores for a process, only {limit}: give fewer --threads.")
    return threads or (max(1, int(ray.cluster_resources()["CPU"]) // workers) if workers > 1 else None)


def find_images(folder: Path) -> list[Path]:
    """Return the images of a folder and its subfolders, by file suffix, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def finished_ids(out: Path, question: str, settings: dict | None = None) -> set[str]:
    """Return the ids of images that have an answer already. Files of earlier versions get the columns that they lack.

    Args:
        settings: columns of `identity`, and "max_new_tokens"; None for any.
    Raises:
        InputError: if the folder holds other Parquet files.
    """
    done: set[str] = set()
    for part in out.glob("*.parquet"):
        try:
            table = pq.read_table(part, partitioning=None)
        except pa.ArrowException as error:
            raise InputError(f"{part} is not a file of captions: move it away, or choose another folder.") from error
        if not {"id", "question", "answer"} <= {*table.column_names}:
            raise InputError(f"{part} is not a file of captions: move it away, or choose another folder.")
        missing = [field for field in SCHEMA if field.name not in table.column_names]
        for field in missing:  # readers of the folder take the columns from any of its files
            table = table.append_column(field, pa.nulls(len(table), field.type))
        if missing:
            write_table(table, part)
        rows = table.select(SCHEMA.names).to_pylist()
        done |= {row["id"] for row in rows if row["question"] == question and (not settings or is_final(row, settings))}
    return done


def is_final(row: dict, settings: dict) -> bool:
    """Return whether a row is of the same IRs, and did not reach a token limit lower than the current one."""
    same = all(row[name] == settings[name] for name in ("language_model", "vision_encoder"))
    return same and (row["finish"] != "length" or row["max_new_tokens"] >= settings["max_new_tokens"])


def caption(
    images: str | Path,
    question: str,
    out: str | Path,
    model_dir: str | Path,
    max_new_tokens: int = 128,
    batch: int = 4,
    workers: int = 1,
    threads: int | None = None,
) -> int:
    """Caption every image that this model has not captioned yet, on Ray, and return their number.

    Args:
        images: folder.
        question: about each image.
        out: folder of the results, .parquet.
        model_dir: folder of a converted model.
        max_new_tokens: token limit; answers that reached a lower one are generated again.
        batch: images that share the model's steps.
        workers: processes that load the model.
        threads: of each worker; None for its share of the cluster's cores.
    Raises:
        FileNotFoundError: if there are no images.
        InputError: if the folder of the results holds other files, or no machine has as many cores.
        OSError: if images were skipped for lack of memory or could not be read (all others are captioned), or the
            results cannot be written.
    """
    folder, out = Path(images).resolve(), Path(out).resolve()
    found = find_images(folder)
    if not found:
        raise FileNotFoundError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}).")
    threads = threads_per_worker(workers, threads)
    with exclusive_lock(out):
        for part in out.glob(".*"):  # of a run that was killed
            if TEMPORARY.fullmatch(part.name):
                part.unlink()
        settings = identity(Path(model_dir)) | {"max_new_tokens": max_new_tokens}
        done, first = finished_ids(out, question, settings), unique(found)
        todo = [{"id": key, "path": path} for key, path in first.items() if key not in done]
        if not todo:
            return 0
        data = ray.data.from_items(todo, override_num_blocks=-(-len(todo) // batch))
        results = data.map_batches(
            Captioner,
            fn_constructor_args=(str(Path(model_dir).resolve()), question, str(out), max_new_tokens, threads),
            batch_size=None,  # one block of the above
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads or 1,
        )
        skipped: list[str] = []
        with refreshing(tqdm(total=len(first), initial=len(first) - len(todo), unit="image", desc="Captions")) as bar:
            for rows in results.iter_batches(batch_size=None, prefetch_batches=0):
                if rows["fatal"][0]:
                    raise OSError(rows["fatal"][0])
                bar.update(len(rows["id"]))
                skipped += [reason for reason in rows["skipped"] if reason]
    if skipped:
        raise OSError(f"{len(skipped)} of {len(todo)} images were skipped: run the command again. {skipped[0]}")
    return len(todo)


@contextlib.contextmanager
def refreshing(bar: tqdm) -> Iterator[tqdm]:
    """Refresh a progress bar's clock each second: a batch on the 11B takes more than a minute."""
    done = threading.Event()

    def refresh() -> None:
        while sys.stderr.isatty() and not done.wait(1):
            bar.refresh()

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    try:
        with bar:
            yield bar
    finally:
        done.set()
        thread.join()


def main(arguments: Sequence[str]) -> None:
    """Run the command `caption`.

    Args:
        arguments: those after the command's name.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("ov-mllama caption", description=__doc__, formatter_class=raw)
    parser.add_argument("images", type=user_path, metavar="FOLDER", help="folder of images, with its subfolders")
    parser.add_argument("--question", default="Describe this image.", help="default: 'Describe this image.'")
    parser.add_argument("--out", type=user_path, default=Path("captions.parquet"), help="default: captions.parquet")
    add_checkpoint_arguments(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="token limit; default: 128")
    parser.add_argument("--batch", type=positive, default=4, help="images that share the model's steps; default: 4")
    parser.add_argument("--workers", type=positive, default=1, help="processes that load the model; default: 1")
    parser.add_argument("--threads", type=positive, help="of each worker; default: its share of the cores")
    parser.add_argument("--address", help="of a Ray cluster; default: this machine only")
    options = parser.parse_args(arguments)
    model_dir = prepared(options)
    print_load_estimate(model_dir, "CPU", *files_to_load(model_dir))
    init_ray(options.address)
    limits = {name: getattr(options, name) for name in ("max_new_tokens", "batch", "workers", "threads")}
    count = caption(options.images, options.question, options.out, model_dir, **limits)
    logger.info("✅ %d images captioned, all results are in %s", count, options.out)


def init_ray(address: str | None = None) -> None:
    """Start Ray on this machine, or join a cluster, with little output."""
    bypass_proxy_for_loopback()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # read when ray.data is first used
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # or warnings about actors' arguments are logged as errors
    ray.data.DataContext.get_current().enable_progress_bars = False
    local = {} if address else {"include_dashboard": False, "object_store_memory": 200_000_000}
    ray.init(address=address, log_to_driver=False, logging_level="error", **local)
    if address and ray.available_resources().get("CPU", 0) < 1:
        logger.info("⌛ No core of the cluster is free (each replica of a server takes one): waiting for one")
