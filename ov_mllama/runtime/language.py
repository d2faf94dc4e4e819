"""Language model: one compiled IR, and sessions that each have a KV cache of their own.

prompt, encoded images -> Session.prefill -> logits -> Session.decode -> logits -> ...
"""

import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino as ov

from .cross_attention import CrossAttention, DeviceTensors, no_images, read_in_bf16, to_ov_tensor, visible_kv
from .devices import choose
from .errors import InputError
from .inference import Progress, check_stop
from .ir import ir_stamp
from .kv_cache import OVCache, Prompt, kv_cache_bits
from .shapes import QUERIES, MllamaShapes
from .vision import Encoded, check_finite

# Tokens of a prefill step, all rows together: a cancellation waits for it, 2.8 s with the 11B on two cores. It adds a
# tenth to the time of long prompts; 64 tokens would add a fifth, 32 two fifths (benchmarks/README.md).
PREFILL_TOKENS = 128
NO_SEQUENCE = "No active sequence (none started, or a step failed): call `prefill` first."


def prefill_step(batch: int) -> int:
    """Return the tokens per row of a prefill step."""
    return max(1, PREFILL_TOKENS // batch)


def language_inputs(
    input_ids: np.ndarray,
    cross_attention: CrossAttention | None = None,
    attention_mask: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
    beam_idx: np.ndarray | None = None,
    past: int = 0,
    logits_to_keep: int = 1,
) -> dict[str, np.ndarray]:
    """Return all inputs of the language IR, by port name.

    Args:
        input_ids: i64 [batch, query].
        cross_attention: None for a plain Llama, whose IR takes no images.
        attention_mask: i64 [batch, past + query]; default all ones.
        position_ids: i64 [batch, query]; default consecutive after `past`.
        beam_idx: i32 [batch], state row that each row continues; default its own.
        past: slots in the state.
        logits_to_keep: number of last positions that get logits.
    """
    batch, query = input_ids.shape
    if attention_mask is None:
        attention_mask = np.ones((batch, past + query), np.int64)
    if position_ids is None:
        position_ids = np.arange(past, past + query)[None].repeat(batch, 0)
    inputs = {
        # copied: OpenVINO uses their memory after the call, and a later request may write there
        "input_ids": np.array(input_ids, np.int64),
        "attention_mask": np.array(attention_mask, np.int64),
        "position_ids": np.array(np.broadcast_to(position_ids, (batch, query)), np.int64),
        "beam_idx": np.arange(batch, dtype=np.int32) if beam_idx is None else beam_idx,
        "logits_to_keep": np.array(logits_to_keep, np.int64),
    }
    if cross_attention:
        inputs |= {"cross_attention_bias": cross_attention.bias, "sees_image": cross_attention.sees_image}
        inputs |= {name: to_ov_tensor(array) for name, array in cross_attention.key_values.items()}
    return inputs


class OVLanguageModel:
    """Compiled weights, shared by sessions.

    Args:
        path: of the IR.
        shapes: of the checkpoint; without cross-attention layers the model is a plain Llama.
        device, ov_config: as for `OVMLlamaForConditionalGeneration`.
        stamp: the IR's, if read already.
        device_memory: put the K/V that a session reads into a GPU's memory, see `DeviceTensors`.

    Attributes:
        chosen: precision and its reason (`devices.choose`).
        reads_bf16: whether the inputs for image K/V are bf16.
        row_mask: tokens that see no image do not depend on any (`reference.Reference`).
    """

    def __init__(
        self,
        path: str | Path,
        shapes: MllamaShapes,
        device: str = "CPU",
        ov_config: dict | None = None,
        stamp: dict[str, str] | None = None,
        device_memory: bool = False,
    ):
        self.shapes = shapes
        self.turn = threading.RLock()  # all sessions share one graph
        stamp = ir_stamp(Path(path)) if stamp is None else stamp
        self.chosen = choose("language", stamp, device, ov_config)
        self.reads_bf16 = self.chosen.bf16
        self.row_mask = stamp.get("row_mask") == "on"
        self._ir = (path, device, self.chosen.properties)
        self._compiled: ov.CompiledModel | None = None
        self._cache_bits = 32  # until it is compiled
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self.context = self.compiled.get_context() if device_memory and device.startswith("GPU") else None

    @property
    def compiled(self) -> ov.CompiledModel:
        """The compiled model, compiled again after a failed inference (see `infer`)."""
        if self._compiled is None:
            model, device, properties = self._ir
            if self.reads_bf16:
                model = read_in_bf16(ov.Core().read_model(model), self.shapes.cross_kv_names)
            self._compiled = ov.Core().compile_model(model, device, properties)
            # read now: during an inference this call would block, and Python with it
            self._cache_bits = kv_cache_bits(self._compiled)
        return self._compiled

    def session(self) -> "Session":
        """Create a session with an empty KV cache."""
        session = Session(self)
        self._sessions.add(session)
        return session

    def infer(self, request: ov.InferRequest, inputs: dict[str, np.ndarray]) -> float:
        """Run one step of a session and return its seconds; it is never cancelled, and if it fails, all sessions are
        reset and the model is compiled again.

        A failed or cancelled inference corrupts OpenVINO's CPU plugin (2026.4): all requests share one graph, whose
        nodes then hold shapes and buffers of two different calls, and give wrong numbers silently or crash the process,
        even after inferences of other shapes (tests/runtime/test_recovery.py). `Session.prefill` therefore checks
        `stop` between chunks only. Ctrl-C is no failure: Python raises it after the inference.
        """
        with self.turn:
            started = time.perf_counter()
            try:
                request.infer(inputs, share_inputs=True)
                rows, expected = request.get_tensor("logits").shape[0], len(inputs["input_ids"])
                if rows != expected:  # seen once (0 for 1), in a graph that an earlier call had corrupted
                    raise RuntimeError(f"OpenVINO returned {rows} rows for {expected}: the model is compiled again.")
            except Exception:
                for session in list(self._sessions):
                    session.reset()
                self._compiled = None
                raise
            return time.perf_counter() - started

    def warm_up(self) -> float:
        """Run once, as CPUs repack compressed weights at the first inference, and return its seconds."""
        view = no_images(self.shapes) if self.shapes.cross_layers else None
        view = view.in_bf16() if view and self.reads_bf16 else view
        return self.infer(self.compiled.create_infer_request(), language_inputs(np.zeros((1, 1), np.int64), view))

    @property
    def gives_queries(self) -> bool:
        """True if the IR returns its cross-attention's queries; those of earlier versions do not."""
        return any(QUERIES in port.get_names() for port in self.compiled.outputs)

    @property
    def token_bytes(self) -> float:
        """Bytes of one token of one row in a KV cache."""
        return 2 * len(self.shapes.self_layers) * self.shapes.num_kv_heads * self.shapes.head_dim * self._cache_bits / 8


class Session:
    """One sequence (or batch): an infer request whose state is the KV cache.

    Attributes:
        cache: bookkeeping of the tokens in the state; None before the first prompt and after a failed step.
        request: infer request with the state; created by the first step.
    """

    def __init__(self, model: OVLanguageModel):
        self.model = model
        self.cache: OVCache | None = None
        self.request: ov.InferRequest | None = None
        self._device_tensors = DeviceTensors(model.context) if model.context else None

    def prefill(
        self,
        prompt: Prompt,
        encoded: Encoded | None = None,
        cache: OVCache | None = None,
        stop: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Compute a prompt, except for its prefix in the KV cache.

        Args:
            encoded: the prompt's images; None for text only, and if `holds_images`.
            cache: an empty one to fill, which becomes `self.cache`; default a new one.
            stop: cancels after the current `PREFILL_TOKENS`; those computed stay in the KV cache.
            progress: updated with the number of tokens left.
        Returns:
            logits f32 [batch, prompt.logits_to_keep, vocab].
        Raises:
            Cancelled: if `stop` was set.
        """
        logits = [rows for rows in self.chunks(prompt, encoded, cache or OVCache(), stop, progress) if rows is not None]
        return logits[0] if len(logits) == 1 else np.concatenate(logits, axis=1)

    def chunks(
        self, prompt: Prompt, encoded: Encoded | None, cache: OVCache, stop=None, progress=None, step: int = 0
    ) -> Iterator[np.ndarray | None]:
        """Compute a prompt as `prefill` does, `step` tokens of each row at a time (default `prefill_step`); yield after
        each chunk the logits of its tokens, or None if they need none."""
        reused, previous, self.cache = self.reusable(prompt), self.cache, None
        cache.session, cache.batch, cache.image_keys = self, len(prompt.input_ids), prompt.image_keys
        cache.seen, cache.last_seen = prompt.seen[0], prompt.seen[:, -1:]
        if reused and previous:
            previous.truncate(reused)
            cache.positions, cache.tokens = [*previous.positions], [*(previous.tokens or ())]
            cache.num_slots = previous.num_slots
        else:
            cache.positions, cache.tokens, cache.num_slots = [], [], 0
            if self.request:
                self.request.reset_state()
        cache.stats.reused_tokens = reused
        cache.tokens = cache.tokens if prompt.prefix_cacheable else None
        rest = prompt.seen[:, reused:]
        same_images = previous is not None and previous.image_keys == cache.image_keys
        if reused and previous and same_images and np.array_equal(previous.last_seen, cache.last_seen):
            view = previous.cross_attention
        else:
            if previous:
                previous.cross_attention = None  # 0.1 GB per tile of the 11B: not both at once
            view = self.view(encoded, cache.last_seen)
        cache.cross_attention = view
        if not (rest == cache.last_seen).all():
            view = self.view(encoded, rest)
        length, seconds, progress = prompt.input_ids.shape[1], 0.0, progress or Progress()
        step = step or prefill_step(cache.batch)
        for start in range(reused, length, step):
            check_stop(stop)
            progress.enter(f"Reading {length - start} tokens")
            chunk = slice(start, min(start + step, length))
            same = (prompt.seen[:, chunk] == cache.last_seen).all()
            read = cache.cross_attention if same else view and view.tokens(slice(start - reused, chunk.stop - reused))
            mask = None if prompt.attention_mask is None else prompt.attention_mask[:, : chunk.stop]
            positions = None if prompt.position_ids is None else prompt.position_ids[:, chunk]
            needed = min(prompt.logits_to_keep - (length - chunk.stop), chunk.stop - start)  # of this chunk
            rows, took = self._compute(cache, prompt.input_ids[:, chunk], read, mask, positions, max(needed, 1))
            seconds += took
            if chunk.stop == length:
                cache.stats.count_step(seconds)
                progress.enter("Writing")
            yield rows if needed > 0 else None

    def decode(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
        logits_to_keep: int = 1,
    ) -> np.ndarray:
        """Return logits f32 [batch, logits_to_keep, vocab] of tokens that follow those in the KV cache.

        Args:
            input_ids: i64 [batch, query].
            attention_mask: i64 [batch, past + query], default all ones; past counts tokens, not hidden slots.
            position_ids: i64 [batch, query], default consecutive.
        Raises:
            InputError: if there is no active sequence.
        """
        cache = self.cache
        if cache is None:
            raise InputError(NO_SEQUENCE)
        past = len(cache.positions)
        in_order = position_ids is None or np.array_equal(position_ids[0], np.arange(past, past + input_ids.shape[1]))
        if not in_order or (attention_mask is not None and not attention_mask.all()):
            cache.tokens = None  # no prefix for other prompts
        view = cache.cross_attention
        logits, seconds = self._compute(cache, input_ids, view, attention_mask, position_ids, logits_to_keep)
        cache.stats.count_step(seconds)
        return logits

    def reusable(self, prompt: Prompt) -> int:
        """Return the length of a prompt's prefix in the state; 0 if shorter than half of it, as each step also reads
        the hidden slots."""
        shared = self.cache.common_prefix(prompt, self.model.row_mask) if self.cache else 0
        return shared if 2 * shared >= self.cache_size else 0

    def holds_images(self, prompt: Prompt) -> bool:
        """Return whether the session has the image K/V for a prompt's new tokens, so that none is encoded."""
        cache, reused = self.cache, self.reusable(prompt)
        if not cache or not reused or prompt.image_keys != cache.image_keys:
            return False
        return bool((prompt.seen[:, reused:] == cache.last_seen).all())

    @property
    def cache_size(self) -> int:
        """Slots in the state, of all rows."""
        return self.cache.num_slots * self.cache.batch if self.cache else 0

    @property
    def held_bytes(self) -> float:
        """Bytes of the KV cache and of the image K/V, which are often more."""
        if self.cache is None:
            return 0
        view = self.cache.cross_attention if self.cache.last_seen.shape[-1] else None
        size = 2 if self.model.reads_bf16 else 4
        images = sum(size * int(np.prod(array.shape)) for array in view.key_values.values()) if view else 0
        return self.model.token_bytes * self.cache_size + images

    def reset(self) -> None:
        """Drop the sequence and the request, which holds the memory of its last inputs."""
        self.cache = self.request = None

    def view(self, encoded: Encoded | None, seen: np.ndarray) -> CrossAttention | None:
        """Return the image K/V for tokens that see tiles, bool [batch, query, images * tiles]; None for a Llama."""
        shapes = self.model.shapes
        if not shapes.cross_layers:
            return None
        view = visible_kv(encoded, seen, shapes, self.model.row_mask) if encoded else no_images(shapes)
        view = view.in_bf16() if self.model.reads_bf16 else view
        return self._device_tensors.place(view) if self._device_tensors else view

    def _compute(
        self, cache: OVCache, input_ids, view, attention_mask, position_ids, logits_to_keep
    ) -> tuple[np.ndarray, float]:
        """Add tokens to the state and to `cache`; return their logits and the seconds.

        Raises:
            InputError: if there is no active sequence.
        """
        past = len(cache.positions)
        if attention_mask is None:
            attention_mask = np.ones((len(input_ids), past + input_ids.shape[1]), np.int64)
        inputs = language_inputs(
            input_ids, view, cache.hide(attention_mask), position_ids, cache.beam_idx, past, logits_to_keep
        )
        with self.model.turn:
            if past and self.request is None:
                raise InputError(NO_SEQUENCE)
            request = self.request = self.request or self.model.compiled.create_infer_request()
            self.cache = None  # until the step succeeds
            seconds = self.model.infer(request, inputs)
            # copied: the next step writes into the same memory
            logits = request.get_tensor("logits").data.copy()
            check_finite(logits, "logits")
            cache.append(input_ids)
            cache.beam_idx = None
            if cache.queries is not None:
                cache.queries.record(len(cache.positions), request.get_tensor(QUERIES).data)
            self.cache = cache
        return logits, seconds
