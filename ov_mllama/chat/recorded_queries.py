"""Cross-attention queries of the last answers, for heat maps: in memory only, 32 MB for 512 tokens of the 11B."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

from ov_mllama.chat.turns import Turn
from ov_mllama.runtime.attention_maps import AnswerQueries

MAX_BYTES = 200_000_000


class RecordedQueries:
    """LRU cache of answers' queries, by the contents of a conversation up to the answer. Thread-safe."""

    def __init__(self, max_bytes: int = MAX_BYTES):
        self.max_bytes = max_bytes
        self._queries: OrderedDict[str, AnswerQueries] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, model, inputs) -> dict[str, AnswerQueries]:
        """Return arguments of `generate` that record the answer to a prompt; none without images, or for a model that
        gives no queries."""
        language_model = getattr(model, "language_model", None)
        if "pixel_values" not in inputs or not getattr(language_model, "gives_queries", False):
            return {}
        return {"queries": AnswerQueries(inputs["input_ids"].shape[1])}

    def put(self, turns: Sequence[Turn], queries: AnswerQueries | None) -> None:
        """Add the queries of the last turn's answer, and evict others."""
        if queries is None:
            return
        with self._lock:
            self._queries[key_of(turns)] = queries
            while self._queries and sum(each.nbytes for each in self._queries.values()) > self.max_bytes:
                self._queries.popitem(last=False)

    def get(self, turns: Sequence[Turn]) -> AnswerQueries | None:
        """Return the queries of the last turn's answer; None if they are not there."""
        key = key_of(turns)
        with self._lock:
            if key in self._queries:
                self._queries.move_to_end(key)
            return self._queries.get(key)


def key_of(turns: Sequence[Turn]) -> str:
    """Return a digest of what the last turn's answer was given to, and of the answer."""
    parts = [(turn.question, [*map(str, turn.pictures)], turn.answer, turn.detail, turn.closer) for turn in turns]
    return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()
