"""What the formats of the language model's weights cost and lose: python -m benchmarks.formats --slice DIR

Quality is the demo checkpoint's on held-out questions, beside PyTorch in f32; time is a token's on a checkpoint of the
11B's widths (`benchmarks.make_checkpoint --text-layers 5 --vision-layers 4 --global-layers 1`), all formats in turn,
round after round. Keys of the JSON, for each format: all, kl (`quality.measure`); gb, what a token reads;
token_ms, the median; share, of the memory's speed; and by precision of the KV cache, what 2000 tokens in it take more.
"""

import argparse
import gc
import json
from pathlib import Path

import numpy as np
from transformers import AutoConfig

from benchmarks.benchmark import bandwidth, median, provenance, report, rounded
from demo_model.evaluate import heldout_samples
from ov_mllama.export import costs
from ov_mllama.export.compress import compress_language_model
from ov_mllama.export.convert import convert_mllama
from ov_mllama.export.quality import price_list
from ov_mllama.export.settings import INT4, Settings
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, ir_stamp
from ov_mllama.runtime.kv_cache import Prompt
from ov_mllama.runtime.language import OVLanguageModel
from ov_mllama.runtime.shapes import MllamaShapes

GROUPS = (32, 64, 128, -1)
FORMATS = {
    "16 bit": None,
    "INT8": Settings("int8_asym", group_size=-1),
    **{f"{algo}, groups of {size}": Settings(algo, group_size=size) for algo in INT4 for size in GROUPS},
    "int4_asym, groups of 64, embedding and head in INT4": Settings(group_size=64, all_layers=True),
}
DEMO, TOKENS, LONG = Path("demo_model"), 24, 2000


def make(checkpoint: Path, model_dir: Path) -> dict[str, str]:
    """File names of all formats, made where they are missing."""
    convert_mllama(checkpoint, model_dir)
    made = {name: compress_language_model(model_dir, settings).name for name, settings in FORMATS.items() if settings}
    return {"16 bit": LANGUAGE_MODEL_NAME, **made}


def token_ms(path: Path, shapes: MllamaShapes, prompt: int = 32, **ov_config) -> float:
    """Median milliseconds of a step of one token behind a prompt for text, the model being loaded for it alone."""
    session = OVLanguageModel(path, shapes, ov_config=ov_config, stamp=ir_stamp(path)).session()
    session.prefill(Prompt(np.arange(1000, 1000 + prompt)[None]))
    for token in range(TOKENS):
        session.decode(np.array([[2000 + token]]))
    taken = session.cache.stats.step_s[2:]
    del session
    gc.collect()
    return 1000 * float(np.median(taken))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice", type=Path, required=True, help="checkpoint of the 11B's widths")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    files, demo_dir = make(DEMO, Path("models/demo_model")), Path("models/demo_model")
    variants = {name: (file, VISION_ENCODER_NAME) for name, file in files.items()}
    rows = price_list(DEMO, demo_dir, variants, list(heldout_samples(options.questions)))
    quality = {row["variant"]: {key: row[key] for key in ("all", "kl")} for row in rows}
    print(json.dumps(rounded(quality)), flush=True)

    model_dir = options.slice.with_name(options.slice.name + "-ov")
    files, config = make(options.slice, model_dir), AutoConfig.from_pretrained(options.slice)
    shapes, speed = MllamaShapes.from_config(config), bandwidth()
    rounds: dict[str, list[float]] = {name: [] for name in files}
    long: dict[str, list[float]] = {precision: [] for precision in ("u8", "f16", "f32")}
    for _ in range(options.rounds):
        for name, file in files.items():
            rounds[name].append(token_ms(model_dir / file, shapes))
            print(f"{name}: {rounds[name][-1]:.1f} ms", flush=True)
        for precision, taken in long.items():
            taken.append(token_ms(model_dir / Settings().file_name, shapes, LONG, KV_CACHE_PRECISION=precision))
            print(f"KV cache {precision}: {taken[-1]:.1f} ms", flush=True)
    result = {**provenance("benchmarks.formats"), "bandwidth_gb_s": speed, "formats": {}}
    for name, file in files.items():
        in_8 = costs.INT8_BYTES_PER_WEIGHT * costs.weights(config).embedding  # one of its rows is read
        embedding = {"16 bit": 2 * costs.weights(config).embedding, list(FORMATS)[-1]: 0.55 * in_8}.get(name, in_8)
        size, taken = (model_dir / file).with_suffix(".bin").stat().st_size - embedding, median(rounds[name])
        share = size / 1e6 / taken / speed
        result["formats"][name] = {**quality[name], "gb": size / 1e9, "token_ms": taken, "share": share}
    default = result["formats"]["int4_asym, groups of 64"]["token_ms"]
    result["kv_cache_ms_behind_2000"] = {precision: median(taken) - default for precision, taken in long.items()}
    report(result, options.json)


if __name__ == "__main__":
    main()
