"""Pictures with captions -> what the two IRs take, one sample at a time, for NNCF to calibrate with.

    load_samples -> processor -> image_inputs -> vision IR -> language_inputs -> language IR

The tensors are built by the functions that inference uses (`vision.py`, `language.py`), so each sample has its own
tiles and masks. Nothing is kept: iterating again reads, decodes and encodes again, and memory holds one sample.
"""

import functools
import io
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
from datasets import IterableDataset, get_dataset_split_names, load_dataset
from huggingface_hub.utils import httpx  # whichever it uses
from tqdm.auto import tqdm

from ov_mllama.export.samples import QUESTION, calibration_samples, photographs
from ov_mllama.export.settings import DEFAULT_SOURCES
from ov_mllama.runtime.cross_attention import tiles_seen, visible_kv
from ov_mllama.runtime.images import open_picture
from ov_mllama.runtime.language import language_inputs
from ov_mllama.runtime.vision import ImageInputs, OVImageEncoder, image_inputs

# the hub's: 31 000 photographs with five captions each, as parquet files that hold the pictures
HUB_SET, PACKAGED = DEFAULT_SOURCES
PHOTOGRAPHS = "photographs"  # the source that needs no network, `ov_mllama/export/samples.py`
CAPTION_COLUMNS = ("answer", "caption", "captions", "text", "sentence", "sentences")


# ---- Pictures with captions -----------------------------------------------------------------------------------------


def open_dataset(source: str | Path | None = None, seed: int = 0) -> IterableDataset:
    """A shuffled stream of a local `imagefolder`, of a set on the hub that holds its pictures (its first split), or of
    the PHOTOGRAPHS that come with installed packages.

    Without a `source` it is HUB_SET, or where the hub is out of reach (it says so) the PHOTOGRAPHS. A folder of that
    name comes before them. Nothing is executed from the hub (datasets 5 runs no scripts) and no picture is fetched
    from elsewhere.

    Raises:
        FileNotFoundError: no such folder or set, no network, or a package of the photographs is not installed.
        ValueError: the set has no column of pictures or none of captions.
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
        raise FileNotFoundError(
            f"'{source}' is neither a folder of pictures here nor a data set that can be reached on the Hugging Face "
            f"hub ({type(error).__name__}): check the spelling and the network, or give "
            f"'{PHOTOGRAPHS}', which need none."
        ) from error
    columns(data)
    return data.shuffle(seed=seed, buffer_size=256)


def default_source(seed: int = 0) -> str:
    """Returns HUB_SET, or where the hub is out of reach (it prints so) PACKAGED."""
    try:
        open_dataset(HUB_SET, seed)
    except FileNotFoundError:
        print(f"{HUB_SET} is out of reach: the photographs that come with installed packages are used instead")
        return PACKAGED
    return HUB_SET


def open_photographs(seed: int) -> IterableDataset:
    """`samples.calibration_samples` as a shuffled stream of columns "image", "question" and "caption"."""
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
    """The folder `samples` of a checkpoint that brings pictures of what it knows, in `imagefolder` form, as the demo's
    does: what to calibrate with, and to ask about. None if it brings none, or is a name on the hub.
    """
    folder = Path(checkpoint) / "samples"
    return folder if any(folder.glob("metadata.*")) else None


def questions_about(checkpoint: str | Path) -> list[dict]:
    """What to ask a checkpoint: its own samples, {"image", "question", "answer"}, if they have questions; in the folder
    of a converted one, its golden question; else photographs and questions, whose right answers nobody has written down
    (`samples.photographs`).

    Raises:
        FileNotFoundError: a package that brings the photographs is not installed.
    """
    folder, golden = own_samples(checkpoint), Path(checkpoint) / "golden.json"
    if folder:
        samples = load_dataset("imagefolder", data_dir=str(folder), split="train")
        if "question" in samples.column_names:
            return list(samples)
    elif golden.is_file():
        asked = json.loads(golden.read_text(encoding="utf-8"))
        return [{**asked, "image": open_picture(golden.with_name(asked["picture"]))}]
    return photographs()


def columns(data: IterableDataset) -> tuple[str, str]:
    """Names of the pictures' and of the captions' column."""
    pictures = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    captions = [name for name in CAPTION_COLUMNS if name in data.features]
    if not (pictures and captions):
        raise ValueError(
            f"The data set's columns are {sorted(data.features)}: it needs one of pictures (not of addresses) and a "
            f"caption in one of {', '.join(CAPTION_COLUMNS)}."
        )
    return pictures[0], captions[0]


def load_samples(source: str | Path | IterableDataset | None, count: int, seed: int = 0) -> Iterator[dict]:
    """At most `count` samples {"image": RGB picture, "question", "answer"}, in the same order for the same seed.

    Says with a progress bar how far it is, after the first sample how many minutes all will take (if more than one),
    and at the end what was skipped and why.

    Args:
        source: hub id, folder in `imagefolder` form, PHOTOGRAPHS, or None (see `open_dataset`), or what that returns; a
            column "question" replaces "Describe this image.".
    """
    data, skipped = source if isinstance(source, IterableDataset) else open_dataset(source, seed), Counter()
    picture_column, caption_column = columns(data)
    # undecoded, so that one broken file is one skipped sample and not the end of the stream
    data = data.cast_column(picture_column, datasets.Image(decode=False))
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
                image = open_picture(datasets.Image().decode_example(row[picture_column]))
            except (OSError, ValueError, TypeError, SyntaxError, PIL.Image.DecompressionBombError) as error:
                if getattr(error, "errno", None) is not None:  # of the disk, say, not of the picture
                    raise
                skipped[f"unreadable picture ({type(error).__name__})"] += 1
                continue
            started = time.perf_counter()
            yield {"image": image, "question": row.get("question") or QUESTION, "answer": caption.strip()}
            bar.update()
            seconds = time.perf_counter() - started
            if bar.n == 1 and seconds * count > 60:
                bar.write(f"One sample takes {seconds:.0f} s, all {count} about {seconds * count / 60:.0f} minutes")
    if skipped:
        print("Skipped: " + ", ".join(f"{number} × {reason}" for reason, number in skipped.items()))


def count_samples(source: str | Path, count: int) -> int:
    """Number of samples to calibrate with: `count`, or all of a source on this disk that has fewer (it prints so).

    Args:
        source: as for `load_samples`. One on the hub is not read ahead.
    """
    if str(source) not in (PACKAGED, PHOTOGRAPHS) and not Path(source).is_dir():
        return count
    data = open_dataset(source)
    undecoded = data.cast_column(columns(data)[0], datasets.Image(decode=False))
    available = sum(1 for _ in itertools.islice(undecoded, count))
    if available < count:
        print(f"⚠️ {source} has {available} samples, {count} were asked for: calibration is with {available}")
    return available


# ---- Samples -> tensors ---------------------------------------------------------------------------------------------


class Samples(Iterable):
    """`make(sample)` of each sample, made anew at each iteration.

    Raises:
        ValueError: in the iteration, there are fewer usable samples than `count`.
    """

    def __init__(self, make, source: str | Path | None, count: int, seed: int):
        # the hub is asked once, which takes half a minute where it is out of reach
        self.make, self.count, self.open = make, count, functools.cache(functools.partial(open_dataset, source, seed))
        self.source = source

    def __iter__(self):
        number = 0
        for sample in load_samples(self.open(), self.count):
            number += 1
            yield self.make(sample)
        if number < self.count:
            raise ValueError(
                f"{self.source or 'The default source'} has {number} usable samples and {self.count} were asked for: "
                f"set dataset_size={number}, or give a source with more."
            )


def processed(processor, sample: dict) -> dict[str, np.ndarray]:
    """The processor's tensors for a sample as a conversation: the picture, its question, and its answer."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample["question"]}]},
        {"role": "assistant", "content": [{"type": "text", "text": sample["answer"]}]},
    ]
    text = processor.apply_chat_template(messages)
    return processor(text=text, images=[sample["image"]], add_special_tokens=False, return_tensors="np")


def check_processor(processor, count: int | None) -> None:
    """Refuses what the published notebook gave here, the number of samples alone.

    Raises:
        TypeError: with the call that works.
    """
    if count is None or not hasattr(processor, "image_processor"):
        raise TypeError(
            "Give the model's processor, then the number of samples: "
            "prepare_dataset_vision(AutoProcessor.from_pretrained(model_dir), 100)."
        )


def prepare_dataset_vision(
    processor, count: int = 0, source: str | Path | None = None, seed: int = 0
) -> Iterable[dict]:
    """Inputs of the vision IR by port name, for `count` pictures.

    Args:
        processor: the model's `MllamaProcessor`.
        source, seed: as for `load_samples`.
    Raises:
        ValueError: in the iteration, the source has fewer.
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
    """Inputs of the language IR by port name: the whole conversation about each of `count` pictures as one prompt.

    Args:
        image_encoder: encodes each picture when its turn comes; its K/V are gone with the sample.
        source, seed: as for `load_samples`.
    Raises:
        ValueError: in the iteration, the source has fewer.
    """

    check_processor(processor, count)

    def inputs(sample):
        tensors = processed(processor, sample)
        images = ImageInputs(*(tensors[name] for name in ImageInputs._fields))
        seen = tiles_seen(images.cross_attention_mask, tensors["input_ids"].shape[1])
        prompt = visible_kv(image_encoder.encode(images), seen, image_encoder.shapes)
        return language_inputs(tensors["input_ids"], prompt, tensors["attention_mask"])

    return Samples(inputs, source, count, seed)
