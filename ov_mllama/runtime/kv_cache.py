"""Bookkeeping of a session's KV cache: the slots of its state that hold tokens, and of which prompt."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino as ov

from .cross_attention import CrossAttention
from .errors import InputError
from .stats import GenerationStats


@dataclass
class Prompt:
    """A prompt, and what makes another one share its prefix.

    Attributes:
        input_ids: i64 [batch, query].
        attention_mask: i64 [batch, query]; None for all ones.
        position_ids: i64 [batch, query]; None for consecutive ones.
        seen: bool [batch, query, images * tiles], the tiles that each token sees; empty without images.
        image_keys: of each row, see `vision.image_keys`.
        logits_to_keep: number of last positions that get logits.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray | None = None
    position_ids: np.ndarray | None = None
    seen: np.ndarray = field(default_factory=lambda: np.zeros((1, 1, 0), bool))
    image_keys: list[tuple[bytes, ...]] = field(default_factory=list)
    logits_to_keep: int = 1

    def __post_init__(self):
        if not self.seen.shape[-1]:
            self.seen = np.zeros((*self.input_ids.shape, 0), bool)
        self.image_keys = self.image_keys or [()] * len(self.input_ids)

    @property
    def prefix_cacheable(self) -> bool:
        """True if another prompt may share a prefix: one row, unpadded, consecutive positions."""
        consecutive = self.position_ids is None or np.array_equal(
            self.position_ids[0], np.arange(self.input_ids.shape[1])
        )
        unpadded = self.attention_mask is None or bool(self.attention_mask.all())
        return len(self.input_ids) == 1 and consecutive and unpadded


class OVCache:
    """Handle of a KV cache for `generate`; the cache itself stays in the state of the language IR.

    The state only grows: slots of removed tokens (rejected drafts, another end of the conversation) stay, hidden by a 0
    in the attention mask.

    Attributes:
        session: the `language.Session` whose state holds the tokens; None before the prompt.
        positions: slot of each token in the state.
        num_slots: slots in the state, hidden ones included.
        tokens: token ids; None for a prompt that cannot be a prefix (`Prompt.prefix_cacheable`).
        batch: rows of the prompt.
        seen: bool [tokens of the prompt, images * tiles], the tiles that each sees; later ones see as the last.
        last_seen: bool [batch, 1, images * tiles], the tiles that each row's later tokens see.
        image_keys: of the prompt.
        beam_idx: i32 [batch], the state row that each row continues; None for its own.
        cross_attention: image K/V for the tokens after the prompt.
        drafting: assisted decoding is on, see `activate_past_recording`.
        stats: `GenerationStats` of the prompt and the tokens since.
        queries: `attention_maps.AnswerQueries` that records those of each step; None: they are not read.
    """

    is_compileable = False  # by torch.compile

    def __init__(self, session=None):
        self.session: Any = session
        self.positions: list[int] = []
        self.num_slots = 0
        self.tokens: list[int] | None = []
        self.batch = 0
        self.seen = np.zeros((1, 0), bool)
        self.last_seen = np.zeros((1, 1, 0), bool)
        self.image_keys: list[tuple[bytes, ...]] = [()]
        self.beam_idx: np.ndarray | None = None
        self.cross_attention: CrossAttention | None = None
        self.drafting = False
        self.stats = GenerationStats()
        self.queries: Any = None

    # ---- Called by transformers ----

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return len(self.positions)

    def reorder_cache(self, beam_idx) -> None:
        """Select the row that each row continues, i64 tensor [batch], between two steps of beam search."""
        self._take_rows(beam_idx.numpy())

    def activate_past_recording(self) -> None:
        """Begin assisted decoding: of each step's tokens with logits, all but the first are drafts."""
        self.drafting = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, given as a negative number as for transformers' caches."""
        if tokens_to_remove > 0:
            raise InputError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative one.")
        self.truncate(max(len(self.positions) + tokens_to_remove, 0))
        self.stats.rejected_tokens -= tokens_to_remove

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take_rows(np.arange(self.batch).repeat(repeats))

    def batch_select_indices(self, indices) -> None:
        self._take_rows(np.arange(self.batch)[indices.numpy()])

    def _take_rows(self, rows: np.ndarray) -> None:
        self.beam_idx = (rows if self.beam_idx is None else self.beam_idx[rows]).astype(np.int32)
        keys, seen = [self.image_keys[row] for row in rows], self.last_seen[rows]
        # beams of one prompt share its images, which are large and not copied
        moved = keys != self.image_keys or not np.array_equal(seen, self.last_seen)
        if moved and self.cross_attention is not None:
            self.cross_attention = self.cross_attention.rows(rows)
        self.batch, self.tokens, self.image_keys, self.last_seen = len(rows), None, keys, seen

    def __len__(self) -> int:
        """Return the number of layers, as transformers' caches do; 0 when empty."""
        shapes = self.session.model.shapes if self.session and self.positions else None
        return len(shapes.self_layers) + len(shapes.cross_layers) if shapes else 0

    def __bool__(self) -> bool:
        return True

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "A KV cache in OpenVINO's memory can be neither copied nor pickled: call generate again with the complete "
            "text, whose prefix is found in the KV cache."
        )

    # ---- Called by a session ----

    def truncate(self, tokens: int) -> None:
        """Hide all but the first `tokens`."""
        if self.tokens is not None:  # first: prefixes go by them, even if interrupted here
            del self.tokens[tokens:]
        del self.positions[tokens:]

    def append(self, input_ids: np.ndarray) -> None:
        """Record tokens, i64 [batch, query], that are now in the state."""
        self.positions.extend(range(self.num_slots, self.num_slots + input_ids.shape[1]))
        self.num_slots += input_ids.shape[1]
        if self.tokens is not None and len(input_ids) == 1:
            self.tokens.extend(input_ids[0].tolist())
        else:
            self.tokens = None

    def hide(self, attention_mask: np.ndarray) -> np.ndarray:
        """Extend an attention mask over the tokens by a 0 for each hidden slot."""
        if self.num_slots == len(self.positions):
            return attention_mask
        new = attention_mask.shape[1] - len(self.positions)
        by_slot = np.zeros((len(attention_mask), self.num_slots + new), np.int64)
        by_slot[:, [*self.positions, *range(self.num_slots, self.num_slots + new)]] = attention_mask
        return by_slot

    def continues(self, other: "OVCache") -> bool:
        """Return whether all tokens of another cache, about the same images, begin these."""
        if not self.tokens or not other.tokens or self.image_keys != other.image_keys:
            return False
        return self.tokens[: len(other.tokens)] == other.tokens

    def common_prefix(self, prompt: Prompt, row_mask: bool = False) -> int:
        """Return the length of the prefix that a new prompt shares, its tokens with logits excluded.

        Args:
            row_mask: tokens that see no image depend on none, so images matter only where one is seen; else from the
                first token on (`reference.Reference`).
        """
        if self.tokens is None or not prompt.prefix_cacheable:
            return 0
        if prompt.image_keys != self.image_keys and not row_mask:
            return 0
        length = max(min(len(self.tokens), prompt.input_ids.shape[1] - prompt.logits_to_keep), 0)
        same = np.array(self.tokens[:length]) == prompt.input_ids[0, :length]
        rows = np.minimum(np.arange(length), len(self.seen) - 1)
        same &= see_alike(self.seen[rows], self.image_keys[0], prompt.seen[0, :length], prompt.image_keys[0])
        return length if same.all() else int(same.argmin())


def see_alike(
    seen: np.ndarray, keys: tuple[bytes, ...], others_seen: np.ndarray, others_keys: tuple[bytes, ...]
) -> np.ndarray:
    """Mark tokens of two prompts that see the same tiles of the same images, or no image: bool [tokens]."""
    pairs = zip(keys, others_keys, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    tiles = shared and shared * (seen.shape[1] // len(keys))  # of the common first images
    same = (seen[:, :tiles] == others_seen[:, :tiles]).all(-1)
    return same & ~seen[:, tiles:].any(-1) & ~others_seen[:, tiles:].any(-1)


def kv_cache_bits(compiled: ov.CompiledModel) -> int:
    """Return the bits per number in the KV cache; 32 if the device does not tell."""
    if "KV_CACHE_PRECISION" in compiled.get_property("SUPPORTED_PROPERTIES"):
        return compiled.get_property("KV_CACHE_PRECISION").bitwidth
    return 32
