"""A question about every picture of a folder: python -m ov_mllama.serving.caption PICTURES [--question ...]

Ray Data shares the pictures out among processes that load the model once; `--address` names a Ray cluster, whose
machines see the same folders and have this project installed. Each batch becomes a file in the folder `--out`, whole or
not at all, so a run that was killed goes on where it was. `pandas.read_parquet("captions.parquet")` reads all; columns:

    id: the picture's content (SHA-256), one row for each model, however often and under whatever name it is there
    path: the first file with it; what is no UTF-8 in its name is "\ufffd"
    question; answer; finish: "stop", or "length" where the limit has cut it
    error: why there is no answer, of what cannot be opened or gives nothing finite
    model: name of the model's folder; language_model, vision_encoder: the stamps of the two IRs that answered
    max_new_tokens: the answer's limit

Another model, another of its IRs, or for answers that a limit has cut a higher one, asks again and adds rows.
"""

import argparse
import contextlib
import hashlib
import json
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
from ov_mllama.export.prepare import default_folder, files_to_load, prepare, print_load_estimate
from ov_mllama.runtime.images import SUFFIXES, open_picture
from ov_mllama.runtime.ir import check_model_dir, exclusive_lock
from ov_mllama.runtime.reference import NAMES
from ov_mllama.serving import load, positive

COLUMNS = ("id", "path", "question", "answer", "finish", "error", "model", "language_model", "vision_encoder")
PART = re.compile(r"\.[0-9a-f]{32}\.\d+")  # a file of results while it is written
SCHEMA = pa.schema([*((name, pa.string()) for name in COLUMNS), ("max_new_tokens", pa.int64())])


class Captioner:
    """Answers a question about batches of pictures; each process has one.

    Args:
        model_dir: of the converted model.
        question: about each picture.
        out: folder of the results.
        max_new_tokens: the answers' limit.
        threads: of this process, None for all.
    """

    def __init__(self, model_dir: str, question: str, out: str, max_new_tokens: int, threads: int | None):
        # each picture is asked about once: none is kept
        self.model, self.processor = load(Path(model_dir), threads=threads, image_cache_bytes=0)
        self.question, self.out, self.max_new_tokens = question, Path(out), max_new_tokens
        self.asked = identity(Path(model_dir)) | {"max_new_tokens": max_new_tokens}

    def __call__(self, batch: dict) -> dict:
        """Rows "id" and "path" (bytes) -> a file of results; the ids, "left": why one is not in it, else "", and "end":
        why there can be no more files, else ""."""
        rows, samples = [], []
        left: dict[str, str] = {}
        for key, path in zip(batch["id"], map(os.fsdecode, batch["path"]), strict=True):
            row: dict = (
                dict.fromkeys(COLUMNS) | {"id": str(key), "path": shown(path), "question": self.question} | self.asked
            )
            try:
                Path(path).open("rb").close()
                samples.append({"image": open_picture(path), "question": self.question, "row": row})
            except (OSError, MemoryError) as error:  # another time it may be there, or more memory
                reason = getattr(error.__cause__ or error, "strerror", None) or "too little memory"
                left[row["id"]] = f"{row['path']} cannot be read ({reason})."
            except ValueError as error:
                row["error"] = shown(str(error))
            rows.append(row)
        left |= self.answer(samples)
        end = ""
        try:
            write([row for row in rows if row["id"] not in left], self.out)
        except OSError as error:  # a full disk: what follows would be answered for nothing
            end = f"{self.out} cannot be written to: {error}"
        return {"id": batch["id"], "left": [left.get(row["id"], "") for row in rows], "end": [end] * len(rows)}

    def answer(self, samples: list[dict]) -> dict[str, str]:
        """Fills in the rows of pictures: all in one batch, or one by one where that finds no memory or has a picture
        for which the model computes nothing finite. Returns ids of those that find none even alone, and why."""
        try:
            answers = self.answers(samples) if samples else []
        except (MemoryError, FloatingPointError) as error:
            if len(samples) > 1:
                return {key: why for sample in samples for key, why in self.answer([sample]).items()}
            row = samples[0]["row"]
            if isinstance(error, MemoryError):  # another time there may be more
                return {row["id"]: str(error)}
            row["error"] = str(error)
            return {}
        for sample, (answer, finish) in zip(samples, answers, strict=True):
            sample["row"] |= {"answer": answer, "finish": finish}
        return {}

    def answers(self, samples: list[dict]) -> list[tuple[str, str]]:
        """Answers, and why they end, of pictures and questions in one batch."""
        from ov_mllama.runtime.prompts import prompts_about

        inputs = prompts_about(self.processor, samples)
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        ends = self.model.generation_config.eos_token_id
        answers = []
        for tokens in output[:, inputs["input_ids"].shape[1] :].tolist():
            whole = any(token in tokens for token in ([ends] if isinstance(ends, int) else ends))
            answers.append((self.processor.decode(tokens, skip_special_tokens=True), "stop" if whole else "length"))
        return answers


def write(rows: list[dict], out: Path) -> None:
    """A file of results, if there are any, named after pictures, question and model: again it is the same one."""
    if not rows:
        return
    keys = ("id", "question", "language_model", "vision_encoder", "max_new_tokens")
    content = json.dumps([[row.get(key) for key in keys] for row in rows])
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    replace(pa.Table.from_pylist(rows, SCHEMA), out / f"{name}.parquet")


def replace(table: pa.Table, path: Path) -> None:
    """Writes a file of results, whole or not at all."""
    part = path.with_name(f".{path.stem}.{os.getpid()}")  # readers of the folder leave hidden files out
    pq.write_table(table, part)
    part.replace(path)


def identity(model_dir: Path) -> dict[str, str]:
    """The columns that tell which model answers: name of its folder, and the stamps of the IRs that are loaded.

    Raises:
        FileNotFoundError, ValueError: as `check_model_dir`.
    """
    language, vision = files_to_load(model_dir)
    stamps = check_model_dir(model_dir, (language, vision))
    texts = [" ".join(f"{key}={value}" for key, value in sorted(stamps[name].items())) for name in (language, vision)]
    return {"model": model_dir.resolve().name, "language_model": texts[0], "vision_encoder": texts[1]}


def shown(path: str) -> str:
    """A path as text that can be written: on Linux, names are bytes, and old ones no UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def digest(row: dict) -> dict:
    """A file's content as "id" beside its "path"; one of its own if it cannot be read."""
    try:
        with open(row["path"], "rb") as file:  # noqa: PTH123 - bytes
            return {"id": hashlib.file_digest(file, "sha256").hexdigest(), "path": row["path"]}
    except OSError:
        return {"id": f"unread {hashlib.sha256(row['path']).hexdigest()}", "path": row["path"]}


def different(paths: list[Path]) -> dict[str, bytes]:
    """Ids of the pictures, and of each the first path."""
    read = ray.data.from_items([{"path": os.fsencode(path)} for path in paths]).map(digest).iter_rows()
    first: dict[str, bytes] = {}
    for row in tqdm(read, desc="Reading", total=len(paths), unit="picture", leave=False):
        first[row["id"]] = min(row["path"], first.get(row["id"], row["path"]))
    return dict(sorted(first.items(), key=lambda item: item[1]))


def threads_of(workers: int, threads: int | None) -> int | None:
    """Threads of each worker: its share of the cores; None, all of them, for one alone.

    Raises:
        ValueError: no machine has as many, and Ray would wait for one.
    """
    most = int(max(node["Resources"].get("CPU", 0) for node in ray.nodes()))
    if threads and threads > most:
        raise ValueError(f"No machine here has {threads} cores for a process, only {most}.")
    return threads or (max(1, int(ray.cluster_resources()["CPU"]) // workers) if workers > 1 else None)


def pictures_in(folder: Path) -> list[Path]:
    """All pictures of a folder and those within it, by their names, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def answered(out: Path, question: str, asked: dict | None = None) -> set[str]:
    """Ids of the pictures that have been asked already. Files of an earlier version get the columns that they lack.

    Args:
        asked: columns of `identity`, and "max_new_tokens"; None for any model.
    Raises:
        ValueError: there is something else in the folder.
    """
    done: set[str] = set()
    for part in out.glob("*.parquet"):
        try:
            table = pq.read_table(part, partitioning=None)
        except pa.ArrowException as error:
            raise ValueError(f"{part} is no file of captions: move it away, or choose another folder.") from error
        if not {"id", "question", "answer"} <= {*table.column_names}:
            raise ValueError(f"{part} is no file of captions: move it away, or choose another folder.")
        lacking = [field for field in SCHEMA if field.name not in table.column_names]
        for field in lacking:  # a reader of the folder takes its columns from any of its files
            table = table.append_column(field, pa.nulls(len(table), field.type))
        if lacking:
            replace(table, part)
        rows = table.select(SCHEMA.names).to_pylist()
        done |= {row["id"] for row in rows if row["question"] == question and (not asked or settles(row, asked))}
    return done


def settles(row: dict, asked: dict) -> bool:
    """Whether a row is by the IRs that would be asked, and not cut by a lower limit than theirs."""
    same = all(row[name] == asked[name] for name in ("language_model", "vision_encoder"))
    return same and (row["finish"] != "length" or row["max_new_tokens"] >= asked["max_new_tokens"])


def caption(
    pictures: str | Path,
    question: str,
    out: str | Path,
    model_dir: str | Path,
    max_new_tokens: int = 128,
    batch: int = 4,
    workers: int = 1,
    threads: int | None = None,
) -> int:
    """Asks about every picture that this model has not been asked about yet, on Ray, and returns how many those were.

    Args:
        pictures: folder.
        question: about each.
        out: folder of the results, .parquet.
        model_dir: folder of a converted model.
        max_new_tokens: the answers' limit; those that a lower one has cut are asked again.
        batch: pictures that share the model's steps.
        workers: processes that load the model.
        threads: of each; None: its share of the cluster's cores.
    Raises:
        FileNotFoundError: there are no pictures.
        ValueError: the folder of the results holds something else, or no machine has so many cores.
        OSError: some pictures found no memory or could not be read, all others have been asked about; or the results
            cannot be written.
    """
    folder, out = Path(pictures).resolve(), Path(out).resolve()
    found = pictures_in(folder)
    if not found:
        raise FileNotFoundError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    threads = threads_of(workers, threads)
    with exclusive_lock(out):
        for part in out.glob(".*"):  # of a run that was killed
            if PART.fullmatch(part.name):
                part.unlink()
        asked_now = identity(Path(model_dir)) | {"max_new_tokens": max_new_tokens}
        done, first = answered(out, question, asked_now), different(found)
        todo = [{"id": key, "path": path} for key, path in first.items() if key not in done]
        if not todo:
            return 0
        data = ray.data.from_items(todo, override_num_blocks=-(-len(todo) // batch))
        asked = data.map_batches(
            Captioner,
            fn_constructor_args=(str(Path(model_dir).resolve()), question, str(out), max_new_tokens, threads),
            batch_size=None,  # a block of the above, as it is
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads or 1,
        )
        left: list[str] = []
        with ticking(tqdm(total=len(first), initial=len(first) - len(todo), unit="picture", desc="Asking")) as bar:
            for rows in asked.iter_batches(batch_size=None, prefetch_batches=0):
                if rows["end"][0]:
                    raise OSError(rows["end"][0])
                bar.update(len(rows["id"]))
                left += [why for why in rows["left"] if why]
    if left:
        raise OSError(f"{len(left)} of {len(todo)} pictures are left for another run. {left[0]}")
    return len(todo)


@contextlib.contextmanager
def ticking(bar: tqdm) -> Iterator[tqdm]:
    """A bar whose clock goes on where nothing else does: a batch of the 11B's takes more than a minute."""
    over = threading.Event()

    def tick() -> None:
        while sys.stderr.isatty() and not over.wait(1):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        with bar:
            yield bar
    finally:
        over.set()
        thread.join()


AsWritten = argparse.RawDescriptionHelpFormatter


def main(arguments: Sequence[str]) -> None:
    """The command line.

    Args:
        arguments: those after the command's name.
    """
    parser = argparse.ArgumentParser("ov-mllama caption", description=__doc__, formatter_class=AsWritten)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--question", default="Describe this image.")
    parser.add_argument("--out", type=Path, default=Path("captions.parquet"))
    parser.add_argument("--checkpoint", default="demo_model", help="hub id or folder, prepared first if need be")
    parser.add_argument("--reference", default="auto", choices=("auto", *NAMES), help="as for ov_mllama prepare")
    parser.add_argument("--model-dir", type=Path, help="folder of a converted model; default: models/<its name>")
    parser.add_argument("--max-new-tokens", type=positive, default=128)
    parser.add_argument("--batch", type=positive, default=4, help="pictures that share the model's steps")
    parser.add_argument("--workers", type=positive, default=1, help="processes that load the model")
    parser.add_argument("--threads", type=positive, help="of each of them; default: its share of the cores")
    parser.add_argument("--address", help="of a Ray cluster; default: this machine alone")
    options = parser.parse_args(arguments)
    folder = default_folder(options.checkpoint)
    model_dir = options.model_dir or prepare(options.checkpoint, folder, reference=options.reference)
    print_load_estimate(model_dir, "CPU", *files_to_load(model_dir))
    begin(options.address)
    asked = caption(
        options.pictures,
        options.question,
        options.out,
        model_dir,
        options.max_new_tokens,
        options.batch,
        options.workers,
        options.threads,
    )
    print(f"✅ {asked} pictures asked about, all in {options.out}")


def begin(address: str | None = None) -> None:
    """Ray, quietly: on this machine, or joined to a cluster."""
    bypass_proxy_for_loopback()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # read once, when ray.data is first used
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # or an actor with arguments is warned of as an error
    ray.data.DataContext.get_current().enable_progress_bars = False
    here = {} if address else {"include_dashboard": False, "object_store_memory": 200_000_000}
    ray.init(address=address, log_to_driver=False, logging_level="error", **here)
    if address and ray.available_resources().get("CPU", 0) < 1:
        print("⌛ No core of the cluster is free (a server's replicas have one each): waiting for one", flush=True)
