"""What `generate` knows of the model besides its logits: a cache whose contents stay in the language IR, token ids
without logits kept from code that cannot bear them, and what a call cost in numbers that a person can read."""

import sys
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator

try:
    import resource
except ImportError:  # Windows has none
    resource = None


@dataclass
class GenerationStats:
    """Of the prompt begun last and the tokens since; `print(stats)` is one line, `stats.to_dict()` feeds plots.

    Attributes:
        load_s, warm_up_s: of the model, once: reading and compiling both IRs; the inference that repacks the weights.
        images, images_kept: different pictures of the prompt, and how many of them were kept encoded from before.
        vision_s: seconds to encode the others.
        prompt_tokens, reused_tokens: length of the prompt, and of its beginning that was still in the KV cache.
        prefill_s: seconds of the language model on the rest of the prompt.
        step_s: seconds of each of its later steps.
        drafted_tokens, rejected_tokens: with assisted decoding, tokens guessed and guessed wrong.
    """

    load_s: float = 0.0
    warm_up_s: float = 0.0
    images: int = 0
    images_kept: int = 0
    vision_s: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    drafted_tokens: int = 0
    rejected_tokens: int = 0

    @property
    def accepted_tokens(self) -> int:
        """Tokens guessed right: each saved a step."""
        return self.drafted_tokens - self.rejected_tokens

    @property
    def new_tokens(self) -> int:
        """Tokens of the answer so far."""
        return 1 + len(self.step_s) + self.accepted_tokens if self.prefill_s else 0

    @property
    def first_token_s(self) -> float:
        """Seconds from the processor's tensors to the first token."""
        return self.vision_s + self.prefill_s

    @property
    def token_s(self) -> float:
        """Seconds per token after the first; 0 before there is one."""
        return sum(self.step_s) / (self.new_tokens - 1) if self.new_tokens > 1 else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first; 0 before there is one."""
        return 1 / self.token_s if self.token_s else 0.0

    @property
    def peak_gb(self) -> float | None:
        """The most memory that this process ever held, GB, mapped files included; None on Windows."""
        if resource is None:
            return None
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    def to_dict(self) -> dict:
        """All attributes and everything derived from them, as plain numbers and lists."""
        derived = ("accepted_tokens", "new_tokens", "first_token_s", "token_s", "tokens_per_s", "peak_gb")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def __str__(self) -> str:
        line = [f"{self.first_token_s:.2g} s to the first token"]
        if self.images:
            encoded = f" {self.vision_s:.2g} s" if self.images > self.images_kept else ""
            kept = f", {self.images_kept} kept" if self.images_kept else ""
            line[0] += f" ({self.images} picture{'s' * (self.images > 1)}{encoded}{kept})"
        if self.tokens_per_s:
            line.append(f"{self.tokens_per_s:.{1 if self.tokens_per_s < 10 else 0}f} tokens per second")
        reused = f", {self.reused_tokens} reused" if self.reused_tokens else ""
        line.append(f"{self.prompt_tokens} tokens asked{reused}, {self.new_tokens} answered")
        if self.drafted_tokens:
            line.append(f"{self.accepted_tokens} of {self.drafted_tokens} drafts accepted")
        return " · ".join(line)


class OVCache:
    """What `generate` may know of the KV cache, which itself never leaves the language IR.

    Nothing is ever cut out of the state: columns that no longer count (rejected drafts, an earlier end of the
    conversation) stay, hidden by a 0 in the attention mask.

    Attributes:
        columns: for each token that counts, its column in the state.
        size: columns in the state, hidden ones included.
        tokens: ids of the tokens that count; None for a batch, whose rows are not told apart.
        seen: bool [tokens of the prompt, images * tiles], the tiles that each may see; later ones see as the last.
        pictures: what tells the prompt's pictures from others.
        beam_idx: i32 [batch], the state row that each row continues; None for its own.
        cross_attention: the pictures as the tokens after the prompt read them (`ov_mllama_vision.CrossAttention`).
        stats: `GenerationStats` of the prompt and the tokens since.
    """

    is_compileable = False  # generate asks: this is nothing for torch.compile

    def __init__(self):
        self.columns: list[int] = []
        self.size = 0
        self.tokens: list[int] | None = []
        self.seen = np.zeros((1, 0), bool)
        self.pictures: tuple[bytes, ...] = ()
        self.beam_idx: np.ndarray | None = None
        self.cross_attention = None
        self.stats = GenerationStats()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return len(self.columns)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Between two steps of beam search. The pictures stay: a beam never leaves its prompt."""
        self.beam_idx = beam_idx.numpy().astype(np.int32)

    def activate_past_recording(self) -> None:
        """Called by assisted decoding before the first `crop`; the state keeps every column anyway."""

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, given as a negative number as for transformers' caches; 0 takes none."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes back tokens: give their number as a negative one.")
        self.keep(len(self.columns) + tokens_to_remove)
        self.stats.rejected_tokens -= tokens_to_remove

    def keep(self, tokens: int) -> None:
        """Hides all but the first `tokens`."""
        del self.columns[tokens:]
        if self.tokens is not None:
            del self.tokens[tokens:]

    def append(self, input_ids: np.ndarray) -> None:
        """Notes i64 [batch, query] as tokens that are now in the state."""
        self.columns.extend(range(self.size, self.size + input_ids.shape[1]))
        self.size += input_ids.shape[1]
        if self.tokens is not None and len(input_ids) == 1:
            self.tokens.extend(input_ids[0].tolist())
        else:
            self.tokens = None

    def hide(self, attention_mask: np.ndarray) -> np.ndarray:
        """A mask over the tokens that count and the new ones -> over all columns of the state and the new ones."""
        if self.size == len(self.columns):
            return attention_mask
        new = attention_mask.shape[1] - len(self.columns)
        every_column = np.zeros((len(attention_mask), self.size + new), np.int64)
        every_column[:, [*self.columns, *range(self.size, self.size + new)]] = attention_mask
        return every_column

    def common_prefix(self, input_ids: np.ndarray, seen: np.ndarray, pictures: tuple[bytes, ...]) -> int:
        """How many tokens of a new prompt (i64 [query], what they see: bool [query, images * tiles]) begin this one."""
        if self.tokens is None or pictures != self.pictures:
            return 0
        length = min(len(self.tokens), len(input_ids))
        same = np.array(self.tokens[:length]) == input_ids[:length]
        rows = np.minimum(np.arange(length), len(self.seen) - 1)
        same &= (self.seen[rows] == seen[:length]).all(-1)
        return length if same.all() else int(same.argmin())


def in_vocabulary(input_ids: torch.LongTensor, vocab_size: int) -> torch.LongTensor:
    """Ids [batch, tokens] in which each row's first token that has a logit (BOS or padding) stands for those without.

    `<|image|>` has an embedding but no logit, and much of transformers' code indexes logits by token ids.
    """
    first = (input_ids < vocab_size).int().argmax(dim=1, keepdim=True)
    return torch.where(input_ids < vocab_size, input_ids, input_ids.gather(1, first)).clamp(max=vocab_size - 1)


class InVocabularyDrafts(CandidateGenerator):
    """Drafts for assisted decoding by a generator that sees no token id outside the logits.

    Args:
        drafts: the generator.
        vocab_size: how many logits there are.
        back_off: after a draft of which nothing was right, do without for 1, 3, 7, then 15 steps, so that text that
            does not repeat the prompt costs next to nothing more. Not for an assistant model: it has its own schedule,
            and a cache that wants to see every step.
    """

    LONGEST_PAUSE = 15

    def __init__(self, drafts: CandidateGenerator, vocab_size: int, back_off: bool):
        self.drafts, self.vocab_size, self.back_off = drafts, vocab_size, back_off
        self.pause = self.remaining = 0

    @property
    def requires_model_outputs(self) -> bool:
        return self.drafts.requires_model_outputs

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs):
        if self.remaining:
            self.remaining -= 1
            return input_ids, None
        candidates, logits = self.drafts.get_candidates(in_vocabulary(input_ids, self.vocab_size), **kwargs)
        return torch.cat([input_ids, candidates[:, input_ids.shape[1] :]], dim=1), logits

    def update_candidate_strategy(self, input_ids, scores, num_matches) -> None:
        drafted = scores.shape[1] - 1
        if self.back_off and drafted:
            self.pause = 0 if num_matches else min(2 * self.pause + 1, self.LONGEST_PAUSE)
            self.remaining = self.pause
        self.drafts.update_candidate_strategy(input_ids, scores, num_matches)


class InVocabularyProcessors(LogitsProcessorList):
    """Logits processors that see no token id outside the logits."""

    def __call__(self, input_ids, scores, **kwargs):
        return super().__call__(in_vocabulary(input_ids, scores.shape[-1]), scores, **kwargs)
