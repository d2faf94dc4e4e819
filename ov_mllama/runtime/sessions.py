"""The conversations that a model keeps, and what goes when there is no room for all."""

from transformers import MllamaConfig

from .checks import check_prompt_fits
from .kv_cache import Prompt
from .language import OVLanguageModel, Session
from .memory import free_memory, trim_memory
from .vision import ImageInputs, OVImageEncoder


class SessionPool:
    """The conversations that a model keeps: as many as there is room for, the one used last at the end.

    Args:
        cache_bytes: room for all of them together, KV caches and what they read of their images; the oldest goes first.
            The one used last stays, whatever it takes.
    """

    MAX_SESSIONS = 8  # however small they are: each is asked how a new prompt begins

    def __init__(self, model: OVLanguageModel, cache_bytes: int):
        self.model, self.cache_bytes = model, cache_bytes
        self._sessions: list[Session] = []
        self._in_use: set[int] = set()

    def take(self, prompt: Prompt, rows: int = 0) -> Session:
        """The session whose conversation a prompt continues; else an empty one; else, where there is no room for one
        more, that which was used longest ago. It is in use until `release`.

        Args:
            rows: K/V rows of the prompt's images.
        """
        idle = [session for session in self._sessions if id(session) not in self._in_use]
        session = max(idle, key=lambda session: session.reusable(prompt), default=None)
        if session and not session.reusable(prompt):
            # a batch's conversation (tokens None) cannot be gone on with by another prompt
            empty = (session for session in idle if not session.cache or session.cache.tokens is None)
            session = next(empty, None if self._has_room(prompt, rows) else idle[0])
        if session is None:
            session = self.model.session()
            self._sessions.append(session)
        self.use(session)
        return session

    def use(self, session: Session) -> None:
        """A session is gone on with: it is used last, and in use until `release`."""
        if session in self._sessions:
            self._sessions.remove(session)
            self._sessions.append(session)
            self._in_use.add(id(session))

    def _has_room(self, prompt: Prompt, rows: int) -> bool:
        wanted = self.model.column_bytes * prompt.input_ids.size + self.model.shapes.cross_kv_bytes(rows)
        return len(self._sessions) < self.MAX_SESSIONS and self.held_bytes + wanted <= self.cache_bytes

    def release(self) -> None:
        """Nothing is in use any more; what there is no room for goes, the oldest first."""
        self._in_use.clear()
        while len(self._sessions) > 1 and (
            len(self._sessions) > self.MAX_SESSIONS or self.held_bytes > self.cache_bytes
        ):
            self._sessions.pop(0).reset()

    @property
    def held_bytes(self) -> float:
        """Bytes of all conversations."""
        return sum(session.held_bytes for session in self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)

    def forget(self) -> None:
        """Drops all conversations but those in use."""
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
    """Before a prompt's images are encoded: what its session held goes, if it is of no use to the prompt, and where
    memory is short all that is only kept.

    Args:
        images: those of the prompt, where the session does not hold them.
    Raises:
        ValueError, MemoryError: as `check_prompt_fits`.
    """
    reused = session.reusable(prompt)
    if not reused:
        session.reset()
    picture_bytes = encoder.memory_for(images, prompt.image_keys) if images else 0
    asked = config, prompt, reused, rows, session.model.column_bytes
    try:
        check_prompt_fits(*asked)
        if free_memory() < picture_bytes:
            sessions.forget()  # of the images that are kept, the encoder sees to it
    except MemoryError:
        sessions.forget()
        encoder.forget()
        check_prompt_fits(*asked)
