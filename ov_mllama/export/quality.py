"""Cost and quality of each variant of a model, beside the original in PyTorch.

If right answers are known, variants answer the questions (`measure`); otherwise they are compared by their
probabilities along a given caption (`diverge`), as are the two references that a checkpoint's weights may have been
trained with (`compare_references`). Each variant of `price_list` is measured in a process of its own, in turn.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from tqdm.auto import tqdm
from transformers import MllamaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.convert import convert_mllama
from ov_mllama.export.isolation import run_in_process
from ov_mllama.export.prepare import plan_here
from ov_mllama.export.settings import Settings
from ov_mllama.export.sources.find import PLAIN
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, ir_stamp
from ov_mllama.runtime.memory import trim_memory
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.prompts import load_processor, prompts_about
from ov_mllama.runtime.reference import NAMES, TRANSFORMERS, Reference, described

BATCH = 50  # questions answered at once
TIMED_QUESTIONS = 10  # answered one by one, for the latencies
GREEDY = {"do_sample": False, "max_new_tokens": 60}
ORIGINAL = {True: "PyTorch f32", False: "PyTorch 16 bit"}  # by whether right answers are known


def price_list(
    checkpoint: str | Path,
    model_dir: Path,
    variants: dict[str, tuple[str, str]],
    samples: list[dict],
    follow: Callable | None = None,
) -> list[dict]:
    """Measure cost and quality of the original in PyTorch and of each variant, with a progress bar.

    Args:
        checkpoint: folder or hub id of the original.
        model_dir: folder of the IRs.
        variants: name -> file names of language model and image encoder.
        samples: questions, {"image": PIL image, "question", "answer" (the right one), "task"}, such as
            `demo_model.evaluate.heldout_samples`; or with a "caption" instead, such as `samples.photographs`.
        follow: has transformers' model follow a `reference.Reference` and returns it, such as `notebook_utils.follow`;
            needed for IRs that follow another than transformers'. A function that a new process can import.
    Returns:
        a row for the original, then one for each variant: "variant" and the row of `measure` or `diverge`.
    Raises:
        InputError: if the IRs follow another reference and there is no `follow`.
        UserError: as `run_in_process`.
    """
    known = all("answer" in sample for sample in samples)
    function: Callable = measure if known else diverge
    followed = Reference.of(ir_stamp(model_dir / VISION_ENCODER_NAME))
    if followed != TRANSFORMERS and follow is None:
        raise InputError(
            f"The original in transformers does not follow the reference of the IRs in {model_dir} "
            f"({described(followed)}): give follow=notebook_utils.follow."
        )
    rows, expected, adapt = [], None, partial(follow, reference=followed) if follow else None
    with tqdm(total=(1 + len(variants)) * len(samples), desc="Price list", unit="question", leave=False) as bar:
        for name, files in {ORIGINAL[known]: None, **variants}.items():
            bar.set_postfix_str(name)
            arguments = checkpoint, model_dir, files, samples, expected, adapt
            row, answers = run_in_process(function, *arguments, on_progress=bar.update, preload=__name__)
            expected = expected or answers
            adapt = None  # the original alone is adapted, and imports what `follow` needs
            rows.append({"variant": name, **row})
    return rows


def measure(
    checkpoint: str | Path,
    model_dir: Path,
    files: tuple[str, str] | None,
    samples: list[dict],
    expected: dict | None,
    adapt: Callable | None = None,
    report: Callable[[int], object] = int,
) -> tuple[dict, dict]:
    """Measure one variant by its greedy answers.

    Args:
        files: of the variant; None for the original, in f32.
        expected: the second result for the original; None while measuring that.
        adapt: has the original follow the reference that the IRs do, and returns it.
        report: called with the number of questions answered since the last call.
    Returns:
        a row: size_mb on disk; first_token_ms (image and prompt) and next_token_ms, medians of one question at a time;
        exact match by task and over "all" in percent; questions, their number; lost, won, answers that are right for
        the original only or for this variant only; kl, the mean Kullback-Leibler divergence in nats of the original's
        next-token distributions from this variant's, along the original's answers; kl_error, its standard error.
        And the answers' "tokens" and "log_probs", which other variants are compared with.
    """
    transformers.logging.disable_progress_bar()
    processor = load_processor(model_dir)
    model, size = open_variant(checkpoint, model_dir, files, load_float32, adapt)
    tokens: list[list[int]] = []
    log_probs: list[np.ndarray] = []
    for batch in batches(samples):
        prompts = prompts_about(processor, batch)
        answers = greedy(model, processor, prompts)
        along = expected["tokens"][len(tokens) : len(tokens) + len(batch)] if expected else answers
        log_probs += score(model, processor, prompts, along)  # the images are in the model's cache
        tokens += answers
        report(len(batch))
    reference = expected or {"tokens": tokens, "log_probs": log_probs}
    right_before, right_now = (is_right(processor, samples, answers) for answers in (reference["tokens"], tokens))
    row = {
        "size_mb": size / 1e6,
        **latencies(model, processor, samples[:TIMED_QUESTIONS]),
        **exact_match(samples, right_now),
        "questions": len(samples),
        "lost": int((right_before & ~right_now).sum()),
        "won": int((right_now & ~right_before).sum()),
        **divergence(np.concatenate(reference["log_probs"]), np.concatenate(log_probs)),
    }
    return row, {"tokens": tokens, "log_probs": log_probs}


def divergence(expected: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Return "kl" and "kl_error" of log-probabilities [tokens, vocab], see `measure`."""
    kl = (np.exp(expected) * (expected - actual)).sum(-1)
    return {"kl": float(kl.mean()), "kl_error": float(kl.std() / len(kl) ** 0.5)}


def load_float32(checkpoint: Checkpoint, scratch: Path) -> Any:
    """Load a checkpoint in float32; one that transformers alone does not read as 16 bit first, in a temporary file."""
    if checkpoint.base or checkpoint.source.kind != PLAIN:
        return checkpoint.load(scratch=scratch).float()
    return MllamaForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.float32)


def load_16_bit(checkpoint: Checkpoint, scratch: Path) -> Any:
    """Load a checkpoint in its 16 bit, mapped from files."""
    return checkpoint.load(scratch=scratch)


def open_variant(
    checkpoint: str | Path,
    model_dir: Path,
    files: tuple[str, str] | None,
    load: Callable[[Checkpoint, Path], Any],
    adapt: Callable | None,
    **options: Any,
) -> tuple[Any, int]:
    """Return a variant's model, or the adapted original as `load` returns it, and the bytes of its weights on disk."""
    if files is None:
        source = Checkpoint(checkpoint)
        model = load(source, model_dir).eval()
        size = sum(path.stat().st_size for path in source.source.weights)
        return adapt(model) if adapt else model, size
    model = OVMLlamaForConditionalGeneration(
        model_dir, language_model_name=files[0], image_encoder_name=files[1], warm_up=False, **options
    )
    return model, sum((model_dir / name).with_suffix(".bin").stat().st_size for name in files)


def diverge(
    checkpoint: str | Path,
    model_dir: Path,
    files: tuple[str, str] | None,
    samples: list[dict],
    expected: list | None,
    adapt: Callable | None = None,
    report: Callable[[int], object] = int,
) -> tuple[dict, list[np.ndarray]]:
    """Measure one variant by its next-token probabilities along given captions.

    Args:
        files: of the variant; None for the original, in its 16 bit: weights stay in their files, and it computes in
            bf16 or float16, whose rounding is in all that is compared with it.
        expected, adapt, report: as for `measure`.
    Returns:
        a row: size_gb on disk; memory_gb, anonymous, at the end; picture_s, median seconds to encode an image (of IRs);
        kl and kl_error, as `measure`; same, the percentage of tokens for which both have the same likeliest one.
        And log-probabilities f32 [tokens, vocab] for each sample, which other variants are compared with.
    """
    transformers.logging.disable_progress_bar()
    processor, seconds, log_probs = load_processor(model_dir), [], []
    model, size = open_variant(checkpoint, model_dir, files, load_16_bit, adapt, image_cache_bytes=0)
    for sample in samples:
        caption = processor.tokenizer(sample["caption"], add_special_tokens=False)["input_ids"]
        log_probs += score(model, processor, prompts_about(processor, [sample]), [caption])
        seconds += model.stats.image_s if files else []
        report(1)
    reference, actual = np.concatenate(expected or log_probs), np.concatenate(log_probs)
    memory = psutil.Process().memory_info()
    row = {
        "size_gb": size / 1e9,
        "memory_gb": (memory.rss - getattr(memory, "shared", 0)) / 1e9,
        "picture_s": float(np.median(seconds)) if seconds else None,
        **divergence(reference, actual),
        "same": 100 * float((reference.argmax(-1) == actual.argmax(-1)).mean()),
    }
    return row, log_probs


def compare_references(checkpoint: str | Path, folder: Path, samples: list[dict]) -> list[dict]:
    """Measure the log-probabilities of given captions under both references. Those of the reference that the weights
    were trained with should be higher.

    Args:
        folder: for the IRs, which stay there, of each reference in a folder of its name. The language model is in 16
            bit or, if this machine's memory is too small for that, in INT4.
        samples: {"image", "question", "caption"}, such as `samples.photographs`.
    Returns:
        for each sample its "picture" and, as "meta" and "transformers", the mean log-probability of a token of its
        caption, in nats.
    Raises:
        UserError: as `convert_mllama` and `compress_language_model`.
    """
    from ov_mllama.export.compress import compress_language_model

    rows = [{"picture": sample.get("name", f"{number}")} for number, sample in enumerate(samples, 1)]
    for name in NAMES:
        steps = plan_here(checkpoint, folder / name, reference=name)
        steps.check_disk()
        model_dir = convert_mllama(checkpoint, folder / name, steps.write_16_bit, reference=name)
        language = model_dir / LANGUAGE_MODEL_NAME
        if not steps.write_16_bit:
            language = compress_language_model(model_dir, Settings.here(), checkpoint=checkpoint)
        for row, log_prob in zip(rows, caption_log_probs(model_dir, language.name, samples), strict=True):
            row[name] = log_prob
        trim_memory()
    return rows


def caption_log_probs(model_dir: Path, language: str, samples: list[dict]) -> list[float]:
    """Return the mean log-probability of a token of each sample's caption, in nats.

    Args:
        language: file name of the language model.
    """
    processor = load_processor(model_dir)
    model, means = OVMLlamaForConditionalGeneration(model_dir, language_model_name=language, warm_up=False), []
    for sample in tqdm(samples, desc=f"Captions, {model_dir.name}", leave=False):
        caption = processor.tokenizer(sample["caption"], add_special_tokens=False)["input_ids"]
        (log_probs,) = score(model, processor, prompts_about(processor, [sample]), [caption])
        means.append(float(log_probs[np.arange(len(caption)), caption].mean()))
    return means


def verdict(rows: list[dict]) -> str:
    """Return a sentence on the better of the two references, if the rows of `compare_references` differ enough."""
    gains = np.array([row["meta"] - row["transformers"] for row in rows])
    mean, error = gains.mean(), gains.std(ddof=1) / len(gains) ** 0.5
    better = "Meta's reference is better" if mean > 0 else "transformers' reference is better"
    better = better if abs(mean) > 2 * error else "so few captions cannot tell them apart"
    return (
        f"meta - transformers: {mean:+.4f} ± {2 * error:.4f} nats a token (two standard errors), {(gains > 0).sum()} "
        f"of {len(rows)} captions likelier with meta: {better}."
    )


def batches(items: list) -> list[list]:
    """Split `items` into lists of at most BATCH."""
    return [items[i : i + BATCH] for i in range(0, len(items), BATCH)]


def greedy(model: Any, processor: Any, prompts: dict[str, torch.Tensor]) -> list[list[int]]:
    """Return the tokens of the greedy answers to a batch of prompts, without padding."""
    output = model.generate(**prompts, **GREEDY)[:, prompts["input_ids"].shape[1] :]
    return [[token for token in row if token != processor.tokenizer.pad_token_id] for row in output.tolist()]


@torch.no_grad()
def score(model: Any, processor: Any, prompts: dict[str, torch.Tensor], answers: list[list[int]]) -> list[np.ndarray]:
    """Return next-token log-probabilities f32 [tokens, vocab] at each token of given answers to a batch of prompts."""
    longest, start = max(map(len, answers)), prompts["input_ids"].shape[1]
    appended = torch.full((len(answers), longest), processor.tokenizer.pad_token_id)
    for row, answer in zip(appended, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    is_token = (appended != processor.tokenizer.pad_token_id).long()
    mask = prompts["cross_attention_mask"]
    inputs = {
        **prompts,
        "input_ids": torch.cat([prompts["input_ids"], appended], 1),
        "attention_mask": torch.cat([prompts["attention_mask"], is_token], 1),
        "cross_attention_mask": torch.cat([mask, mask[:, -1:].expand(-1, longest, -1, -1)], 1),
    }
    logits = model(**inputs).logits[:, start - 1 : -1].float().log_softmax(-1)
    return [rows[: len(answer)].numpy() for rows, answer in zip(logits, answers, strict=True)]


def is_right(processor: Any, samples: list[dict], tokens: list[list[int]]) -> np.ndarray:
    """Return whether each answer is the right one, character for character: bool [samples]."""
    answers = processor.batch_decode(tokens, skip_special_tokens=True)
    return np.array([answer == sample["answer"] for sample, answer in zip(samples, answers, strict=True)])


def exact_match(samples: list[dict], right: np.ndarray) -> dict[str, float]:
    """Return the percentage of right answers, over all and by task."""
    tasks = np.array([sample["task"] for sample in samples])
    shares = {"all": right, **{task: right[tasks == task] for task in sorted(set(tasks.tolist()))}}
    return {task: 100 * float(share.mean()) for task, share in shares.items()}


class Clock(BaseStreamer):
    """The time of each token; the first one is the prompt's."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def latencies(model: Any, processor: Any, samples: list[dict]) -> dict[str, float]:
    """Return median milliseconds to the first token, and from each token to the next, one question at a time."""
    first, following = [], []
    for sample in samples:
        if hasattr(model, "forget"):
            model.forget()  # the images were cached by the batches
        clock = Clock()
        model.generate(**prompts_about(processor, [sample]), **GREEDY, streamer=clock)
        steps = np.diff(clock.times) * 1000
        first.append(steps[0])
        following.extend(steps[1:])
    return {"first_token_ms": float(np.median(first)), "next_token_ms": float(np.median(following))}
