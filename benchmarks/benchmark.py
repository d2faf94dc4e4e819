"""Time, memory and disk of this project beside PyTorch on one checkpoint. Prints a table and, as the last line, JSON.

    python -m benchmarks.benchmark --checkpoint DIR [--variants pytorch-bf16 fp16 int4-int8] [--json FILE]

Each variant lives in a process of its own and all are measured in turn, round after round, so that whatever else the
machine does hits all of them. Figures are medians of the rounds. Prompt and picture are the same for all.

Keys of the JSON (GB = 1e9 bytes):
    machine, versions; bandwidth_gb_s: best of several reads of 4 GB by all threads
    conversion: convert_s, compress_s, vision_int8_s (calibrated), vision_int8_weights_s, and the peak of each process's
        anonymous memory in peak_anon_gb
    variants, by name:
        load_s: until the model is there; first_infer_s: the first inference of the language model (repacks weights)
        vision_s: by number of tiles, one picture -> what the language model reads of it
        prefill_ms: PROMPT_TOKENS tokens with a picture of one tile; decode_ms: each token of --new-tokens after it
        decode_by_tiles_ms: the same with pictures of more tiles; 0 is text only, one row of K/V
        step_ms: by q, a step of q tokens, all of whose logits are asked for
        one_padding_tile: by tiles, vision_s over the same with every empty tile computed
        assisted: by number of drafts, tokens per second over greedy's where all are right and where all are wrong
        rss_gb, anon_gb: resident at the end, all and without mapped files; disk_gb: the files it was loaded from
        weights_gb_per_token: what a decode step has to read; share_of_bandwidth: that over decode_ms over bandwidth
        ratio: to pytorch-bf16, for vision_s, prefill_ms, decode_ms
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import openvino as ov
import psutil
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LogitsProcessor, LogitsProcessorList, MllamaForConditionalGeneration
from transformers.generation.candidate_generator import CandidateGenerator

from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.speculative import InVocabularyDrafts
from ov_mllama.runtime.vision import ImageInputs

PYTORCH = "pytorch-bf16"
INT4_NAME = "llm_int4_asym_r10_gs64.xml"
ROUNDED_NAME, CALIBRATED_NAME = "openvino_vision_encoder_int8_wc.xml", "openvino_vision_encoder_int8.xml"
VARIANTS = {
    PYTORCH: None,
    "fp16": (LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME),
    "int4": (INT4_NAME, VISION_ENCODER_NAME),
    "int4-int8": (INT4_NAME, CALIBRATED_NAME),
    "int4-int8-weights": (INT4_NAME, ROUNDED_NAME),
}
PROMPT_TOKENS = 32
STEPS = (1, 2, 4, 8, 16, 32)
DRAFTS = (3, 5, 7)
PICTURE = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
TILES = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2)}  # number of tiles: canvas, in tiles


# ---- Conversion, each step in a process of its own ------------------------------------------------------------------

CONVERT = (
    "from ov_mllama.export.convert import convert_mllama; "
    "convert_mllama({checkpoint!r}, {out!r}, language_model={fp16})"
)
COMPRESS = "from ov_mllama_compression import compress; compress({out!r}, checkpoint={checkpoint!r})"
ROUND = "from ov_mllama_compression import optimize_vision_encoder as make; make({out!r}, 'INT8 weights compression')"
CALIBRATE = (
    "from ov_mllama_compression import optimize_vision_encoder as make; "
    "make({out!r}, 'INT8 quantization', dataset_size={pictures}, source='demo_model/samples')"
)


def measured_process(code: str) -> tuple[float, float]:
    """Run Python code in a new process; return seconds and its peak anonymous memory in GB, sampled every 0.1 s.

    Mapped files are not in it: the system drops their pages when memory is short.

    Raises:
        subprocess.CalledProcessError: the code failed.
    """
    started, peak = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, "-c", code], stdout=sys.stderr) as process:  # noqa: S603
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.1)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, code)
    return time.perf_counter() - started, peak


def anonymous(pid: int) -> float:
    """Return a process's anonymous memory in GB; 0 after its end."""
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.NoSuchProcess:
        return 0
    return (memory.rss - memory.shared) / 1e9  # Linux: shared is what is backed by files


def convert(checkpoint: Path, out: Path, variants: list[str], pictures: int) -> dict:
    """Make the IRs that `variants` need; those there already are not measured again."""
    files = {name for variant in variants for name in VARIANTS[variant] or ()}
    steps = {"convert_s": (CONVERT, VISION_ENCODER_NAME), "compress_s": (COMPRESS, INT4_NAME)}
    steps |= {"vision_int8_s": (CALIBRATE, CALIBRATED_NAME), "vision_int8_weights_s": (ROUND, ROUNDED_NAME)}
    if LANGUAGE_MODEL_NAME in files:
        steps["convert_s"] = (CONVERT, LANGUAGE_MODEL_NAME)
    result = {"peak_anon_gb": {}}
    for key, (code, name) in steps.items():
        if (key == "convert_s" or name in files) and not (out / name).is_file():
            fp16 = LANGUAGE_MODEL_NAME in files
            code = code.format(checkpoint=str(checkpoint), out=str(out), fp16=fp16, pictures=pictures)
            result[key], result["peak_anon_gb"][key] = measured_process(code)
    return result


# ---- What a variant's process does ----------------------------------------------------------------------------------


class Subject:
    """A loaded variant; the same measurements for OpenVINO and PyTorch, implemented by subclasses."""

    def __init__(self, checkpoint: Path):
        transformers.logging.disable_progress_bar()
        self.processor = AutoProcessor.from_pretrained(checkpoint)

    def inputs(self, tiles: int = 1):
        """Return the processor's tensors for a picture of so many tiles and a prompt of PROMPT_TOKENS tokens."""
        side = self.processor.image_processor.size["height"]
        width, height = TILES[tiles]
        pixels = np.random.default_rng(tiles).integers(0, 256, (side * height, side * width, 3), dtype=np.uint8)
        inputs = self.processor(text="<|image|>", images=[Image.fromarray(pixels)], return_tensors="pt")
        missing = PROMPT_TOKENS - inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], self.words(1000, missing)], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        mask = inputs["cross_attention_mask"]
        inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, missing, -1, -1)], dim=1)
        return inputs

    def words(self, start: int, count: int) -> torch.LongTensor:
        """Return `count` token ids that follow one another from `start` on: [1, count]."""
        return torch.arange(start, start + count)[None] % self.model.config.text_config.vocab_size

    @torch.inference_mode()
    def first_inference(self) -> float:
        return self.timed(self.model, input_ids=torch.tensor([[1]]), logits_to_keep=1)[0]

    @torch.inference_mode()
    def measure(self, tiles: list[int], new_tokens: int) -> dict:
        """Measure one round."""
        vision, decode = {}, {}
        for count in tiles[::-1]:  # one tile last: its picture is the one that is asked about
            inputs = self.inputs(count)
            vision[count], picture = self.timed(self.encode, inputs)
            prefill, output = self.prefill(inputs, picture)
            decode[count], output = self.decode(output, inputs, new_tokens)
        steps = {}
        for q in STEPS:
            self.step(output.past_key_values, inputs, q)  # a new shape may be compiled
            steps[q] = 1000 * self.step(output.past_key_values, inputs, q)[0]
        return {
            "vision_s": {count: vision[count] for count in tiles},
            "prefill_ms": 1000 * prefill,
            "decode_ms": 1000 * decode[tiles[0]],
            "decode_by_tiles_ms": {count: 1000 * decode[count] for count in tiles},
            "step_ms": steps,
        }

    def decode(self, output, inputs, new_tokens: int):
        """Return the median seconds of so many steps of one token, and the last step's output."""
        seconds = []
        for token in range(new_tokens):
            took, output = self.step(output.past_key_values, inputs, 1, start=token)
            seconds.append(took)
        return statistics.median(seconds), output

    @staticmethod
    def timed(function, *args, **kwargs):
        started = time.perf_counter()
        result = function(*args, **kwargs)
        return time.perf_counter() - started, result

    def footprint(self) -> dict:
        """Return GB resident, on disk, and read by a decode step (which is without embedding and vision encoder)."""
        return {
            "rss_gb": psutil.Process().memory_info().rss / 1e9,
            "anon_gb": anonymous(os.getpid()),
            "disk_gb": sum(path.stat().st_size for path in self.weights) / 1e9,
            "weights_gb_per_token": self.weights_per_token() / 1e9,
        }


class PyTorchSubject(Subject):
    """transformers in bf16."""

    def __init__(self, checkpoint: Path):
        super().__init__(checkpoint)
        self.weights = list(checkpoint.glob("*.safetensors"))
        self.model = MllamaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()

    def encode(self, inputs):
        """Encode an image: the projected states that the language model reads."""
        vision = self.model.model.vision_model(**{name: inputs[name] for name in PICTURE}).last_hidden_state
        states = self.model.model.multi_modal_projector(vision.to(torch.bfloat16))
        return states.reshape(-1, vision.shape[-2], states.shape[-1])

    def prefill(self, inputs, picture):
        """Return the seconds of a prompt without encoding its image, and the output."""
        text = {name: inputs[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")}
        options = {"past_key_values": None, "use_cache": True, "logits_to_keep": 1}
        return self.timed(self.model, **text, cross_attention_states=picture, **options)

    def step(self, past, inputs, q: int, start: int = 0):
        """Return the seconds of a step of q tokens, and its output."""
        mask = inputs["cross_attention_mask"][:, -1:].expand(-1, q, -1, -1)
        options = {"past_key_values": past, "use_cache": True, "logits_to_keep": q}
        return self.timed(self.model, input_ids=self.words(start + 2000, q), cross_attention_mask=mask, **options)

    def weights_per_token(self) -> int:
        """Return the bytes of the weights."""
        modules = self.model.model
        unused = [modules.vision_model, modules.multi_modal_projector, modules.language_model.embed_tokens]
        crosses = [layer.cross_attn for layer in modules.language_model.layers if hasattr(layer, "cross_attn")]
        unused += [projection for attention in crosses for projection in (attention.k_proj, attention.v_proj)]
        files = sum(path.stat().st_size for path in self.weights)
        return files - 2 * sum(weight.numel() for module in unused for weight in module.parameters())


class OpenVINOSubject(Subject):
    """This project with the given IRs."""

    def __init__(self, checkpoint: Path, model_dir: Path, files: tuple[str, str]):
        super().__init__(checkpoint)
        self.weights = [(model_dir / name).with_suffix(".bin") for name in files]
        language, vision = files
        self.model = Assisted(model_dir, language_model_name=language, image_encoder_name=vision, warm_up=False)

    def measure(self, tiles: list[int], new_tokens: int) -> dict:
        """Measure one round, with decoding beside no image and assisted decoding."""
        result = super().measure(tiles, new_tokens)
        text = {"input_ids": self.words(1000, PROMPT_TOKENS)}
        _, output = self.prefill(text, None)
        result["decode_by_tiles_ms"][0] = 1000 * self.decode(output, text, new_tokens)[0]
        each = {count: self.padding_one_by_one(count) for count in tiles}
        result["one_padding_tile"] = {count: result["vision_s"][count] / each[count] for count in tiles}
        return result | {"assisted": self.assisted(text, max(new_tokens, 32))}

    def padding_one_by_one(self, tiles: int) -> float:
        """Return the seconds of an image whose empty tiles are all computed, as where they differ."""
        encoder, inputs = self.model.image_encoder, self.inputs(tiles)
        encoder.padding_alike, alike = False, encoder.padding_alike
        seconds, _ = self.timed(self.encode, inputs)
        encoder.padding_alike = alike
        self.model.forget()
        return seconds

    def assisted(self, text, new_tokens: int) -> dict:
        """Return tokens per second over greedy decoding's, by number of drafts, all or none of them right."""
        answer = torch.cat([text["input_ids"], self.words(3000, new_tokens)], dim=1)
        options = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": None}
        options["logits_processor"] = LogitsProcessorList([Dictated(answer)])
        self.model.generate(**text, **options)
        greedy, result = self.model.stats.tokens_per_s, {}
        for drafts in DRAFTS:
            result[drafts] = {}
            for name, shift in (("right", 0), ("wrong", 1)):
                self.model.drafts = KnownDrafts((answer + shift) % self.model.shapes.vocab_size, drafts)
                self.model.generate(**text, **options, prompt_lookup_num_tokens=drafts)
                result[drafts][name] = self.model.stats.tokens_per_s / greedy
        return result

    def encode(self, inputs):
        """Encode an image: the K/V that the language model reads, cached for the prefill that follows."""
        self.model.forget()  # what another round left
        return self.model.image_encoder.encode(ImageInputs(*(inputs[name].numpy() for name in ImageInputs._fields)))

    def prefill(self, inputs, picture):
        """Return the seconds of a prompt whose image is encoded already, and the output."""
        return self.timed(self.model, **inputs, logits_to_keep=1)

    def step(self, past, inputs, q: int, start: int = 0):
        """Return the seconds of a step of q tokens, and its output."""
        return self.timed(self.model, input_ids=self.words(start + 2000, q), past_key_values=past, logits_to_keep=q)

    def weights_per_token(self) -> int:
        """Return the bytes of the weights."""
        text, language = self.model.config.text_config, self.weights[0]
        embedding = text.vocab_size * text.hidden_size * (1 if "int" in language.name else 2)
        return language.stat().st_size - embedding


class Dictated(LogitsProcessor):
    """Logits processor that dictates an answer: random weights' own changes with each near tie, and repeats nothing."""

    def __init__(self, answer: torch.LongTensor):
        self.answer = answer

    def __call__(self, input_ids, scores):
        scores[:, self.answer[0, input_ids.shape[1]]] += 1000
        return scores


class KnownDrafts(CandidateGenerator):
    """Candidate generator that drafts the next `count` tokens of a text."""

    requires_model_outputs = False

    def __init__(self, text: torch.LongTensor, count: int):
        self.text, self.count = text, count

    def get_candidates(self, input_ids, **kwargs):
        length = input_ids.shape[1]
        end = min(length + self.count, self.text.shape[1] - 1)
        return torch.cat([input_ids, self.text[:, length:end]], dim=1), None

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        pass


class Assisted(OVMLlamaForConditionalGeneration):
    """The model, with `drafts` in the place of prompt lookup."""

    drafts: CandidateGenerator

    def _get_candidate_generator(self, **kwargs):
        return InVocabularyDrafts(self.drafts, self.shapes.vocab_size, back_off=True)


_subject: Subject | None = None  # of this worker process


def load(checkpoint: Path, model_dir: Path, files: tuple[str, str] | None) -> dict:
    """Load this worker's subject; return the seconds of loading and of its first inference."""
    global _subject
    make = (OpenVINOSubject, checkpoint, model_dir, files) if files else (PyTorchSubject, checkpoint)
    seconds, _subject = Subject.timed(*make)
    return {"load_s": seconds, "first_infer_s": _subject.first_inference()}


def measure(tiles: list[int], new_tokens: int) -> dict:
    """Call this worker's `Subject.measure`."""
    return _subject.measure(tiles, new_tokens)


def footprint() -> dict:
    """Call this worker's `Subject.footprint`."""
    return _subject.footprint()


# ---- The run --------------------------------------------------------------------------------------------------------


def bandwidth() -> float:
    """Return the GB a second that all threads read from memory together: the best of five sums of 4 GB."""
    values = torch.ones(1_000_000_000)
    return 4 / min(Subject.timed(values.sum)[0] for _ in range(5))


def median(rounds: list):
    """Return the median of numbers, or of each entry of equal dicts."""
    if isinstance(rounds[0], dict):
        return {key: median([entry[key] for entry in rounds]) for key in rounds[0]}
    return statistics.median(rounds)


def compare(checkpoint: Path, model_dir: Path, variants: list[str], options: argparse.Namespace) -> dict:
    """Measure all variants, loaded one after the other and measured in turn."""
    context = multiprocessing.get_context("spawn")
    workers = {name: ProcessPoolExecutor(1, mp_context=context) for name in variants}
    results, rounds = {}, {name: [] for name in variants}
    for name, worker in workers.items():
        print(f"Loading {name}", file=sys.stderr)
        results[name] = worker.submit(load, checkpoint, model_dir, VARIANTS[name]).result()
    for number in range(options.rounds):
        for name, worker in workers.items():
            print(f"Round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
            rounds[name].append(worker.submit(measure, options.tiles, options.new_tokens).result())
    for name, worker in workers.items():
        results[name] |= median(rounds[name]) | worker.submit(footprint).result()
        worker.shutdown()
    return results


def add_shares(variants: dict, bandwidth_gb_s: float) -> None:
    """Add the share of the memory's bandwidth and, if PyTorch was measured, ratios to it."""
    reference = variants.get(PYTORCH)
    for result in variants.values():
        speed = result["weights_gb_per_token"] / (result["decode_ms"] / 1000)
        result["share_of_bandwidth"] = speed / bandwidth_gb_s
        if reference:
            result["ratio"] = {
                "vision_s": {tiles: s / reference["vision_s"][tiles] for tiles, s in result["vision_s"].items()},
                **{key: result[key] / reference[key] for key in ("prefill_ms", "decode_ms")},
            }


def print_table(variants: dict) -> None:
    """Print the figures, rounded, one row a variant."""
    columns = [
        "load_s",
        "first_infer_s",
        "prefill_ms",
        "decode_ms",
        "rss_gb",
        "anon_gb",
        "disk_gb",
        "share_of_bandwidth",
    ]
    tiles = list(next(iter(variants.values()))["vision_s"])
    print(" | ".join(["variant", *(f"vision_s {count}" for count in tiles), *columns]))
    for name, result in variants.items():
        cells = [f"{result['vision_s'][count]:.2f}" for count in tiles] + [f"{result[key]:.2f}" for key in columns]
        print(" | ".join([name, *cells]))
    for name, result in variants.items():
        print(f"step_ms of {name}: " + ", ".join(f"{q}: {ms:.0f}" for q, ms in result["step_ms"].items()))
        print(f"decode_by_tiles_ms of {name}: {json.dumps(rounded(result['decode_by_tiles_ms']))}")
        if "assisted" in result:
            print(f"assisted in {name}: {json.dumps(rounded(result['assisted']))}")
        if "ratio" in result:
            print(f"ratio of {name} to {PYTORCH}: {json.dumps(rounded(result['ratio']))}")


def rounded(value):
    """Round numbers to four significant digits, anywhere in a nest of dicts."""
    if isinstance(value, dict):
        return {str(key): rounded(entry) for key, entry in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def report(result: dict, path: Path | None) -> None:
    """Print the figures as JSON, in a line, and writes them to a file if one is named."""
    if path:
        path.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rounded(result)))


def provenance(module: str) -> dict:
    """Return what each result records: the machine, the versions, the command (folders by their names)."""
    names = ("torch", "transformers", "openvino", "nncf")
    return {
        "machine": f"{ov.Core().get_property('CPU', 'FULL_DEVICE_NAME')}, {psutil.cpu_count(logical=False)} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "versions": {name: importlib.metadata.version(name) for name in names},
        "command": " ".join([f"python -m {module}", *(Path(option).name for option in sys.argv[1:])]),
    }


def main() -> None:
    """Run the benchmark: convert what is missing, measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder, such as make_checkpoint's")
    parser.add_argument("--out", type=Path, help="folder for the IRs; default: the checkpoint's with -ov appended")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--tiles", nargs="+", type=int, choices=TILES, default=[1, 2, 4])
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1, help="to calibrate the vision encoder with")
    parser.add_argument("--json", type=Path, help="file for the JSON as well")
    options = parser.parse_args()
    out = options.out or options.checkpoint.with_name(options.checkpoint.name + "-ov")

    result = {
        **provenance("benchmarks.benchmark"),
        "bandwidth_gb_s": bandwidth(),
        "conversion": convert(options.checkpoint, out, options.variants, options.pictures),
        "variants": compare(options.checkpoint, out, options.variants, options),
    }
    add_shares(result["variants"], result["bandwidth_gb_s"])
    print_table(result["variants"])
    report(result, options.json)


if __name__ == "__main__":
    main()
