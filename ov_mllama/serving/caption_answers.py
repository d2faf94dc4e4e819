"""Answers about images of files: images opened and encoded ahead, answered in batches."""

import contextlib
import json
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from PIL import Image
from transformers import AutoConfig

from ov_mllama.chat.schemas import parse_schema
from ov_mllama.runtime.errors import InputError, NumericalError
from ov_mllama.runtime.generation import end_tokens
from ov_mllama.runtime.image_store import ImageStore
from ov_mllama.runtime.images import at_detail, load_image
from ov_mllama.runtime.prompts import (
    escape_special_tokens,
    load_processor,
    padded,
    prompt_inputs,
    prompt_text,
    sampling,
)
from ov_mllama.serving import load
from ov_mllama.serving.caption_files import printable

IMAGE_TENSORS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
ENCODED_BYTES = 500_000_000  # encoded image of the 11B, with four tiles


@dataclass(frozen=True)
class Settings:
    """Settings of the answers.

    Attributes:
        questions: about each image.
        system: system prompt; empty for none.
        detail: see `images.at_detail`.
        max_new_tokens: token limit of each answer.
        temperature: of sampling; 0 is greedy.
        schema: JSON schema of the answers, as text; None for free text.
    """

    questions: tuple[str, ...] = ("Describe this image.",)
    system: str = ""
    detail: str = "high"
    max_new_tokens: int = 128
    temperature: float = 0.0
    schema: str | None = None

    def columns(self) -> dict[str, Any]:
        """Return the columns of rows with these settings."""
        settings = {name: getattr(self, name) for name in ("max_new_tokens", "detail", "temperature", "schema")}
        return {**settings, "system": self.system or None}


class Task(NamedTuple):
    """A question about the image with the content `id`."""

    id: str
    path: str
    question: str


@dataclass
class Prepared:
    """A task with its image's tensors, or with the reason why there are none.

    Attributes:
        inputs: of `generate`; empty without an image.
        result: "answer", "finish", "error" and "remark" of its rows; or "skipped", a reason that may not last.
    """

    task: Task
    inputs: dict = field(default_factory=dict)
    result: dict[str, str | None] = field(default_factory=dict)


def prompt_texts(model_dir: Path, settings: Settings) -> dict[str, str]:
    """Return each question in the model's chat template.

    Raises:
        TemplateError: if there is none, or it refuses the prompt.
        InputError: if prompt and answer exceed the context, or the schema cannot be matched.
        ModuleNotFoundError: a package of the extra `serve`, which schemas need, is not installed.
    """
    processor, model = load_processor(model_dir), SimpleNamespace(config=AutoConfig.from_pretrained(model_dir))
    system = [{"role": "system", "content": [{"type": "text", "text": escape_special_tokens(settings.system)}]}]
    texts = {}
    for question in settings.questions:
        content = [{"type": "image"}, {"type": "text", "text": escape_special_tokens(question)}]
        messages = [*(system if settings.system else []), {"role": "user", "content": content}]
        texts[question] = prompt_text(model, processor, messages, settings.max_new_tokens)
    if settings.schema:
        from ov_mllama.chat.schema_matcher import MatcherCompiler

        MatcherCompiler(processor.tokenizer, []).compile_schema(parse_schema(settings.schema))
    return texts


class Captioner:
    """A loaded model that answers tasks.

    Args:
        model_dir: folder of a converted model.
        prompts: of `prompt_texts`.
        batch: images that are encoded ahead.
        threads: of this process; None for all.
        image_store: of encoded images that outlive the process; None for none.
    """

    def __init__(
        self,
        model_dir: Path,
        prompts: dict[str, str],
        settings: Settings,
        batch: int = 4,
        threads: int | None = None,
        image_store: ImageStore | None = None,
    ):
        options: dict = {"image_cache_bytes": batch * ENCODED_BYTES, "image_store": image_store}
        self.model, self.processor = load(model_dir, threads=threads, **options)
        self.prompts, self.settings = prompts, settings
        self.eos_token_ids = end_tokens(self.model.generation_config)
        self.matcher = None
        if settings.schema:
            from ov_mllama.chat.schema_matcher import MatcherCompiler

            compiler = MatcherCompiler(self.processor.tokenizer, self.eos_token_ids)
            self.matcher = compiler.compile_schema(parse_schema(settings.schema))

    def prepare(self, tasks: list[Task], stop: threading.Event | None = None) -> list[Prepared]:
        """Open and encode the images of tasks, each once.

        Args:
            stop: once set, `Cancelled` is raised between two layers.
        """
        opened = {path: self._open(path) for path in dict.fromkeys(task.path for task in tasks)}
        batch, encoded = [], set()
        for task in tasks:
            image, result = opened[task.path]
            batch.append(prepared := Prepared(task, result=dict(result)))
            if image is None:
                continue
            prepared.inputs = prompt_inputs(self.processor, self.prompts[task.question], [image])
            if task.path not in encoded:
                encoded.add(task.path)
                with contextlib.suppress(MemoryError, NumericalError):  # raised again for the answer
                    self.model.encode_images(**{name: prepared.inputs[name] for name in IMAGE_TENSORS}, stop=stop)
        return batch

    def _open(self, path: str) -> tuple[Image.Image | None, dict[str, str | None]]:
        """Return an image, or None, and what is known of the result."""
        try:
            Path(path).open("rb").close()
            image = load_image(path)
        except (OSError, MemoryError) as error:  # another run may find the file, or more memory
            reason = getattr(error.__cause__ or error, "strerror", None) or "too little memory"
            return None, {"skipped": f"{printable(path)} cannot be read ({reason})."}
        except InputError as error:
            return None, {"error": printable(error)}
        remark = image.info.get("remark")
        image = at_detail(image, self.settings.detail, self.model.config.vision_config.image_size)
        return image, {"remark": remark}

    def answer(self, batch: list[Prepared]) -> list[dict[str, str | None]]:
        """Return the results of a batch: answered together, or one by one if that needs too much memory or one image
        gives results that are not finite."""
        ready = [prepared for prepared in batch if prepared.inputs]
        try:
            answers = self._generate([prepared.inputs for prepared in ready]) if ready else []
        except (MemoryError, NumericalError) as error:
            if len(ready) > 1:
                for prepared in ready:
                    self.answer([prepared])
            else:  # another run may find more memory
                ready[0].result["skipped" if isinstance(error, MemoryError) else "error"] = str(error)
        else:
            for prepared, answer in zip(ready, answers, strict=True):
                prepared.result |= answer
        return [prepared.result for prepared in batch]

    def _generate(self, prompts: list[dict]) -> list[dict[str, str | None]]:
        inputs, settings = padded(prompts, self.processor.tokenizer.pad_token_id), self.settings
        processors, errors = [], dict[int, str]()
        if self.matcher is not None:
            from ov_mllama.chat.schema_matcher import SchemaProcessor

            processors = [SchemaProcessor(self.matcher, len(prompts), self.eos_token_ids)]
            errors = processors[0].errors
        output = self.model.generate(
            **inputs,
            **sampling(settings.temperature, 1.0),
            max_new_tokens=settings.max_new_tokens,
            logits_processor=processors,
        )
        rows, ends = output[:, inputs["input_ids"].shape[1] :].tolist(), {*self.eos_token_ids}
        texts = self.processor.batch_decode(rows, skip_special_tokens=True)
        return [
            {"error": errors[number]}
            if number in errors
            else {"answer": text, "finish": "length" if ends.isdisjoint(row) else "stop"}
            for number, (text, row) in enumerate(zip(texts, rows, strict=True))
        ]


def answer_tasks(captioner: Captioner, tasks: list[Task], batch: int) -> Generator[list[tuple[Task, dict]]]:
    """Yield tasks and results in batches; the images of the next batch are encoded meanwhile, in one thread."""
    batches = [tasks[start : start + batch] for start in range(0, len(tasks), batch)]
    stop = threading.Event()
    with ThreadPoolExecutor(1, "encode-ahead") as thread:
        try:
            ahead = [thread.submit(captioner.prepare, each, stop) for each in batches[:1]]
            for number, each in enumerate(batches, 1):
                prepared = ahead.pop().result()
                ahead += [thread.submit(captioner.prepare, following, stop) for following in batches[number:][:1]]
                yield list(zip(each, captioner.answer(prepared), strict=True))
        finally:
            stop.set()  # or an error would wait for images that nobody needs


def parse_schema_file(path: Path) -> str:
    """Return the JSON schema of a file as text, the same for the same schema.

    Raises:
        InputError: if it is no JSON object.
    """
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path} holds no valid JSON: {error}.") from error
    if not isinstance(schema, dict):
        raise InputError(f"{path} holds no JSON schema: give an object, such as {{'type': 'object'}}.")
    return json.dumps(schema)
