"""What each variant of a model costs and what it loses, beside the original in PyTorch.

Where right answers are known, variants are asked (`measure`); those of a model that answers in its own words are
compared by how likely they find a given caption's tokens (`diverge`); so are the two references that a checkpoint's
weights may have been trained with (`compare_references`). Every variant is measured in a process of its
own: none sees another's memory, and one is in memory at a time.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoProcessor, MllamaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from ov_mllama.export.convert import checkpoint_folder, convert_mllama, load_checkpoint
from ov_mllama.export.prepare import plan_here
from ov_mllama.export.settings import Settings
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, ir_stamp
from ov_mllama.runtime.memory import trim_memory
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.prompts import prompts_about
from ov_mllama.runtime.reference import NAMES, TRANSFORMERS, Reference, described

BATCH = 50
TIMED = 20  # questions asked one by one for the waits
GREEDY = {"do_sample": False, "max_new_tokens": 60}
ORIGINAL = {True: "PyTorch f32", False: "PyTorch 16 bit"}  # whether right answers are known


def price_list(
    checkpoint: str | Path,
    model_dir: Path,
    variants: dict[str, tuple[str, str]],
    samples: list[dict],
    follow: Callable | None = None,
) -> list[dict]:
    """One row for each variant, the first being the original in PyTorch.

    Args:
        checkpoint: folder or hub id of the original.
        model_dir: folder of the IRs.
        variants: name -> file names of language model and image encoder.
        samples: questions to ask, {"image": PIL picture, "question", "answer" (the right one), "task"}, such as
            `demo_model.evaluate.heldout_samples`; or with a "caption" instead, such as `samples.photographs`.
        follow: has transformers' model follow a `reference.Reference` and returns it, such as `notebook_utils.follow`;
            needed for IRs that follow another than transformers'. A function that a new process can import.
    Returns:
        dicts of "variant" and what `measure` returns, or `diverge`.
    Raises:
        ValueError: the IRs follow another reference, and no `follow` is given.
    """
    rows, reference = [], None
    known = all("answer" in sample for sample in samples)
    measured: Callable[..., tuple] = measure if known else diverge
    checkpoint, followed = checkpoint_folder(checkpoint), Reference.of(ir_stamp(model_dir / VISION_ENCODER_NAME))
    if followed != TRANSFORMERS and follow is None:
        raise ValueError(
            f"The original in transformers does not follow the reference of the IRs in {model_dir} "
            f"({described(followed)}): give follow=notebook_utils.follow."
        )
    put_right = partial(follow, reference=followed) if follow else None
    bar = tqdm({ORIGINAL[known]: None, **variants}.items(), desc="Price list", unit="variant", leave=False)
    for name, files in bar:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            row, answers = process.submit(
                measured, checkpoint, model_dir, files, samples, reference, put_right
            ).result()
        reference = reference or answers
        rows.append({"variant": name, **row})
    return rows


def measure(
    checkpoint: Path,
    model_dir: Path,
    files: tuple[str, str] | None,
    samples: list[dict],
    reference: dict | None,
    put_right: Callable | None = None,
) -> tuple[dict, dict]:
    """Measures one variant; None for `files` is the original.

    Args:
        put_right: has the original follow the reference that the IRs do, and returns it.
    Returns:
        a row: size_mb on disk; memory_mb, by which the process has grown after all answers; first_token_ms and
        next_token_ms, medians of what one waits (the first: picture and prompt); exact match by task and over "all" in
        percent; questions, how many; lost, won, how many of them the reference answers right and this variant does
        not, and the other way round; kl, mean Kullback-Leibler divergence in nats of the reference's next-token
        distributions to this variant's, over the reference's answers; kl_error, its standard error;
        and the answers' tokens and log-probabilities: the reference for other variants.
    """
    transformers.logging.disable_progress_bar()
    processor, before = AutoProcessor.from_pretrained(model_dir, backend="pil"), psutil.Process().memory_info().rss
    original = partial(MllamaForConditionalGeneration.from_pretrained, checkpoint, dtype=torch.float32)
    model, size = opened(checkpoint, model_dir, files, original, put_right)
    tokens = [answer for batch in batches(samples) for answer in greedy(model, processor, batch)]
    memory = psutil.Process().memory_info().rss - before

    expected = reference or {"tokens": tokens}
    log_probs = [
        rows
        for batch, answers in zip(batches(samples), batches(expected["tokens"]), strict=True)
        for rows in score(model, processor, batch, answers)
    ]
    pairs = zip(expected.get("log_probs", log_probs), log_probs, strict=True)
    kl = np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in pairs])
    reference_right, now = (right(processor, samples, answers) for answers in (expected["tokens"], tokens))
    row = {
        "size_mb": size / 1e6,
        "memory_mb": memory / 1e6,
        **waits(model, processor, samples[:TIMED]),
        **exact_match(samples, now),
        "questions": len(samples),
        "lost": int((reference_right & ~now).sum()),
        "won": int((now & ~reference_right).sum()),
        "kl": float(kl.mean()),
        "kl_error": float(kl.std() / len(kl) ** 0.5),
    }
    return row, {"tokens": tokens, "log_probs": log_probs}


def opened(
    checkpoint: Path,
    model_dir: Path,
    files: tuple[str, str] | None,
    original: Callable[[], Any],
    put_right: Callable | None,
):
    """A variant's model, or the `original`, put right; and the bytes of its weights on disk."""
    if files is None:
        model = original().eval()
        return put_right(model) if put_right else model, sum(
            path.stat().st_size for path in checkpoint.glob("*.safetensors")
        )
    model = OVMLlamaForConditionalGeneration(
        model_dir, language_model_name=files[0], image_encoder_name=files[1], warm_up=False, image_cache_bytes=0
    )
    return model, sum((model_dir / name).with_suffix(".bin").stat().st_size for name in files)


def diverge(
    checkpoint: Path,
    model_dir: Path,
    files: tuple[str, str] | None,
    samples: list[dict],
    reference: list | None,
    put_right: Callable | None = None,
) -> tuple[dict, list[np.ndarray]]:
    """Compares one variant by its next-token probabilities along given captions; None for `files` is the original, in
    the 16 bit that it has: its weights stay in their files, and it is computed in bf16 or float16, whose rounding is in
    all that is compared with it.

    Args:
        put_right: as for `measure`.
    Returns:
        a row: size_gb on disk; memory_gb, anonymous, at the end; picture_s, median seconds for a picture (of IRs); kl,
        mean Kullback-Leibler divergence in nats of the reference's distributions to this variant's; kl_error, its
        standard error; same, the percentage of tokens for which both find the same one the likeliest;
        and log-probabilities f32 [tokens, vocab] for each sample: the reference for other variants.
    """
    transformers.logging.disable_progress_bar()
    processor, seconds, log_probs = AutoProcessor.from_pretrained(model_dir, backend="pil"), [], []
    model, size = opened(checkpoint, model_dir, files, partial(load_checkpoint, checkpoint), put_right)
    for sample in samples:
        caption = processor.tokenizer(sample["caption"], add_special_tokens=False)["input_ids"]
        log_probs += score(model, processor, [sample], [caption])
        seconds += model.stats.image_s if files else []
    expected = np.concatenate(reference or log_probs)
    actual, memory = np.concatenate(log_probs), psutil.Process().memory_info()
    kl = (np.exp(expected) * (expected - actual)).sum(-1)
    row = {
        "size_gb": size / 1e9,
        "memory_gb": (memory.rss - getattr(memory, "shared", 0)) / 1e9,
        "picture_s": float(np.median(seconds)) if seconds else None,
        "kl": float(kl.mean()),
        "kl_error": float(kl.std() / len(kl) ** 0.5),
        "same": 100 * float((expected.argmax(-1) == actual.argmax(-1)).mean()),
    }
    return row, log_probs


def compare_references(checkpoint: str | Path, folder: Path, samples: list[dict]) -> list[dict]:
    """Measures how likely a checkpoint finds given captions, converted in Meta's and in transformers' reference. The
    one that its weights were trained with should find them likelier.

    Args:
        folder: for the IRs, which are left there, of each reference in a folder of its name. The language model is in
            16 bit or, where the plan for this machine has no memory for that, in INT4.
        samples: {"image", "question", "caption"}, such as `samples.photographs`.
    Returns:
        for each sample its "picture" and, as "meta" and "transformers", the mean log-probability of a token of its
        caption, in nats.
    Raises:
        as `convert_mllama` and `compress_language_model`.
    """
    from ov_mllama.export.compress import compress_language_model

    rows = [{"picture": sample.get("name", f"{number}")} for number, sample in enumerate(samples, 1)]
    for name in NAMES:
        made = plan_here(checkpoint, folder / name, reference=name)
        made.check_disk()
        model_dir = convert_mllama(checkpoint, folder / name, made.write_16_bit, reference=name)
        language = model_dir / LANGUAGE_MODEL_NAME
        if not made.write_16_bit:
            language = compress_language_model(model_dir, Settings(), checkpoint=checkpoint)
        for row, log_prob in zip(rows, caption_log_probs(model_dir, language.name, samples), strict=True):
            row[name] = log_prob
        trim_memory()
    return rows


def caption_log_probs(model_dir: Path, language: str, samples: list[dict]) -> list[float]:
    """Mean log-probability of a token of each sample's caption, in nats.

    Args:
        language: file name of the language model.
    """
    processor = AutoProcessor.from_pretrained(model_dir, backend="pil")
    model, means = OVMLlamaForConditionalGeneration(model_dir, language_model_name=language, warm_up=False), []
    for sample in tqdm(samples, desc=f"Captions, {model_dir.name}", leave=False):
        caption = processor.tokenizer(sample["caption"], add_special_tokens=False)["input_ids"]
        (log_probs,) = score(model, processor, [sample], [caption])
        means.append(float(log_probs[np.arange(len(caption)), caption].mean()))
    return means


def verdict(rows: list[dict]) -> str:
    """Return the better of the two references by what `compare_references` returns, if so few captions can tell."""
    gains = np.array([row["meta"] - row["transformers"] for row in rows])
    mean, error = gains.mean(), gains.std(ddof=1) / len(gains) ** 0.5
    better = "Meta's reference is better" if mean > 0 else "transformers' reference is better"
    better = better if abs(mean) > 2 * error else "so few captions cannot tell them apart"
    return (
        f"meta - transformers: {mean:+.4f} ± {2 * error:.4f} nats a token (two standard errors), {(gains > 0).sum()} "
        f"of {len(rows)} captions likelier with meta: {better}."
    )


def batches(items: list) -> list[list]:
    """`items` in lists of at most BATCH."""
    return [items[i : i + BATCH] for i in range(0, len(items), BATCH)]


def greedy(model, processor, samples: list[dict]) -> list[list[int]]:
    """Tokens of the greedy answers, without what pads them."""
    inputs = prompts_about(processor, samples)
    output = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    return [[token for token in row if token != processor.tokenizer.pad_token_id] for row in output.tolist()]


@torch.no_grad()
def score(model, processor, samples: list[dict], answers: list[list[int]]) -> list[np.ndarray]:
    """Log-probabilities f32 [tokens, vocab] of what follows each token of given answers."""
    inputs, longest = prompts_about(processor, samples), max(map(len, answers))
    start = inputs["input_ids"].shape[1]
    appended = torch.full((len(answers), longest), processor.tokenizer.pad_token_id)
    for row, answer in zip(appended, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    is_token = (appended != processor.tokenizer.pad_token_id).long()
    inputs["input_ids"] = torch.cat([inputs["input_ids"], appended], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], is_token], 1)
    mask = inputs["cross_attention_mask"]
    inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, longest, -1, -1)], 1)
    logits = model(**inputs).logits[:, start - 1 : -1].float().log_softmax(-1)
    return [rows[: len(answer)].numpy() for rows, answer in zip(logits, answers, strict=True)]


def right(processor, samples: list[dict], tokens: list[list[int]]) -> np.ndarray:
    """Which answers are the right one, character for character: bool [samples]."""
    answers = processor.batch_decode(tokens, skip_special_tokens=True)
    return np.array([answer == sample["answer"] for sample, answer in zip(samples, answers, strict=True)])


def exact_match(samples: list[dict], is_right: np.ndarray) -> dict[str, float]:
    """Percentage of right answers, over all and by task."""
    tasks = np.array([sample["task"] for sample in samples])
    shares = {"all": is_right, **{task: is_right[tasks == task] for task in sorted(set(tasks.tolist()))}}
    return {task: 100 * float(share.mean()) for task, share in shares.items()}


class Clock(BaseStreamer):
    """Notes when each token comes; the first call brings the prompt."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def waits(model, processor, samples: list[dict]) -> dict[str, float]:
    """Median milliseconds to the first token and from each token to the next, one question at a time."""
    first, following = [], []
    for sample in samples:
        clock, inputs = Clock(), prompts_about(processor, [sample])
        model.generate(**inputs, **GREEDY, streamer=clock)
        steps = np.diff(clock.times) * 1000
        first.append(steps[0])
        following.extend(steps[1:])
    return {"first_token_ms": float(np.median(first)), "next_token_ms": float(np.median(following))}
