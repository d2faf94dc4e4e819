"""Seconds and memory of each notebook cell, executed headless: python -m benchmarks.notebook

Seconds and, sampled twice a second, anonymous memory of the kernel and whatever it starts. Mapped files are not in it:
the system drops their pages when memory is short.
"""

import argparse
import json
import threading
import time
from datetime import datetime
from pathlib import Path

import nbformat
import psutil

from benchmarks.benchmark import anonymous, provenance
from notebook_utils import execute
from ov_mllama.runtime.memory import free_memory

NOTEBOOK = "mllama-3.2.ipynb"


class Sampler(threading.Thread):
    """Thread that samples the anonymous memory of this process's descendants, GB, until told to stop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float]] = []
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(0.5):
            processes = psutil.Process().children(recursive=True)
            self.samples.append((time.time(), sum(anonymous(process.pid) for process in processes)))

    def peak(self, start: float, end: float) -> float:
        """Return the peak between two times, with the samples just around them."""
        return max((size for at, size in self.samples if start - 0.5 <= at <= end + 0.5), default=0.0)


def cells(notebook, sampler: Sampler) -> list[dict]:
    """Return a row for each code cell: its heading, last line, seconds, peak in GB."""
    rows, heading = [], ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings = [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")]
            heading = headings[-1] if headings else heading
        elif "execution" in cell.metadata:
            times = cell.metadata["execution"]
            start, end = (
                datetime.fromisoformat(times[name].replace("Z", "+00:00")).timestamp()
                for name in ("iopub.execute_input", "shell.execute_reply")
            )
            line = cell.source.splitlines()[-1].strip()
            peak = round(sampler.peak(start, end), 2)
            rows.append({"under": heading, "cell": line, "seconds": round(end - start, 1), "peak_anon_gb": peak})
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder for the executed copy")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    sampler, started, free = Sampler(), time.time(), free_memory()
    sampler.start()
    path = execute(NOTEBOOK, options.out, timed=True, MODEL_ID=str(options.checkpoint))
    sampler.done.set()
    rows = cells(nbformat.read(path, as_version=4), sampler)
    result = {
        **provenance("benchmarks.notebook"),
        "free_memory_gb": round(free / 1e9, 1),
        "minutes": round((time.time() - started) / 60, 1),
        "peak_anon_gb": max(row["peak_anon_gb"] for row in rows),
        "cells": [row for row in rows if row["seconds"] >= 1],
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
