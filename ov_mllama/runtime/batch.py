"""Continuous batching: prompts that are computed in sessions of their own, and the decode steps that they share.

Prefill -> session of one row -> Batch.join -> Batch.decode ... -> Batch.leave
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import openvino as ov
import torch

from .checks import image_arrays, token_arrays
from .cross_attention import stack
from .kv_cache import OVCache
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
            self.session, encoded = self.model.begin(cache, self.prompt, self.images, self._encoded)
            self.model.sessions.detach(self.session)
            self._chunks = self.session.chunks(self.prompt, encoded, cache, step=step)
        logits = next(self._chunks)
        return None if logits is None else logits[0, -1]

    @property
    def lost(self) -> bool:
        """True if a failed inference has reset what was computed."""
        return self.session is not None and self.session.cache is None

    def close(self) -> None:
        """Return the session to the model's pool, where its tokens are a prefix for other prompts."""
        if self.session:
            self.model.sessions.attach(self.session)
        self.session = self._encoded = None


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
        self._lengths = np.zeros(0, np.int64)

    @property
    def lost(self) -> bool:
        """True if there are rows whose KV cache a failed inference has reset."""
        return bool(self._session and self._session.cache is None)

    def join(self, prefill: Prefill) -> None:
        """Append the sequence of a complete prompt as the last row."""
        session = prefill.session
        lengths = np.append(self._lengths, len(session.cache.positions))
        if not len(self._lengths):
            self._single, self._session = prefill, session
        else:
            sources = [self._session, session]
            target = self.model.language_model.session() if self._single else self._session
            merge(target, sources, lengths)
            if self._single:
                self._single.close()
            prefill.close()
            self._single, self._session = None, target
        self._lengths = lengths

    def leave(self, rows: list[int]) -> None:
        """Remove rows."""
        stay = np.setdiff1d(np.arange(len(self._lengths)), rows)
        if not len(stay):
            if self._single:
                self._single.close()
            self.clear()
        elif len(stay) < len(self._lengths):
            self._session.cache.batch_select_indices(torch.from_numpy(stay))
            self._lengths = self._lengths[stay]

    def decode(self, tokens: list[int]) -> np.ndarray:
        """Append a token to each row, and return the logits after it, f32 [rows, vocab]."""
        past = len(self._session.cache.positions)
        mask = np.arange(past + 1) >= past - self._lengths[:, None]
        ids = np.array(tokens, np.int64)[:, None]
        logits = self._session.decode(ids, mask.astype(np.int64), self._lengths[:, None])
        self._lengths = self._lengths + 1
        return logits[:, -1]


def merge(target: Session, sources: list[Session], lengths: np.ndarray) -> None:
    """Put the rows of sessions below each other into the state of another one, or of the first of them.

    Args:
        lengths: of all rows, the visible slots at the end of each.
    """
    caches: list[Any] = [source.cache for source in sources]
    states = [source.request.query_state() for source in sources if source.request]
    request, slots = target.request or target.model.compiled.create_infer_request(), int(lengths.max())
    ends = np.cumsum([cache.batch for cache in caches])
    for variable, *parts in zip(request.query_state(), *states, strict=True):
        # one at a time, as OpenVINO returns f32: 4 MB per row and 1000 tokens of the 11B, which has 64 of them
        tensors = [part.state for part in parts]
        joined = np.zeros((len(lengths), tensors[0].shape[1], slots, tensors[0].shape[3]), np.float32)
        for tensor, cache, end in zip(tensors, caches, ends, strict=True):
            visible: Any = cache.positions[-slots:]
            start = slots - len(visible)
            if visible[-1] - visible[0] + 1 == len(visible):  # slices are not copied first
                visible = slice(visible[0], visible[-1] + 1)
            rows = slice(None) if cache.beam_idx is None else cache.beam_idx
            joined[end - cache.batch : end, :, start:] = tensor.data[rows][:, :, visible]
        variable.state = ov.Tensor(joined)
    merged, views = OVCache(target), [cache.cross_attention for cache in caches]
    merged.append(np.zeros((len(lengths), slots), np.int64))
    merged.batch, merged.last_seen = len(lengths), np.zeros((len(lengths), 1, 0), bool)
    merged.image_keys = [key for cache in caches for key in row_keys(cache)]
    if len(set(merged.image_keys)) == 1:
        merged.cross_attention = views[0]  # one row for all
    else:
        merged.cross_attention = stack(views, [cache.batch for cache in caches])
    target.request, target.cache = request, merged


def row_keys(cache: OVCache) -> list[tuple[bytes, ...]]:
    """Return, for each row, a key of the image tiles that its next tokens see."""
    if not cache.last_seen.shape[-1]:
        return cache.image_keys
    return [(*keys, seen.tobytes()) for keys, seen in zip(cache.image_keys, cache.last_seen, strict=True)]
