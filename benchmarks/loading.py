"""Where loading a language model spends its time, and what would shorten it: python -m benchmarks.loading DIR FILE.xml

For each way, in a process of its own: seconds to read and compile, seconds of the first inference, in which the CPU
plugin repacks compressed weights, and the CPU seconds that it burns meanwhile on all cores.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoConfig

from ov_mllama.runtime.ir import ir_stamp
from ov_mllama.runtime.language import OVLanguageModel
from ov_mllama.runtime.shapes import MllamaShapes


def load(path: Path, ov_config: dict) -> dict[str, float]:
    """Seconds, of one cold load in this process."""
    shapes = MllamaShapes.from_config(AutoConfig.from_pretrained(path.parent))
    started = time.perf_counter()
    model = OVLanguageModel(path, shapes, "CPU", ov_config, ir_stamp(path))
    model.compiled.create_infer_request()
    compiled, before = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    first = model.warm_up()
    after, again = resource.getrusage(resource.RUSAGE_SELF), model.warm_up()
    burnt = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"compile_s": compiled, "first_s": first, "first_cpu_s": burnt, "second_s": again}


def main() -> None:
    """The command line; with `--config` it is the process that loads once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("file", nargs="+", help="language models of the folder")
    parser.add_argument("--config", type=json.loads, help="OpenVINO properties, as JSON: one load, its figures as JSON")
    options = parser.parse_args()
    if options.config is not None:
        print(json.dumps(load(options.model_dir / options.file[0], options.config)))
        return
    for file in options.file:
        with tempfile.TemporaryDirectory(dir=options.model_dir) as cache:
            ways = {
                "as it is": {},
                "model cache, written": {"CACHE_DIR": cache},
                "model cache, read": {"CACHE_DIR": cache},
                "one thread": {"INFERENCE_NUM_THREADS": 1},
            }
            for name, config in ways.items():
                arguments = [str(options.model_dir), file, "--config", json.dumps(config)]
                command = [sys.executable, "-m", "benchmarks.loading", *arguments]
                done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
                figures = json.loads(done.stdout.splitlines()[-1])
                print(f"{file}, {name}:", {key: round(value, 1) for key, value in figures.items()}, flush=True)


if __name__ == "__main__":
    main()
