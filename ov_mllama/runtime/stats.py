"""Timing and token statistics of one `generate` call."""

import sys
from dataclasses import asdict, dataclass, field

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]


@dataclass
class GenerationStats:
    """Statistics of the last prompt and the tokens since; `print(stats)` is one line, `stats.to_dict()` feeds plots.

    Attributes:
        load_s, warm_up_s: of the model, once: reading and compiling both IRs; the inference that repacks the weights.
        image_s: seconds for each different image of the prompt, about 0 for cached ones.
        images_cached: number of them that were in the cache.
        prompt_tokens, reused_tokens: length of the prompt, and of its prefix in the KV cache.
        prefill_s: seconds of the language model on the rest of the prompt.
        step_s: seconds of each later step.
        drafted_tokens, rejected_tokens: of assisted decoding.
        draft_prompt_s: seconds of a draft model on the prompt and its first draft.
        draft_s: seconds of its later drafts.
    """

    load_s: float = 0.0
    warm_up_s: float = 0.0
    image_s: list[float] = field(default_factory=list)
    images_cached: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    drafted_tokens: int = 0
    rejected_tokens: int = 0
    draft_prompt_s: float = 0.0
    draft_s: float = 0.0

    @property
    def images(self) -> int:
        """Number of different images in the prompt."""
        return len(self.image_s)

    @property
    def vision_s(self) -> float:
        return sum(self.image_s)

    @property
    def accepted_tokens(self) -> int:
        """Drafted tokens that were right; each saved a step."""
        return self.drafted_tokens - self.rejected_tokens

    @property
    def new_tokens(self) -> int:
        """Tokens of the answer so far."""
        return 1 + len(self.step_s) + self.accepted_tokens if self.prefill_s else 0

    @property
    def first_token_s(self) -> float:
        """Seconds from the processor's tensors to the first token."""
        return self.vision_s + self.draft_prompt_s + self.prefill_s

    @property
    def token_s(self) -> float:
        """Seconds per token after the first; 0 before there is one."""
        return (sum(self.step_s) + self.draft_s) / (self.new_tokens - 1) if self.new_tokens > 1 else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first; 0 before there is one."""
        return 1 / self.token_s if self.token_s else 0.0

    @property
    def peak_gb(self) -> float | None:
        """Peak resident memory of this process in GB, mapped files included; None on Windows."""
        if resource is None:
            return None
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    def count_step(self, seconds: float) -> None:
        """Add a step of the language model; the first is the prompt's."""
        if self.prefill_s:
            self.step_s.append(seconds)
        else:
            self.prefill_s = seconds

    def to_dict(self) -> dict:
        """Return all attributes and properties as plain numbers and lists."""
        derived = ["images", "vision_s", "accepted_tokens", "new_tokens"]
        derived += ["first_token_s", "token_s", "tokens_per_s", "peak_gb"]
        return asdict(self) | {name: getattr(self, name) for name in derived}

    @property
    def times(self) -> str:
        """Time to first token and tokens per second, for display."""
        first = f"{self.first_token_s:.2g} s to the first token"
        if self.images:
            encoded = f" {self.vision_s:.2g} s" if self.images > self.images_cached else ""
            cached = f", {self.images_cached} cached" if self.images_cached else ""
            first += f" ({self.images} picture{'s' * (self.images > 1)}{encoded}{cached})"
        speed = f" · {self.tokens_per_s:.{1 if self.tokens_per_s < 10 else 0}f} tokens per second"
        return first + speed * bool(self.tokens_per_s)

    def __str__(self) -> str:
        reused = f", {self.reused_tokens} reused" if self.reused_tokens else ""
        parts = [self.times, f"{self.prompt_tokens} prompt tokens{reused}, {self.new_tokens} generated"]
        if self.drafted_tokens:
            parts.append(f"{self.accepted_tokens} of {self.drafted_tokens} drafts accepted")
        return " · ".join(parts)
