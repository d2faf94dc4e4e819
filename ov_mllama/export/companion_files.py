"""Companion files of a checkpoint's IRs, completed with what fine-tunes lose: chat template, end tokens, padding, image
processor. What cannot be completed is refused before the weights are loaded.
"""

import json
import logging
import shutil
from pathlib import Path

import jinja2
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig, MllamaConfig, MllamaProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.sources.files import hint
from ov_mllama.export.sources.gguf_source import LICENSES
from ov_mllama.export.sources.meta_tokenizer import tokenizer_of
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.generation import complete

logger = logging.getLogger(__name__)

IMAGE = "<|image|>"
SPECIAL_TOKENS = {  # of a tokenizer, and their names in Llama 3, best first
    "bos_token": ("<|begin_of_text|>",),
    "eos_token": ("<|eot_id|>", "<|end_of_text|>"),
    "pad_token": ("<|finetune_right_pad_id|>", "<|eot_id|>", "<|end_of_text|>"),
}
# Llama 3.2 Vision's format: the tokens of `chat_format` in Meta's llama-models 0.3.0 (tests/runtime/test_meta.py)
CHAT_TEMPLATE = """\
{{- '<|begin_of_text|>' }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if message.content is string %}
        {{- message.content | trim }}
    {%- else %}
        {%- for part in message.content %}
            {{- '<|image|>' if part.type == 'image' else part.text | trim }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


def save_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what running the model needs beside the IRs: config, generation config, processor, chat template, and the
    golden answer if the checkpoint brings one with its image; Ollama's licences."""
    source = checkpoint.settings_folder
    processor, notes = complete_processor(source, checkpoint.config)
    checkpoint.config.save_pretrained(folder)
    save_generation_config(source, checkpoint.config, processor.tokenizer, folder)
    processor.save_pretrained(folder)
    for note in notes:
        logger.warning("⚠️ %s", note)
    for path in golden_files(source):
        shutil.copy(path, folder)
    for path in sorted(source.glob(LICENSES)):
        shutil.copy(path, folder)
        logger.info(
            "📄 Licence, %s: %s", path.name, path.read_text("utf-8", "replace").strip().partition("\n")[0][:100]
        )


def golden_files(source: Path) -> list[Path]:
    """Return a checkpoint's golden answer and its image; none without both, or for another program's golden.json."""
    golden = source / "golden.json"
    try:
        image = source / Path(json.loads(golden.read_text(encoding="utf-8"))["picture"]).name
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [golden, image] if image.is_file() else []


def check_companions_of(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose tokenizer or chat template cannot be used.

    Raises:
        InputError: as `complete_processor`.
    """
    complete_processor(checkpoint.settings_folder, checkpoint.config)


def complete_processor(folder: Path, config: MllamaConfig) -> tuple[MllamaProcessor, list[str]]:
    """Return a checkpoint's processor, and a sentence on each thing that it lacked.

    Raises:
        InputError: without a tokenizer, for one of another model, or a chat template that is no valid Jinja.
    """
    tokenizer, notes = read_tokenizer(folder, config), []
    images = read_image_processor(folder, config)
    if images is None:
        images = image_processor_of(config)
        notes.append(
            f"{folder} holds no processor for this model's images: its settings are derived from its config, "
            f"{config.vision_config.max_num_tiles} tiles of {config.vision_config.image_size} pixels."
        )
    template, note = chat_template(folder, tokenizer)
    tokenizer.chat_template = template
    return MllamaProcessor(images, tokenizer, chat_template=template), [*notes, *[note] * bool(note)]


# ---- Tokenizer ------------------------------------------------------------------------------------------------------


def read_tokenizer(folder: Path, config: MllamaConfig):
    """Return a checkpoint's tokenizer, which pads on the left, with all SPECIAL_TOKENS.

    Raises:
        InputError: if there is none, or its image token is not the model's.
    """
    fix = "copy tokenizer.json and tokenizer_config.json from the base model's folder"
    try:
        has_tiktoken = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
        tokenizer = tokenizer_of(folder) if has_tiktoken else AutoTokenizer.from_pretrained(folder, padding_side="left")
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - libraries raise whatever they like
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder} holds no tokenizer (tokenizer.json): {fix}; its own will do.") from error
        if (reason := hint(folder / "tokenizer.json")).startswith(" but"):
            raise InputError(f"{folder / 'tokenizer.json'} is no tokenizer{reason}") from error
        raise InputError(f"The tokenizer in {folder} cannot be read ({first_line(error)}): {fix}.") from error
    vocabulary, index = tokenizer.get_vocab(), config.image_token_index
    if vocabulary.get(IMAGE) != index:
        found = f"gives {IMAGE} the id {vocabulary[IMAGE]}" if IMAGE in vocabulary else f"has no {IMAGE}"
        raise InputError(
            f"The tokenizer in {folder} {found}; the model's is {index} (image_token_index in config.json): {fix}."
        )
    for kind, names in SPECIAL_TOKENS.items():
        if not getattr(tokenizer, kind):
            setattr(tokenizer, kind, next((name for name in names if name in vocabulary), None))
    return tokenizer


def first_line(error: object) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0]


# ---- Images ---------------------------------------------------------------------------------------------------------


def read_image_processor(folder: Path, config: MllamaConfig):
    """Return a checkpoint's image processor; None if there is none that makes this model's tiles."""
    try:
        images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except Exception:  # noqa: BLE001 - libraries raise whatever they like
        return None
    vision, size = config.vision_config, dict(getattr(images, "size", None) or {})
    fits = (size.get("height"), size.get("width")) == (vision.image_size, vision.image_size)
    return images if fits and getattr(images, "max_image_tiles", None) == vision.max_num_tiles else None


def image_processor_of(config: MllamaConfig) -> MllamaImageProcessorPil:
    """Return the image processor of Llama 3.2 Vision in a config's size."""
    size = config.vision_config.image_size
    return MllamaImageProcessorPil(
        size={"height": size, "width": size},
        max_image_tiles=config.vision_config.max_num_tiles,
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
    )


# ---- Chat template --------------------------------------------------------------------------------------------------


def chat_template(folder: Path, tokenizer) -> tuple[str, str]:
    """Return a checkpoint's chat template, or CHAT_TEMPLATE, and a sentence on what it lacked.

    Raises:
        InputError: if it is no valid Jinja.
    """
    template = stored_template(folder, tokenizer)
    if not template:
        return CHAT_TEMPLATE, (
            f"No chat template in {folder}: Llama 3.2 Vision's own format is written, right for a fine-tune that lost "
            "it; a base model continues text and answers no questions, take an -Instruct one."
        )
    try:
        text = tokenizer.apply_chat_template(
            QUESTION, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"The chat template in {folder} is no valid Jinja (line {error.lineno}: {error.message}): correct it, or "
            "remove it for Llama 3.2 Vision's own format."
        ) from error
    except jinja2.TemplateError as error:
        if type(error) is jinja2.TemplateError:  # its own raise_exception
            return template, f'The chat template in {folder} refuses a question about an image: "{error}"'
        text = ""
    except Exception:  # noqa: BLE001 - as of any program: such as str + list
        text = ""
    if text.count(IMAGE) == 1:
        return template, ""
    return CHAT_TEMPLATE, (
        f"The chat template in {folder} is for text alone, without {IMAGE}: Llama 3.2 Vision's own format replaces it."
    )


def stored_template(folder: Path, tokenizer) -> str:
    """Return the chat template of chat_template.jinja, chat_template.json, processor_config.json or the tokenizer's
    config, in this order; of several named ones the default. Empty if there is none.

    Raises:
        InputError: if one of the files cannot be read, or the template is no text.
    """
    path = folder / "chat_template.jinja"
    try:
        template = path.read_text(encoding="utf-8") if path.is_file() else ""
        for path in (folder / "chat_template.json", folder / "processor_config.json"):
            stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            template = template or stored.get("chat_template") or ""
        if isinstance(template, list):  # as older versions store several
            template = {each["name"]: each["template"] for each in template}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: download it again, or remove it.") from error
    template = template or tokenizer.chat_template or ""
    template = template.get("default", "") if isinstance(template, dict) else template
    if not isinstance(template, str):
        raise InputError(
            f"The chat template in {folder} is no text: correct it, or remove it for Llama 3.2 Vision's own."
        )
    return template if template.strip() else ""


# ---- Generation config ----------------------------------------------------------------------------------------------


def save_generation_config(source: Path, config, tokenizer, folder: Path) -> None:
    """Write a checkpoint's generation config with all end tokens. Contradictory settings are left out.

    Args:
        config: `MllamaConfig`, or `LlamaConfig` of a draft model.
        tokenizer: with the chat template.
    """
    settings = GenerationConfig()
    if (source / "generation_config.json").is_file():
        try:
            settings = GenerationConfig.from_pretrained(source)
            settings.validate(strict=True)
        except (OSError, ValueError, TypeError) as error:
            settings = GenerationConfig(eos_token_id=settings.eos_token_id)
            reason = first_line(str(error).removeprefix("GenerationConfig is invalid:"))
            logger.warning("⚠️ generation_config.json is invalid, only its end tokens are used: %s", reason)
    complete(settings, config, tokenizer)
    if settings.eos_token_id is None:
        logger.warning("⚠️ No end token in %s: answers end at the token limit", source)
    settings.save_pretrained(folder)
