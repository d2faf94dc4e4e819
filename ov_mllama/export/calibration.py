"""Calibration data for NNCF: images with captions -> inputs of the two IRs, one sample at a time.

    load_samples -> processor -> image_inputs -> vision IR -> language_inputs -> language IR

The tensors are built by the functions that inference uses (`vision.py`, `language.py`), so each sample has its own
tiles and masks. Nothing is cached: each iteration reads, decodes and encodes again, and memory holds one sample.
"""

import functools
import io
import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
from datasets import IterableDataset, get_dataset_split_names, load_dataset
from huggingface_hub.utils import httpx  # the version that the hub's client uses
from tqdm.auto import tqdm
from transformers import AutoConfig

from ov_mllama.export.samples import QUESTION, calibration_samples, photographs
from ov_mllama.export.settings import DEFAULT_SOURCES
from ov_mllama.runtime.cross_attention import tiles_seen, visible_kv
from ov_mllama.runtime.errors import InputError, NotFoundError
from ov_mllama.runtime.images import load_image
from ov_mllama.runtime.ir import VISION_ENCODER_NAME, ir_stamp
from ov_mllama.runtime.language import language_inputs
from ov_mllama.runtime.prompts import load_processor
from ov_mllama.runtime.shapes import MllamaShapes
from ov_mllama.runtime.vision import ImageInputs, OVImageEncoder, image_inputs

logger = logging.getLogger(__name__)

# on the hub: 31 000 photographs with five captions each, as parquet files that hold the images
HUB_SET, PACKAGED = DEFAULT_SOURCES
PHOTOGRAPHS = "photographs"  # a source that needs no network, see `ov_mllama/export/samples.py`
CAPTION_COLUMNS = ("answer", "caption", "captions", "text", "sentence", "sentences")


# ---- Images with captions -------------------------------------------------------------------------------------------


def open_dataset(source: str | Path | None = None, seed: int = 0) -> IterableDataset:
    """Open a shuffled stream of a local `imagefolder`, a data set on the hub (its first split), or the PHOTOGRAPHS of
    installed packages.

    Nothing is executed from the hub (datasets 5 runs no scripts), and no image is fetched from elsewhere.

    Args:
        source: folder, hub id or PHOTOGRAPHS (a folder of that name goes first); None: as `default_source`.
    Raises:
        NotFoundError: no such folder or data set, no network, or a package of the photographs is not installed.
        InputError: if the data set has no column of images or none of captions.
    """
    source = default_source(seed) if source is None else source
    if str(source) == PACKAGED:
        return open_photographs(seed)
    if str(source) == PHOTOGRAPHS and not Path(source).is_dir():
        return open_photographs(seed)
    try:
        if Path(source).is_dir():
            data = load_dataset("imagefolder", data_dir=str(source), split="train", streaming=True)
        else:
            data = load_dataset(str(source), split=get_dataset_split_names(str(source))[0], streaming=True)
    except (OSError, ConnectionError, httpx.HTTPError) as error:
        raise NotFoundError(
            f"'{source}' is neither a folder of images here nor a data set that can be reached on the Hugging Face "
            f"hub ({type(error).__name__}): check the spelling and the network, or give "
            f"'{PHOTOGRAPHS}', which need none."
        ) from error
    columns(data)
    return data.shuffle(seed=seed, buffer_size=256)


def default_source(seed: int = 0) -> str:
    """Return HUB_SET or, logged, PACKAGED if the hub cannot be reached."""
    try:
        open_dataset(HUB_SET, seed)
    except FileNotFoundError:
        logger.warning("%s is out of reach: using the photographs of installed packages instead", HUB_SET)
        return PACKAGED
    return HUB_SET


def open_photographs(seed: int) -> IterableDataset:
    """Open `samples.calibration_samples` as a shuffled stream of columns "image", "question" and "caption"."""
    samples = calibration_samples()
    for sample in samples:
        file = io.BytesIO()
        sample["image"].save(file, "BMP")  # as PNG, which datasets would write, all take 3 s instead of 0.02
        sample["image"] = {"bytes": file.getvalue(), "path": None}
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "question": text, "caption": text})
    data = datasets.Dataset.from_list(samples, features=features)  # in memory: 30 MB, no file
    return data.to_iterable_dataset().shuffle(seed=seed, buffer_size=256)


def own_samples(checkpoint: str | Path) -> Path | None:
    """Return the folder `samples` of a checkpoint that brings images to calibrate with and to ask about, in
    `imagefolder` form, as the demo does; None if it brings none, or is a hub id.
    """
    folder = Path(checkpoint) / "samples"
    return folder if any(folder.glob("metadata.*")) else None


def questions_about(checkpoint: str | Path) -> list[dict]:
    """Return example questions: the checkpoint's own samples, {"image", "question", "answer"}, if they have questions;
    the golden question of a converted model's folder; else `samples.photographs`, without right answers."""
    folder, golden = own_samples(checkpoint), Path(checkpoint) / "golden.json"
    if folder:
        samples = load_dataset("imagefolder", data_dir=str(folder), split="train")
        if "question" in samples.column_names:
            return list(samples)
    elif golden.is_file():
        sample = json.loads(golden.read_text(encoding="utf-8"))
        return [{**sample, "image": load_image(golden.with_name(sample["picture"]))}]
    return photographs()


def columns(data: IterableDataset) -> tuple[str, str]:
    """Return the names of the columns of images and of captions.

    Raises:
        InputError: if one of them is missing.
    """
    images = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    captions = [name for name in CAPTION_COLUMNS if name in data.features]
    if not (images and captions):
        raise InputError(
            f"The data set's columns are {sorted(data.features)}: it needs one of images (not of addresses) and a "
            f"caption in one of {', '.join(CAPTION_COLUMNS)}."
        )
    return images[0], captions[0]


def load_samples(source: str | Path | IterableDataset | None, count: int, seed: int = 0) -> Iterator[dict]:
    """Yield at most `count` samples {"image": RGB image, "question", "answer"}, in the same order for the same seed.

    A progress bar counts them; after the first sample it shows the minutes that all will take, if more than one. What
    was skipped, and why, is logged at the end.

    Args:
        source: as for `open_dataset`, or its result; a column "question" replaces "Describe this image.".
    """
    data, skipped = source if isinstance(source, IterableDataset) else open_dataset(source, seed), Counter()
    image_column, caption_column = columns(data)
    # undecoded, so that one broken file is one skipped sample and not the end of the stream
    data = data.cast_column(image_column, datasets.Image(decode=False))
    with tqdm(total=count, desc="Calibration samples", unit="sample", leave=False) as bar:
        for row in data:
            if bar.n == count:
                break
            caption = row[caption_column]
            caption = caption[0] if isinstance(caption, list) and caption else caption
            if not (isinstance(caption, str) and caption.strip()):
                skipped["no caption"] += 1
                continue
            try:
                image = load_undecoded(row[image_column])
            except (OSError, ValueError, TypeError, SyntaxError, PIL.Image.DecompressionBombError) as error:
                if getattr(error, "errno", None) is not None:  # of the disk, not of the image
                    raise
                skipped[f"unreadable image ({type(error).__name__})"] += 1
                continue
            started = time.perf_counter()
            yield {"image": image, "question": row.get("question") or QUESTION, "answer": caption.strip()}
            bar.update()
            seconds = time.perf_counter() - started
            if bar.n == 1 and seconds * count > 60:
                bar.write(f"One sample takes {seconds:.0f} s, all {count} about {seconds * count / 60:.0f} minutes")
    if skipped:
        logger.warning("Skipped: %s", ", ".join(f"{number} × {reason}" for reason, number in skipped.items()))


def load_undecoded(value: dict) -> PIL.Image.Image:
    """Return an image of a data set's column that is not decoded, {"bytes", "path"}."""
    source = Path(value["path"]) if value["bytes"] is None else value["bytes"]
    in_archive = isinstance(source, Path) and not source.is_file()  # or on the hub
    return load_image(datasets.Image().decode_example(value) if in_archive else source)


def count_samples(source: str | Path, count: int) -> int:
    """Return the number of samples to calibrate with: `count` or, logged, the size of a smaller source on this disk.

    Args:
        source: as for `load_samples`. One on the hub is not counted.
    """
    if str(source) not in (PACKAGED, PHOTOGRAPHS) and not Path(source).is_dir():
        return count
    data = open_dataset(source)
    undecoded = data.cast_column(columns(data)[0], datasets.Image(decode=False))
    available = sum(1 for _ in itertools.islice(undecoded, count))
    if available < count:
        logger.warning("⚠️ %s has %d samples, %d were requested: all are used", source, available, count)
    return available


# ---- Samples -> tensors ---------------------------------------------------------------------------------------------


class Samples(Iterable):
    """Inputs of an IR: `make(sample)` of each sample, made anew at each iteration.

    Raises:
        InputError: during the iteration, if there are fewer usable samples than `count`.
    """

    def __init__(self, make, source: str | Path | None, count: int, seed: int):
        # opened once: to find the hub out of reach takes half a minute
        self.make, self.count, self.open = make, count, functools.cache(functools.partial(open_dataset, source, seed))
        self.source = source

    def __iter__(self):
        number = 0
        for sample in load_samples(self.open(), self.count):
            number += 1
            yield self.make(sample)
        if number < self.count:
            raise InputError(
                f"{self.source or 'The default source'} has {number} usable samples and {self.count} were requested: "
                f"set dataset_size={number}, or give a source with more."
            )


def processed(processor, sample: dict) -> dict[str, np.ndarray]:
    """Return the processor's tensors for a sample as a conversation: the image, its question, and its answer."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample["question"]}]},
        {"role": "assistant", "content": [{"type": "text", "text": sample["answer"]}]},
    ]
    text = processor.apply_chat_template(messages)
    return processor(text=text, images=[sample["image"]], add_special_tokens=False, return_tensors="np")


def check_processor(processor, count: int | None) -> None:
    """Raise a TypeError for the published notebook's call, with the number of samples alone."""
    if count is None or not hasattr(processor, "image_processor"):
        raise TypeError(
            "Give the model's processor, then the number of samples: "
            "prepare_dataset_vision(AutoProcessor.from_pretrained(model_dir), 100)."
        )


def prepare_dataset_vision(
    processor, count: int = 0, source: str | Path | None = None, seed: int = 0
) -> Iterable[dict]:
    """Return the vision IR's inputs by port name, for `count` images.

    Args:
        processor: the model's `MllamaProcessor`.
        source, seed: as for `load_samples`; `Samples` raises if the source has fewer.
    """
    check_processor(processor, count)

    def inputs(sample):
        tensors = processed(processor, sample)
        return image_inputs(
            tensors["pixel_values"][0, 0], int(tensors["aspect_ratio_ids"][0, 0]), tensors["aspect_ratio_mask"][0, 0]
        )

    return Samples(inputs, source, count, seed)


def prepare_dataset_llm(
    processor, image_encoder: OVImageEncoder, count: int, source: str | Path | None = None, seed: int = 0
) -> Samples:
    """Return the language IR's inputs by port name: the conversation about each of `count` images as one prompt.

    Args:
        image_encoder: encodes each image when it is needed; its K/V are freed with the sample.
        source, seed: as for `load_samples`; `Samples` raises if the source has fewer.
    """
    check_processor(processor, count)

    def inputs(sample):
        tensors = processed(processor, sample)
        images = ImageInputs(*(tensors[name] for name in ImageInputs._fields))
        seen = tiles_seen(images.cross_attention_mask, tensors["input_ids"].shape[1])
        prompt = visible_kv(image_encoder.encode(images), seen, image_encoder.shapes)
        return language_inputs(tensors["input_ids"], prompt, tensors["attention_mask"])

    return Samples(inputs, source, count, seed)


# ---- Calibration of an IR -------------------------------------------------------------------------------------------


class CalibrationSet(Iterable):
    """Samples to calibrate one IR with. The source is opened only for the `name` or a sample.

    Args:
        prepare: `language_samples` or `vision_samples`.
        model_dir: of the IR.
        file_name: of the IR. One that exists keeps the default source it was made with, even if another is in reach.
        count: requested number of samples; a smaller source has fewer, see `count_samples`.
        source: as for `load_samples`.
        force: ignore the existing IR.
    """

    def __init__(
        self,
        prepare: Callable[[Path, int, Any], Iterable[dict]],
        model_dir: str | Path,
        file_name: str,
        count: int,
        source: str | Path | None = None,
        force: bool = False,
    ):
        self.prepare, self.path, self.count = prepare, Path(model_dir) / file_name, count
        self.source, self.force = source, force

    @functools.cached_property
    def available(self) -> tuple[int, str | Path]:
        """Number of samples and their source."""
        source = self.source
        if source is None:
            _, _, made_with = ir_stamp(self.path).get("samples", "").partition(" of ")
            source = made_with if made_with in DEFAULT_SOURCES and not self.force else default_source()
        return count_samples(source, self.count), source

    @property
    def name(self) -> str:
        """For the IR's stamp, such as "13 of my/photographs"."""
        return "{} of {}".format(*self.available)

    @functools.cached_property
    def _samples(self) -> Iterable[dict]:
        return self.prepare(self.path.parent, *self.available)

    def __iter__(self) -> Iterator[dict]:
        return iter(self._samples)


def language_samples(model_dir: Path, count: int, source: str | Path | None) -> Iterable[dict]:
    """Return samples for the language model, each image encoded by the uncompressed vision encoder when needed."""
    shapes = MllamaShapes.from_config(AutoConfig.from_pretrained(model_dir))
    encoder = OVImageEncoder(model_dir / VISION_ENCODER_NAME, shapes, cache_bytes=0)
    return prepare_dataset_llm(load_processor(model_dir), encoder, count, source)


def vision_samples(model_dir: Path, count: int, source: str | Path | None) -> Iterable[dict]:
    """Return samples for the vision encoder."""
    return prepare_dataset_vision(load_processor(model_dir), count, source)
