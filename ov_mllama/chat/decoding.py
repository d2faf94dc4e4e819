"""Settings of an answer as arguments of `generate`, a JSON schema included."""

from typing import NamedTuple

from ov_mllama.chat.schema_matcher import MatcherCompiler, SchemaProcessor
from ov_mllama.chat.schemas import as_code_block, schema_of
from ov_mllama.chat.turns import OPENING
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.generation import end_tokens
from ov_mllama.runtime.prompts import sampling

DRAFTS = ("assistant_model", "prompt_lookup_num_tokens")  # sources of drafts, which a matcher cannot take back


class GenerationSettings(NamedTuple):
    """Settings of an answer.

    Attributes:
        system: system prompt; may be empty.
        temperature, top_p: for sampling; temperature 0 is greedy.
        detail: of new pictures, see `images.at_detail`.
        top_k, repetition_penalty: None for the checkpoint's.
        seed: of a sampled answer; None for any.
        schema: of answers in JSON, see `schemas.schema_of`; "" for text.
    """

    system: str = ""
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.9
    detail: str = "high"
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    schema: str = ""


class AnswerText:
    """Text of one answer as it is shown: JSON in a code block.

    Args:
        processor: of its schema; None for text.
    """

    def __init__(self, processor: SchemaProcessor | None):
        self.processor = processor

    def extended(self, text: str, piece: str) -> str:
        """Return the text with another piece."""
        return (text or OPENING if self.processor else text) + piece

    def completed(self, text: str) -> str:
        """Return the text of a complete answer.

        Raises:
            InputError: if its schema became too complex within the answer.
        """
        if self.processor is None:
            return text
        for error in self.processor.errors.values():
            raise InputError(error)
        return as_code_block(text.removeprefix(OPENING))


class Decoding:
    """Arguments of `stream_words` by settings.

    Args:
        model, processor: as for `stream_words`.
        options: `generate` arguments for every question.
    """

    def __init__(self, model, processor, options: dict):
        self.model, self.processor, self.options = model, processor, options
        self._compiler: MatcherCompiler | None = None

    def arguments(self, settings: GenerationSettings) -> tuple[dict, AnswerText]:
        """Return the arguments and the answer's text. For one thread at a time.

        Raises:
            InputError: if the schema is invalid or too complex.
        """
        chosen = sampling(settings.temperature, settings.top_p, settings.top_k)
        arguments = {**self.options, **chosen, "max_new_tokens": int(settings.max_new_tokens), "seed": settings.seed}
        if settings.repetition_penalty is not None:
            arguments["repetition_penalty"] = settings.repetition_penalty
        schema = schema_of(settings.schema)
        if schema is None:
            return arguments, AnswerText(None)
        ends = end_tokens(self.model.generation_config)
        self._compiler = self._compiler or MatcherCompiler(self.processor.tokenizer, ends)
        processor = SchemaProcessor(self._compiler.compile_schema(schema), 1, ends)
        drafting = {name: None for name in DRAFTS if name in arguments}
        return {**arguments, **drafting, "logits_processor": [processor]}, AnswerText(processor)
