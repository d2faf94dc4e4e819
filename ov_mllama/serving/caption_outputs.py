"""Tables of captions, as Parquet, CSV, JSON Lines or JSON, and text files beside the images.

Each is written so that a run that is killed loses no complete row: a Parquet folder gets a file for each batch, a CSV
or JSON Lines file rows at its end, and JSON is made of JSON Lines when the run ends.
"""

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.ir import exclusive_lock

logger = logging.getLogger(__name__)

TEXTS = ("id", "path", "question", "answer", "finish", "error", "model", "language_model", "vision_encoder")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in TEXTS),
        ("max_new_tokens", pa.int64()),
        ("system", pa.string()),
        ("detail", pa.string()),
        ("temperature", pa.float64()),
        ("schema", pa.string()),
        ("remark", pa.string()),
    ]
)
COLUMNS = SCHEMA.names
NEEDED = {"id", "question", "answer"}  # columns by which a table is recognized
FORMULA = re.compile(r"'*(?:[=+@\t\r]|-\S)")  # beginnings of cells that spreadsheets compute
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.\d+")  # name of a Parquet file while it is written


def not_captions(path: Path) -> InputError:
    """Return the error for a file that this project did not write."""
    return InputError(f"{path} is not a file of captions: move it away, or choose another --out.")


class ParquetFolder:
    """Folder of Parquet files, one for each batch, which `pandas.read_parquet` reads as one table."""

    def __init__(self, path: Path):
        self.path = path

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Return a lock against other processes."""
        return exclusive_lock(self.path)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield all rows. Files of earlier versions get the columns that they lack.

        Raises:
            InputError: if the folder holds other Parquet files.
        """
        for part in self.path.glob(".*"):  # of a run that was killed
            if TEMPORARY.fullmatch(part.name):
                part.unlink()
        for part in sorted(self.path.glob("*.parquet")):
            try:
                table = pq.read_table(part, partitioning=None)
            except pa.ArrowException as error:
                raise not_captions(part) from error
            if not {*table.column_names} >= NEEDED:
                raise not_captions(part)
            missing = [field for field in SCHEMA if field.name not in table.column_names]
            for field in missing:  # readers of the folder take the columns from any of its files
                table = table.append_column(field, pa.nulls(len(table), field.type))
            if missing:
                self._write_table(table, part)
            yield from table.select(COLUMNS).to_pylist()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write rows as a file, whose name is a hash of all but the answers."""
        keys = [name for name in COLUMNS if name not in ("answer", "finish", "error", "remark")]
        content = json.dumps([[row.get(key) for key in keys] for row in rows])
        name = hashlib.sha256(content.encode()).hexdigest()[:32]
        self._write_table(pa.Table.from_pylist(rows, SCHEMA), self.path / f"{name}.parquet")

    @staticmethod
    def _write_table(table: pa.Table, path: Path) -> None:
        temporary = path.with_name(f".{path.stem}.{os.getpid()}")  # readers of the folder ignore hidden files
        pq.write_table(table, temporary)
        temporary.replace(path)

    def close(self) -> None:
        """Do nothing: each file is complete."""


class JsonLinesFile:
    """File with one JSON object per line."""

    def __init__(self, path: Path):
        self.path = path

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold a lock against other processes, in a hidden file beside the output."""
        if self.path.is_dir():
            raise InputError(f"{self.path} is a folder of an earlier version: rename it to .parquet, or remove it.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("⌛ Waiting for another process to finish writing into %s", self.path)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield all rows. The end of a row that was not written completely is cut off.

        Raises:
            InputError: if the file holds something else.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            if not self._begins(file.readline()):
                raise not_captions(self.path)
        complete = self._complete_bytes()
        if complete < self.path.stat().st_size:
            os.truncate(self.path, complete)
        try:
            yield from self._parse()
        except (ValueError, csv.Error) as error:
            raise not_captions(self.path) from error

    def _begins(self, line: bytes) -> bool:
        """Return whether a line may be the first one of a file of captions, complete or not."""
        start = b'{"id": "'
        if not line.endswith(b"\n"):
            return start.startswith(line[: len(start)])
        try:
            return {*json.loads(line)} >= NEEDED
        except (ValueError, TypeError):
            return False

    def _complete_bytes(self) -> int:
        """Return the size of all complete rows."""
        with self.path.open("rb") as file:
            return sum(len(line) for line in file if line.endswith(b"\n"))

    def _parse(self) -> Iterator[dict[str, Any]]:
        with self.path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows, all or none."""
        ordered = [{name: row.get(name) for name in COLUMNS} for row in rows]
        self._append("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered))

    def _append(self, text: str) -> None:
        rest = memoryview(text.encode())
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:  # such as a full disk
                file.truncate(size)
                raise

    def close(self) -> None:
        """Do nothing: the file is complete."""


class CsvFile(JsonLinesFile):
    """CSV file with a header, for pandas and spreadsheets. Text in an image may make the model write a formula: an
    apostrophe before it has spreadsheets show it as text."""

    def _begins(self, line: bytes) -> bool:
        return (",".join(COLUMNS) + "\n").encode().startswith(line)

    def _complete_bytes(self) -> int:
        complete = size = quotes = 0
        with self.path.open("rb") as file:
            for line in file:
                size, quotes = size + len(line), quotes + line.count(b'"')
                if quotes % 2 == 0 and line.endswith(b"\n"):  # else within a quoted text of several lines
                    complete = size
        return complete

    def _parse(self) -> Iterator[dict[str, Any]]:
        with self.path.open(encoding="utf-8", newline="") as file:
            for cells in csv.DictReader(file):
                row = {name: from_text(cell) for name, cell in cells.items()}
                values: dict[str, Any] = {name: row.get(name) or None for name in COLUMNS}
                for name, kind in (("max_new_tokens", int), ("temperature", float)):
                    values[name] = None if values[name] is None else kind(float(values[name]))
                values["question"] = row["question"]  # may be empty
                if values["answer"] is None and values["error"] is None:
                    values["answer"] = ""
                yield values

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows, and the header to an empty file."""
        text = io.StringIO()
        # Python 3.11 leaves a carriage return alone unquoted, which readers take for the end of the row
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        if not self.path.exists() or not self.path.stat().st_size:
            text.write(",".join(COLUMNS) + "\n")
        writer.writerows({name: as_text(cell) for name, cell in row.items()} for row in rows)
        self._append(text.getvalue())


def as_text(cell: Any) -> Any:
    """Return a cell with an apostrophe before what a spreadsheet would compute."""
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def from_text(cell: str | None) -> str | None:
    """Return a cell without the apostrophe of `as_text`."""
    return cell[1:] if cell and cell[0] == "'" and FORMULA.match(cell, 1) else cell


class JsonFile(JsonLinesFile):
    """File with one JSON array. While a run adds rows, they are in a JSON Lines file beside it: to write the array for
    each batch would take ever longer."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.added = JsonLinesFile(path.with_suffix(".partial.jsonl"))

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield all rows, those of a run that was killed too."""
        rows = []
        if self.path.exists():
            try:
                rows = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise not_captions(self.path) from error
            is_ours = isinstance(rows, list) and all(isinstance(row, dict) and {*row} >= NEEDED for row in rows)
            if not is_ours:
                raise not_captions(self.path)
        yield from rows
        known = {json.dumps(row) for row in rows}  # killed within `close`, it may have rows twice
        yield from (row for row in self.added.read() if json.dumps(row) not in known)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to the JSON Lines file."""
        self.added.write(rows)

    def close(self) -> None:
        """Write the array with the rows that were added, atomically."""
        if self.added.path.exists():
            lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in self.read())
            write_text(self.path, f"[\n{lines}\n]\n")
            self.added.path.unlink()


Output = ParquetFolder | JsonLinesFile
FORMS: dict[str, type[ParquetFolder] | type[JsonLinesFile]] = {
    ".parquet": ParquetFolder,
    "": ParquetFolder,
    ".csv": CsvFile,
    ".jsonl": JsonLinesFile,
    ".json": JsonFile,
}


def output_for(path: Path) -> Output:
    """Return the output for a path, by its ending.

    Raises:
        InputError: for another ending.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMS and path.is_dir():  # as earlier versions wrote any
        return ParquetFolder(path)
    if suffix not in FORMS:
        raise InputError(f"{path.name} has an unknown ending: choose one of {', '.join(filter(None, FORMS))}.")
    return FORMS[suffix](path.absolute())


@contextlib.contextmanager
def opened(output: Output) -> Iterator[None]:
    """Lock an output within the block, and complete it afterwards, also after an error or Ctrl-C."""
    with output.lock(), contextlib.closing(output):
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]  # the name itself may be as long as one can be
    temporary = path.with_name(f".{digest}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
