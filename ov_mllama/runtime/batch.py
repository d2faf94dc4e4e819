"""Continuous batching: prompts that are computed in sessions of their own, and the decode steps that they share.

Prefill -> session of one row -> Batch.join -> Batch.decode ... -> Batch.leave
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import openvino as ov
import torch

from .checks import image_arrays, token_arrays
from .cross_attention import stack
from .kv_cache import OVCache, Prompt
from .language import Session
from .model import OVMLlamaForConditionalGeneration, prompt_of
from .vision import ImageInputs

# Tokens of a prefill chunk between steps of others: each of them waits for it, three to four steps' time with the 11B
SHARED_PREFILL_TOKENS = 32


class Prefill:
    """A prompt of one row. Created by any thread, as its images are encoded then; the rest is for one that holds the
    model's `turn`.

    Args:
        inputs: the processor's tensors, without padding.
        stop: once set, encoding is cancelled.
        answer: tokens that follow the prompt, of an answer that is continued.

    Attributes:
        session: taken from the model's pool by the first chunk, until `close`.
    """

    def __init__(
        self,
        model: OVMLlamaForConditionalGeneration,
        inputs: dict,
        stop: threading.Event | None = None,
        answer: Sequence[int] = (),
    ):
        self.model = model
        self.session: Any = None
        ids, _, _ = token_arrays(inputs["input_ids"], None, None)
        ids = np.append(ids, np.array([answer], np.int64), 1)
        self.images = images = image_arrays(*(inputs.get(name) for name in ImageInputs._fields))
        if images and answer:  # which sees what the prompt's last token does
            mask = images.cross_attention_mask
            mask = np.append(mask, mask[:, -1:].repeat(len(answer), 1), 1)
            self.images = images._replace(cross_attention_mask=mask)
        self.prompt = prompt_of(model, ids, self.images)
        encoder, keys = model.image_encoder, self.prompt.image_keys
        self._encoded = encoder.encode(self.images, keys, stop) if self.images else None
        self._chunks: Iterator[np.ndarray | None] | None = None

    def step(self, step: int = 0) -> np.ndarray | None:
        """Compute the next chunk, and return logits f32 [vocab] after the last one, else None.

        Args:
            step: tokens of each chunk, as the first call sets it; default `language.prefill_step`.
        """
        if self._chunks is None:
            cache = OVCache()
            try:
                self.session, encoded = self.model.begin(cache, self.prompt, self.images, self._encoded)
            except BaseException:
                self.model.sessions.release()  # or the one that it has acquired is never evicted
                raise
            self.model.sessions.detach(self.session)
            self._chunks = self.session.chunks(self.prompt, encoded, cache, step=step)
        logits = next(self._chunks)
        if logits is None:
            return None
        self._free()
        return logits[0, -1]

    def _free(self) -> None:
        """Release what only the prompt needs: its images, and their K/V before those that the answer sees."""
        self._chunks = self.images = self._encoded = None

    @property
    def lost(self) -> bool:
        """True if a failed inference has reset what was computed."""
        return self.session is not None and self.session.cache is None

    def close(self) -> None:
        """Return the session to the model's pool, where its tokens are a prefix for other prompts."""
        if self.session:
            self.model.sessions.attach(self.session)
        self.session = None
        self._free()


class Batch:
    """Sequences that share decode steps, for a thread that holds the model's `turn`.

    A single one stays in its own session. More are rows of another one's state, aligned at its end: slots before a
    row's first token are hidden by the attention mask.
    """

    def __init__(self, model: OVMLlamaForConditionalGeneration):
        self.model = model
        self.clear()

    def clear(self) -> None:
        """Remove all rows, and what they hold."""
        self._single: Prefill | None = None
        self._session: Any = None
        self._prompts: list[Prompt] = []
        self._tokens: list[list[int]] = []

    @property
    def _lengths(self) -> np.ndarray:
        """Tokens of each row, the visible slots at its end."""
        return np.array([len(tokens) for tokens in self._tokens], np.int64)

    @property
    def lost(self) -> bool:
        """True if there are rows whose KV cache a failed inference has reset."""
        return bool(self._session and self._session.cache is None)

    def join(self, prefill: Prefill) -> None:
        """Append the sequence of a complete prompt as the last row."""
        session = prefill.session
        if not self._tokens:
            self._single, self._session = prefill, session
        else:
            sources = [self._session, session]
            target = self.model.language_model.session() if self._single else self._session
            merge(target, sources, np.append(self._lengths, len(session.cache.positions)))
            if self._single:
                self._single.close()
            prefill.close()
            self._single, self._session = None, target
        self._prompts.append(prefill.prompt)
        self._tokens.append(prefill.prompt.input_ids[0].tolist())

    def leave(self, rows: list[int]) -> None:
        """Remove rows. Their sessions are put into the model's pool, prefixes of follow-ups."""
        stay = np.setdiff1d(np.arange(len(self._tokens)), rows)
        if self._single:
            if not len(stay):
                self._single.close()
                self.clear()
            return
        for row in rows:
            with contextlib.suppress(MemoryError, RuntimeError):  # which cost a prefix, and no answer
                self.model.sessions.attach(self._extract(row))
        if not len(stay):
            self.clear()
        elif rows:
            self._session.cache.batch_select_indices(torch.from_numpy(stay))
            self._prompts = [self._prompts[row] for row in stay]
            self._tokens = [self._tokens[row] for row in stay]

    def _extract(self, row: int) -> Session:
        """Return a session of its own for a row."""
        session, prompt = self.model.language_model.session(), self._prompts[row]
        cache, tokens = OVCache(session), self._tokens[row]
        copy_rows(session, [(self._session, np.array([row]))], np.array([len(tokens)]))
        cache.append(np.array([tokens], np.int64))
        cache.batch, cache.seen, cache.last_seen = 1, prompt.seen[0], prompt.seen[:, -1:]
        cache.image_keys, view = prompt.image_keys, self._session.cache.cross_attention
        if view:
            has_images = prompt.seen.shape[-1] > 0
            cache.cross_attention = view.rows(np.array([row])) if has_images else session.view(None, prompt.seen)
        session.cache = cache
        return session

    def decode(self, tokens: list[int]) -> np.ndarray:
        """Append a token to each row, and return the logits after it, f32 [rows, vocab]."""
        past = len(self._session.cache.positions)
        mask = np.arange(past + 1) >= past - self._lengths[:, None]
        ids = np.array(tokens, np.int64)[:, None]
        logits = self._session.decode(ids, mask.astype(np.int64), self._lengths[:, None])
        for row, token in zip(self._tokens, tokens, strict=True):
            row.append(token)
        return logits[:, -1]


def merge(target: Session, sources: list[Session], lengths: np.ndarray) -> None:
    """Put the rows of sessions below each other into the state of another one, or of the first of them.

    Args:
        lengths: of all rows, the visible slots at the end of each.
    """
    caches: list[Any] = [source.cache for source in sources]
    slots = int(lengths.max())
    copy_rows(target, [(source, np.arange(source.cache.batch)) for source in sources if source.cache], lengths)
    merged, views = OVCache(target), [cache.cross_attention for cache in caches]
    merged.append(np.zeros((len(lengths), slots), np.int64))
    merged.batch, merged.last_seen = len(lengths), np.zeros((len(lengths), 1, 0), bool)
    merged.image_keys = [key for cache in caches for key in row_keys(cache)]
    if len(set(merged.image_keys)) == 1:  # one row for all: there are more if others have left
        merged.cross_attention = views[0] and views[0].rows(np.array([0]))
    else:
        merged.cross_attention = stack(views, [cache.batch for cache in caches])
    target.cache = merged


def copy_rows(target: Session, sources: list[tuple[Session, np.ndarray]], lengths: np.ndarray) -> None:
    """Put rows of sessions below each other into the state of another one, or of the first of them.

    Args:
        sources: sessions, and the indices of their rows.
        lengths: of all rows, the visible slots at the end of each.
    """
    target.request = target.request or target.model.compiled.create_infer_request()
    slots, ends = int(lengths.max()), np.cumsum([len(rows) for _, rows in sources])
    states = [source.request.query_state() for source, _ in sources if source.request]
    for variable, *parts in zip(target.request.query_state(), *states, strict=True):
        # one at a time, as OpenVINO returns f32: 4 MB per row and 1000 tokens of the 11B, which has 64 of them
        tensors = [part.state for part in parts]
        joined = np.zeros((len(lengths), tensors[0].shape[1], slots, tensors[0].shape[3]), np.float32)
        for tensor, (source, rows), end in zip(tensors, sources, ends, strict=True):
            cache: Any = source.cache
            visible = cache.positions[-slots:]
            start = slots - len(visible)
            if visible[-1] - visible[0] + 1 == len(visible):  # slices are not copied first
                visible = slice(visible[0], visible[-1] + 1)
            rows = rows if cache.beam_idx is None else cache.beam_idx[rows]
            joined[end - len(rows) : end, :, start:] = tensor.data[rows][:, :, visible]
        variable.state = ov.Tensor(joined)


def row_keys(cache: OVCache) -> list[tuple[bytes, ...]]:
    """Return, for each row, a key of the image tiles that its next tokens see."""
    if not cache.last_seen.shape[-1]:
        return cache.image_keys
    return [(*keys, seen.tobytes()) for keys, seen in zip(cache.image_keys, cache.last_seen, strict=True)]
