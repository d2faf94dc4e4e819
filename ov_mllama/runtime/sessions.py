"""Session pool: the sessions whose KV caches a model holds, and their eviction."""

from transformers import MllamaConfig

from .checks import check_prompt_fits
from .kv_cache import Prompt
from .language import OVLanguageModel, Session
from .memory import free_memory, trim_memory
from .vision import ImageInputs, OVImageEncoder


class SessionPool:
    """Sessions within a memory budget, in LRU order; the last one used stays, whatever it takes.

    Args:
        cache_bytes: budget for all KV caches and the image K/V that they read.
    """

    MAX_SESSIONS = 8  # however small: `acquire` compares a prompt with each

    def __init__(self, model: OVLanguageModel, cache_bytes: int):
        self.model, self.cache_bytes = model, cache_bytes
        self._sessions: list[Session] = []
        self._in_use: set[int] = set()

    def acquire(self, prompt: Prompt, rows: int = 0) -> Session:
        """Return the session with the longest prefix of a prompt, whose images have `rows` K/V rows; else an empty one;
        else, at the limit, the least recently used one. It is in use until `release`."""
        idle = [session for session in self._sessions if id(session) not in self._in_use]
        session = max(idle, key=lambda session: session.reusable(prompt), default=None)
        if session and not session.reusable(prompt):
            # a batch (tokens None) is no prefix of another prompt
            empty = (session for session in idle if not session.cache or session.cache.tokens is None)
            session = next(empty, None if self._fits(prompt, rows) else idle[0])
        if session is None:
            session = self.model.session()
            self._sessions.append(session)
        self.use(session)
        return session

    def use(self, session: Session) -> None:
        """Mark a session as the most recently used, and as in use until `release`."""
        if session in self._sessions:
            self._sessions.remove(session)
            self._sessions.append(session)
            self._in_use.add(id(session))

    def detach(self, session: Session) -> None:
        """Remove a session from the pool until `attach`."""
        self._sessions.remove(session)
        self._in_use.discard(id(session))

    def attach(self, session: Session) -> None:
        """Put a session into the pool, as the most recently used one, in place of those with a prefix of its tokens;
        evict down to the budget."""
        if session.cache:
            for prefix in [each for each in self._sessions if each.cache and session.cache.continues(each.cache)]:
                self._sessions.remove(prefix)
                prefix.reset()
            self._sessions.append(session)
            self.release()

    def _fits(self, prompt: Prompt, rows: int) -> bool:
        needed = self.model.token_bytes * prompt.input_ids.size + self.model.shapes.cross_kv_bytes(rows)
        return len(self._sessions) < self.MAX_SESSIONS and self.held_bytes + needed <= self.cache_bytes

    def release(self) -> None:
        """Mark all sessions as idle, and evict down to the budget."""
        self._in_use.clear()
        while len(self) > 1 and (len(self) > self.MAX_SESSIONS or self.held_bytes > self.cache_bytes):
            self._sessions.pop(0).reset()

    @property
    def held_bytes(self) -> float:
        return sum(session.held_bytes for session in self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)

    def forget(self) -> None:
        """Drop all idle sessions."""
        for session in [session for session in self._sessions if id(session) not in self._in_use]:
            self._sessions.remove(session)
            session.reset()
        trim_memory()


def evict_for(
    prompt: Prompt,
    session: Session,
    sessions: SessionPool,
    encoder: OVImageEncoder,
    config: MllamaConfig,
    rows: int,
    images: ImageInputs | None = None,
) -> None:
    """Free memory before a prompt's images are encoded: reset its session if none of it is reused and, where memory is
    short, drop idle sessions and cached images. Raises as `check_prompt_fits`.

    Args:
        images: those of the prompt, unless the session holds them.
    """
    reused = session.reusable(prompt)
    if not reused:
        session.reset()
    picture_bytes = encoder.memory_for(images, prompt.image_keys) if images else 0
    needs = config, prompt, reused, rows, session.model.token_bytes
    try:
        check_prompt_fits(*needs)
        if free_memory() < picture_bytes:
            sessions.forget()  # the encoder evicts its own
    except MemoryError:
        sessions.forget()
        encoder.forget()
        check_prompt_fits(*needs)
