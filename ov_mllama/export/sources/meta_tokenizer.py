"""The tokenizer of Meta's own checkpoints, tokenizer.model in tiktoken's form, as transformers has it."""

import base64
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from ov_mllama.export.sources.files import hint
from ov_mllama.runtime.errors import InputError

BOS, EOT, PAD = "begin_of_text", "eot_id", "finetune_right_pad_id"
SPECIAL = (
    *(BOS, "end_of_text", "reserved_special_token_0", "reserved_special_token_1", PAD, "step_id"),
    *("start_header_id", "end_header_id", "eom_id", EOT, "python_tag"),
)
STOPS = ("end_of_text", "eom_id", EOT)
SPECIAL_TOKENS = 256  # at the end of the vocabulary: SPECIAL, then reserved ones
MAX_POSITIONS = 131072


class Converter(TikTokenConverter):
    """transformers' converter, without the package tiktoken."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        """Return the rank of each token: a line is the token in base 64 and its rank."""
        lines = Path(tiktoken_url).read_bytes().splitlines()
        return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of tokenizer.model; that of tokenizer.json, if there is one.

    Raises:
        InputError: if tokenizer.model is broken.
    """
    if (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    path = folder / "tokenizer.model"
    # the image token is behind all others, where the model has its embedding; Meta's own number for it is reserved
    names = [*SPECIAL, *(f"reserved_special_token_{number + 2}" for number in range(SPECIAL_TOKENS - len(SPECIAL)))]
    try:
        converter = Converter(str(path), extra_special_tokens=[f"<|{name}|>" for name in (*names, "image")])
        tokenizer = converter.converted()
    except ValueError as error:
        raise InputError(f"{path} is no tokenizer in tiktoken's form{hint(path)}") from error
    return with_special_tokens(tokenizer)


def with_special_tokens(tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer of Llama 3 as transformers has it, which adds BOS, pads on the left and ends with EOT.

    Args:
        tokenizer: of the package tokenizers, which holds these tokens.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=f"<|{BOS}|>",
        eos_token=f"<|{EOT}|>",
        pad_token=f"<|{PAD}|>",
        add_bos_token=True,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
