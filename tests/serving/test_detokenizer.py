"""Tokens become text: whole characters, texts to stop at, and the same cost at any length."""

import numpy as np
import pytest

from openai_client import complete, text, user
from ov_mllama.serving.detokenizer import Detokenizer
from ov_mllama.serving.protocol import MAX_STOP_CHARS


class Counting:
    """The demo's tokenizer, and how many tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, []

    def decode(self, tokens, **options):
        self.decoded.append(len(tokens))
        return self.tokenizer.decode(tokens, **options)


def test_each_token_costs_the_same_at_any_length(processor):
    """The stops are the worst there are: all but their last letter comes again and again."""
    tokenizer = Counting(processor.tokenizer)
    words = Detokenizer(tokenizer, ["a" * (MAX_STOP_CHARS - 1) + letter for letter in "bcde"])
    [letter] = processor.tokenizer("a", add_special_tokens=False)["input_ids"]
    said = "".join(words.put(letter) for _ in range(1000))
    assert len(words._pending) < MAX_STOP_CHARS
    assert said + words.flush() == "a" * 1000
    assert max(tokenizer.decoded) < 20


@pytest.mark.parametrize("said", ["é", "漢字", "🙂", "naïve 漢 🙂🙂 café", "a\ufffdb", "end�", "👩‍👩‍👧"])
@pytest.mark.parametrize("stop", [(), ("never",), ("é!",)])
def test_characters_of_several_tokens_come_whole(processor, said, stop):
    tokens = processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    words = Detokenizer(processor.tokenizer, stop)
    pieces = [words.put(token) for token in tokens]
    assert "".join([*pieces, words.flush()]) == said
    assert "\ufffd" in said or not any("\ufffd" in piece for piece in pieces)


def test_halves_of_characters_come_at_the_end_or_among_garbage(processor):
    first = processor.tokenizer("漢", add_special_tokens=False)["input_ids"][0]
    words = Detokenizer(processor.tokenizer)
    assert not words.put(first)
    assert words.flush() == "\ufffd"
    counting = Counting(processor.tokenizer)
    words = Detokenizer(counting)
    assert set("".join([words.put(first) for _ in range(500)] + [words.flush()])) == {"\ufffd"}
    assert max(counting.decoded) < 20


@pytest.mark.parametrize("cut", range(1, 7))
def test_stop_is_found_across_tokens(processor, cut):
    said = "One 漢🙂 and two"
    tokens = processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    words = Detokenizer(processor.tokenizer, [said[cut:9]])
    assert "".join([words.put(token) for token in tokens] + [words.flush()]) == said[:cut]
    assert words.stopped


def test_stream_of_characters_of_several_tokens(client, slow_demo, processor, monkeypatch):
    """The demo speaks ASCII: another's words are put into its mouth."""
    said = "Né à 漢字 🙂, naïve"
    tokens = [
        *processor.tokenizer(said, add_special_tokens=False)["input_ids"],
        slow_demo.generation_config.eos_token_id,
    ]
    tokens = np.hstack(tokens).tolist()
    monkeypatch.setattr(
        "ov_mllama.serving.sequences.Sequence.sample", lambda sequence, logits: tokens[sequence.num_tokens]
    )
    chunks = [chunk.choices[0].delta.content or "" for chunk in complete(client, user(text("?")), stream=True)]
    assert "".join(chunks) == said
    assert not any("\ufffd" in chunk for chunk in chunks)
    assert len(chunks) > 8
    assert complete(client, user(text("?"))).choices[0].message.content == said
