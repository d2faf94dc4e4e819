"""The bookkeeping of one conversation's KV cache: which columns of a session's state count, and whose they are."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .cross_attention import CrossAttention
from .stats import GenerationStats


@dataclass
class Prompt:
    """What a prompt is, as far as another may begin like it.

    Attributes:
        input_ids: i64 [batch, query].
        attention_mask: i64 [batch, query]; None for all ones.
        position_ids: i64 [batch, query]; None for consecutive ones.
        seen: bool [batch, query, images * tiles], the tiles that each token may see. Without images: none.
        image_keys: what tells the images of each row from others, see `vision.image_keys`.
        logits_to_keep: how many of the last positions get logits.
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
        """One row, nothing padded, positions that count up: whatever begins alike is alike."""
        consecutive = self.position_ids is None or np.array_equal(
            self.position_ids[0], np.arange(self.input_ids.shape[1])
        )
        unpadded = self.attention_mask is None or bool(self.attention_mask.all())
        return len(self.input_ids) == 1 and consecutive and unpadded


class OVCache:
    """What `generate` may know of the KV cache, which itself never leaves the language IR.

    Nothing is ever cut out of the state: columns that no longer count (rejected drafts, an earlier end of the
    conversation) stay, hidden by a 0 in the attention mask.

    Attributes:
        session: the `language.Session` whose state holds the tokens; None before the prompt.
        positions: slot in the state of each token that counts.
        num_slots: slots in the state, hidden ones included.
        tokens: ids of the tokens that count; None for a prompt that cannot be a prefix (`Prompt.prefix_cacheable`).
        batch: rows of the prompt.
        seen: bool [tokens of the prompt, images * tiles], the tiles that each may see; later ones see as the last.
        last_seen: bool [batch, 1, images * tiles], the tiles that each row's later tokens see.
        image_keys: what tells the images of each row of the prompt from others.
        beam_idx: i32 [batch], the state row that each row continues; None for its own.
        cross_attention: the images as the tokens after the prompt read them.
        drafting: assisted decoding guesses tokens, see `activate_past_recording`.
        stats: `GenerationStats` of the prompt and the tokens since.
    """

    is_compileable = False  # generate asks: this is nothing for torch.compile

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

    # ---- What transformers calls ----

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return len(self.positions)

    def reorder_cache(self, beam_idx) -> None:
        """Between two steps of beam search: i64 tensor [batch], the row that each row goes on with."""
        self._take_rows(beam_idx.numpy())

    def activate_past_recording(self) -> None:
        """Assisted decoding calls it before its first step. The state keeps every column anyway, but from now on all
        tokens of a step whose logits are asked for, except the first, are drafts."""
        self.drafting = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, given as a negative number as for transformers' caches; 0 takes none."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes back tokens: give their number as a negative one.")
        self.truncate(max(len(self.positions) + tokens_to_remove, 0))
        self.stats.rejected_tokens -= tokens_to_remove

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, one beside the other."""
        self._take_rows(np.arange(self.batch).repeat(repeats))

    def batch_select_indices(self, indices) -> None:
        """Only these rows, i64 tensor [new batch]."""
        self._take_rows(np.arange(self.batch)[indices.numpy()])

    def _take_rows(self, rows: np.ndarray) -> None:
        self.beam_idx = (rows if self.beam_idx is None else self.beam_idx[rows]).astype(np.int32)
        keys, seen = [self.image_keys[row] for row in rows], self.last_seen[rows]
        # a beam never leaves its prompt: then the images, large as they are, stay where they are
        moved = keys != self.image_keys or not np.array_equal(seen, self.last_seen)
        if moved and self.cross_attention is not None:
            self.cross_attention = self.cross_attention.rows(rows)
        self.batch, self.tokens, self.image_keys, self.last_seen = len(rows), None, keys, seen

    def __len__(self) -> int:
        """Layers with something in them, as transformers' caches count; `get_seq_length` counts tokens."""
        shapes = self.session.model.shapes if self.session and self.positions else None
        return len(shapes.self_layers) + len(shapes.cross_layers) if shapes else 0

    def __bool__(self) -> bool:
        return True

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "This cache stays in OpenVINO's memory and can be neither copied nor pickled, and it need not be: call "
            "generate again with the whole text, and its beginning is found in the KV cache."
        )

    # ---- What a session calls ----

    def truncate(self, tokens: int) -> None:
        """Hides all but the first `tokens`."""
        if self.tokens is not None:  # first: what is reused goes by them, even if this is interrupted here
            del self.tokens[tokens:]
        del self.positions[tokens:]

    def append(self, input_ids: np.ndarray) -> None:
        """Notes i64 [batch, query] as tokens that are now in the state."""
        self.positions.extend(range(self.num_slots, self.num_slots + input_ids.shape[1]))
        self.num_slots += input_ids.shape[1]
        if self.tokens is not None and len(input_ids) == 1:
            self.tokens.extend(input_ids[0].tolist())
        else:
            self.tokens = None

    def hide(self, attention_mask: np.ndarray) -> np.ndarray:
        """A mask over the tokens that count and the new ones -> over all columns of the state and the new ones."""
        if self.num_slots == len(self.positions):
            return attention_mask
        new = attention_mask.shape[1] - len(self.positions)
        every_column = np.zeros((len(attention_mask), self.num_slots + new), np.int64)
        every_column[:, [*self.positions, *range(self.num_slots, self.num_slots + new)]] = attention_mask
        return every_column

    def common_prefix(self, prompt: Prompt, row_mask: bool = False) -> int:
        """How many tokens of a new prompt begin this one; at least those whose logits are asked for do not.

        Args:
            row_mask: a token depends only on the images that it and those before it see, so the images need to be the
                same only from where one is seen; without, from the first token on (`reference.Reference`).
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
    """Tokens of two prompts that see the same tiles of the same images, or no image: bool [tokens].

    Args:
        seen, others_seen: bool [tokens, images * tiles]; keys, others_keys: of the images, in order.
    """
    pairs = zip(keys, others_keys, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    tiles = shared and shared * (seen.shape[1] // len(keys))  # of the images that both begin with
    same = (seen[:, :tiles] == others_seen[:, :tiles]).all(-1)
    return same & ~seen[:, tiles:].any(-1) & ~others_seen[:, tiles:].any(-1)
