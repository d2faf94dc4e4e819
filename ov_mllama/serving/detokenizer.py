"""Incremental detokenization with stop strings."""

MAX_CHAR_TOKENS = 8  # that one character may take: a byte each, and what a tokenizer may add; garbage takes more


class Detokenizer:
    """Tokens -> text, as soon as no later token can change it.

    Only the last tokens are decoded, and only the text they add is searched: a token costs the same at any length.
    (`tokenizers.decoders.DecodeStream` decodes a run of incomplete characters from its beginning at each step, and does
    not return incomplete characters at the end.)

    Args:
        stop: strings before which the text ends.

    Attributes:
        tokens: all so far.
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.stopped = False
        # tokens before _read_offset are text already; those from _prefix_offset on are decoded together
        self._prefix_offset = self._read_offset = 0
        self._pending = ""  # text that may be the beginning of a stop string

    def put(self, token: int) -> str:
        """Append a token and return the text that is certain now."""
        self.tokens.append(token)
        return self._before_stop(self._new_text(), last=False)

    def flush(self) -> str:
        """Return the text that was held back, incomplete characters included."""
        return self._before_stop(self._new_text(incomplete=True), last=True)

    def _new_text(self, incomplete: bool = False) -> str:
        """Decode the tokens that are no text yet; "" while they may end within a character."""
        # with the tokens before: some tokenizers write a blank only between two words
        prefix = self._decode(self.tokens[self._prefix_offset : self._read_offset])
        text = self._decode(self.tokens[self._prefix_offset :])
        unsure = len(text) <= len(prefix) or text.endswith("\ufffd")
        if unsure and not incomplete and len(self.tokens) - self._read_offset < MAX_CHAR_TOKENS:
            return ""
        self._prefix_offset, self._read_offset = self._read_offset, len(self.tokens)
        return text[len(prefix) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _before_stop(self, text: str, last: bool) -> str:
        """Return pending and new text up to the first stop string, without what may be the beginning of one."""
        if self.stopped:
            return ""
        text, self._pending = self._pending + text, ""
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if not last:
            tails = (n for stop in self.stop for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
            certain = len(text) - max(tails, default=0)
            text, self._pending = text[:certain], text[certain:]
        return text
