"""Captions of all images of a folder, in a table or beside the images.

`--out` chooses the table by its ending: a folder of Parquet files, or one .csv, .jsonl or .json file. It has a row for
each image and question:

    id: SHA-256 of the image file; files with equal content are answered once, and each has its row
    path: of the image; bytes of its name that are not UTF-8 become U+FFFD
    question, answer
    finish: "stop", or "length" if the token limit was reached
    error: why there is no answer: not an image, or results that are not finite
    model: name of the model's folder; language_model, vision_encoder: stamps of its IRs
    max_new_tokens, system, detail, temperature, schema: options that the answer depends on
    remark: on how the image was read, such as the first of several frames

A run that was killed is completed by the next one. Files that were renamed or moved are recognized by their content and
get new rows with the same answers. With another model, IR or option all images are captioned again, and with a higher
token limit those whose answers reached the lower one; the new answers are added as rows.
"""

import contextlib
import importlib
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ov_mllama.chat.user_data import encoded_images
from ov_mllama.export.costs import duration
from ov_mllama.export.prepare import files_to_load, print_load_estimate
from ov_mllama.runtime.errors import DiskError, InputError
from ov_mllama.runtime.image_store import ImageStore
from ov_mllama.runtime.ir import check_model_dir
from ov_mllama.serving.arguments import prepared
from ov_mllama.serving.caption_answers import (
    Captioner,
    Settings,
    Task,
    answer_tasks,
    parse_schema_file,
    prompt_texts,
)
from ov_mllama.serving.caption_arguments import parser_of_command, questions_of, sidecars_of, store_megabytes
from ov_mllama.serving.caption_files import by_content, check_folder, find_images, printable, select
from ov_mllama.serving.caption_outputs import Output, opened, output_for
from ov_mllama.serving.caption_sidecars import Sidecars

logger = logging.getLogger(__name__)

DEFAULTS = {"detail": "high", "temperature": 0.0}  # of rows of earlier versions


def identity(model_dir: Path) -> dict[str, str]:
    """Return the columns that identify a model: name of its folder, and stamps of the IRs that are loaded.

    Raises:
        NotFoundError, InputError: see `check_model_dir`.
    """
    language, vision = files_to_load(model_dir)
    stamps = check_model_dir(model_dir, (language, vision))
    texts = [" ".join(f"{key}={value}" for key, value in sorted(stamps[name].items())) for name in (language, vision)]
    return {"model": model_dir.resolve().name, "language_model": texts[0], "vision_encoder": texts[1]}


def is_final(row: dict[str, Any], columns: dict[str, Any]) -> bool:
    """Return whether a row is of the same IRs and options, and did not reach a token limit lower than the current one.

    Args:
        columns: of `identity` and `Settings.columns`.
    """
    for name, value in columns.items():
        known = DEFAULTS.get(name) if row.get(name) is None else row[name]
        if name not in ("model", "max_new_tokens") and known != value:
            return False
    return row.get("finish") != "length" or (row.get("max_new_tokens") or 0) >= columns["max_new_tokens"]


class Table:
    """Rows of an output with the same model and options, and the sidecars of their images.

    Args:
        columns: those that all new rows share.
        files: paths of each content, see `by_content`.
    """

    def __init__(
        self, output: Output, columns: dict[str, Any], files: dict[str, list[Path]], sidecars: Sidecars | None
    ):
        self.output, self.columns, self.files, self.sidecars = output, columns, files, sidecars
        self.known: dict[tuple[str, str], dict[str | None, dict]] = {}  # rows by path, by content and question
        for row in output.read():
            if row["id"] in files and is_final(row, columns):
                self.known.setdefault((row["id"], row["question"]), {})[row.get("path")] = row

    def todo(self, questions: Sequence[str]) -> list[Task]:
        """Return the tasks without an answer. Files whose content has one get a row, such as moved ones."""
        tasks, moved = [], []
        for key, paths in self.files.items():
            for question in questions:
                rows = self.known.get((key, question))
                if rows is None:
                    tasks.append(Task(key, str(paths[0]), question))
                    continue
                row = next(iter(rows.values()))
                moved += [{**row, "path": name} for path in paths if (name := printable(path)) not in rows]
                self._write_sidecars(key, row)
        self._write(moved)
        return tasks

    def add(self, results: Iterable[tuple[Task, dict]]) -> list[str]:
        """Write the rows of results; return why some were skipped."""
        answers = [(task, result) for task, result in results if not result.get("skipped")]
        self._write(
            [
                self.columns | {"id": task.id, "path": printable(path), "question": task.question} | result
                for task, result in answers
                for path in self.files[task.id]
            ]
        )
        for task, result in answers:
            self._write_sidecars(task.id, result)
        return [result["skipped"] for _, result in results if result.get("skipped")]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        try:
            if rows:
                self.output.write(rows)
        except OSError as error:  # a full disk: later answers would be lost
            raise DiskError(error.errno, f"{self.output.path} cannot be written to: {error}") from error

    def _write_sidecars(self, key: str, result: dict[str, Any]) -> None:
        if self.sidecars:
            for path in self.files[key]:
                self.sidecars.write(path, result.get("answer"))


def caption(
    images: list[Path],
    settings: Settings,
    output: Output,
    model_dir: str | Path,
    sidecars: Sidecars | None = None,
    batch: int = 4,
    workers: int = 1,
    threads: int | None = None,
    on_ray: bool = False,
    image_store: ImageStore | None = None,
) -> int:
    """Caption every image that this model has not captioned yet with these settings; return the number of new answers.

    Args:
        images: from `find_images`.
        sidecars: written too.
        batch: answers that share the model's steps.
        workers: processes that load the model, on Ray.
        threads: of each worker; None for its share of the cores.
        on_ray: use Ray, see `caption_ray.init_ray`.
        image_store: as for `Captioner`.
    Raises:
        InputError: if the output holds something else, the model's template refuses the prompt, or no machine has as
            many cores.
        OSError: if images were skipped for lack of memory or could not be read (all others are captioned), or the
            results cannot be written.
    """
    model_dir = Path(model_dir).resolve()
    columns = identity(model_dir) | settings.columns()
    prompts = prompt_texts(model_dir, settings)
    with opened(output):
        table = Table(output, columns, by_content(images), sidecars)
        todo = table.todo(settings.questions)
        if not todo:
            return 0
        if on_ray:
            from ov_mllama.serving.caption_ray import answer_on_ray

            answers = answer_on_ray(model_dir, prompts, settings, todo, batch, workers, threads, image_store)
        else:
            answers = answer_tasks(Captioner(model_dir, prompts, settings, batch, threads, image_store), todo, batch)
        skipped: list[str] = []
        total = len(table.files) * len(settings.questions)
        with contextlib.closing(answers), progress_bar(total, total - len(todo)) as bar:
            for results in answers:
                skipped += table.add(results)
                bar.update(len(results))
                bar.set_postfix_str(f"{60 * (bar.n - bar.initial) / bar.format_dict['elapsed']:.1f}/min")
    if skipped:
        raise OSError(f"{len(skipped)} of {len(todo)} images were skipped: run the command again. {skipped[0]}")
    return len(todo)


@contextlib.contextmanager
def progress_bar(total: int, initial: int) -> Iterator[tqdm]:
    """Show a progress bar, whose clock is refreshed each second: a batch on the 11B takes more than a minute."""
    shape = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
    bar, done = tqdm(total=total, initial=initial, desc="Captions", bar_format=shape), threading.Event()

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
    options = parser_of_command(__doc__ or "").parse_args(arguments)
    # whatever is wrong with the arguments or the folder, before a model is made or loaded
    schema = parse_schema_file(options.schema) if options.schema else None
    chosen = {name: getattr(options, name) for name in ("detail", "max_new_tokens", "temperature")}
    settings = Settings(questions_of(options), printable(options.system), **chosen, schema=schema)
    sidecars, output = sidecars_of(options, len(settings.questions)), output_for(options.out)
    folder = check_folder(options.images)
    if output.path.resolve() == folder:
        raise InputError(f"--out is {folder}, the folder of the images: choose another one, such as captions.csv.")
    images = find_images(folder, options.recursive, options.include, options.exclude)
    images = select(images, options.limit, options.shuffle)
    if sidecars:
        images = sidecars.images_without(images)
        if not images:
            return
    on_ray = bool(options.address) or options.workers > 1
    for package, needed in (("ray", on_ray), ("llguidance", schema)):
        if needed:  # a missing one is named before the model is made
            importlib.import_module(package)
    model_dir = prepared(options)
    print_load_estimate(model_dir, "CPU", *files_to_load(model_dir))
    if on_ray:
        importlib.import_module("ov_mllama.serving.caption_ray").init_ray(options.address)
    started = time.perf_counter()
    work = {name: getattr(options, name) for name in ("batch", "workers", "threads")}
    store = encoded_images(store_megabytes(options.image_store_mb, len(images), model_dir))
    count = caption(images, settings, output, model_dir, sidecars, **work, on_ray=on_ray, image_store=store)
    took = duration(time.perf_counter() - started)
    logger.info("✅ %d answers in %s, all results are in %s", count, took, options.out)
