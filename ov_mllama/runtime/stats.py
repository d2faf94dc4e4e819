"""What a call cost, in numbers that a person can read."""

import sys
from dataclasses import asdict, dataclass, field

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]


@dataclass
class GenerationStats:
    """Of the prompt begun last and the tokens since; `print(stats)` is one line, `stats.to_dict()` feeds plots.

    Attributes:
        load_s, warm_up_s: of the model, once: reading and compiling both IRs; the inference that repacks the weights.
        image_s: seconds that each different image of the prompt took or was waited for, next to nothing for those kept.
        images_kept: how many of them were encoded before, or meanwhile by `encode_images`.
        prompt_tokens, reused_tokens: length of the prompt, and of its beginning that was still in the KV cache.
        prefill_s: seconds of the language model on the rest of the prompt.
        step_s: seconds of each of its later steps.
        drafted_tokens, rejected_tokens: with assisted decoding, tokens guessed and guessed wrong.
        draft_prompt_s: seconds that a draft model took to read the prompt and guess for the first time.
        draft_s: seconds that it took to guess after that.
    """

    load_s: float = 0.0
    warm_up_s: float = 0.0
    image_s: list[float] = field(default_factory=list)
    images_kept: int = 0
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
        """Different images of the prompt."""
        return len(self.image_s)

    @property
    def vision_s(self) -> float:
        """Seconds for all of them."""
        return sum(self.image_s)

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
        """The most memory that this process ever held, GB, mapped files included; None on Windows."""
        if resource is None:
            return None
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    def count_step(self, seconds: float) -> None:
        """Notes a step of the language model; the first is the prompt's."""
        if self.prefill_s:
            self.step_s.append(seconds)
        else:
            self.prefill_s = seconds

    def to_dict(self) -> dict:
        """All attributes and everything derived from them, as plain numbers and lists."""
        derived = ["images", "vision_s", "accepted_tokens", "new_tokens"]
        derived += ["first_token_s", "token_s", "tokens_per_s", "peak_gb"]
        return asdict(self) | {name: getattr(self, name) for name in derived}

    @property
    def times(self) -> str:
        """How long it took, in a few words."""
        first = f"{self.first_token_s:.2g} s to the first token"
        if self.images:
            encoded = f" {self.vision_s:.2g} s" if self.images > self.images_kept else ""
            kept = f", {self.images_kept} kept" if self.images_kept else ""
            first += f" ({self.images} picture{'s' * (self.images > 1)}{encoded}{kept})"
        speed = f" · {self.tokens_per_s:.{1 if self.tokens_per_s < 10 else 0}f} tokens per second"
        return first + speed * bool(self.tokens_per_s)

    def __str__(self) -> str:
        reused = f", {self.reused_tokens} reused" if self.reused_tokens else ""
        line = [self.times, f"{self.prompt_tokens} tokens asked{reused}, {self.new_tokens} answered"]
        if self.drafted_tokens:
            line.append(f"{self.accepted_tokens} of {self.drafted_tokens} drafts accepted")
        return " · ".join(line)
