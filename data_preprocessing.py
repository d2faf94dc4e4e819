"""Pictures with captions -> what the two IRs take, one sample at a time, for NNCF to calibrate with.

    load_samples -> processor -> image_inputs -> vision IR -> language_inputs -> language IR

The tensors are built by the functions that inference uses (`ov_mllama/vision.py`, `ov_mllama/language.py`), so each
sample has its own tiles and masks. Nothing is kept: iterating again reads, decodes and encodes again, and memory holds
one sample.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
from datasets import IterableDataset, get_dataset_split_names, load_dataset
from tqdm.auto import tqdm

from demo_model import SAMPLES
from ov_mllama.cross_attention import restrict, tiles_seen
from ov_mllama.images import open_picture
from ov_mllama.language import language_inputs
from ov_mllama.vision import ImageInputs, OVImageEncoder, image_inputs

HUB_SET = "lmms-lab/flickr30k"  # 31 000 photographs with five captions each, as parquet files that hold the pictures
QUESTION = "Describe this image."
CAPTION_COLUMNS = ("answer", "caption", "captions", "text", "sentence", "sentences")


# ---- Pictures with captions -----------------------------------------------------------------------------------------


def open_dataset(source: str | Path | None = None, seed: int = 0) -> IterableDataset:
    """A shuffled stream of a local `imagefolder` or of a set on the hub that holds its pictures, its first split.

    Without a `source` it is HUB_SET, or where the hub is out of reach (it says so) the demo checkpoint's samples.
    Nothing is executed from the hub (datasets 5 runs no scripts) and no picture is fetched from elsewhere.

    Raises:
        FileNotFoundError: no such folder or set, or no network.
        ValueError: the set has no column of pictures or none of captions.
    """
    if source is None:
        try:
            return open_dataset(HUB_SET, seed)
        except FileNotFoundError:
            print(f"{HUB_SET} is out of reach: calibrating with the demo checkpoint's few drawings instead")
            source = SAMPLES
    try:
        if Path(source).is_dir():
            data = load_dataset("imagefolder", data_dir=str(source), split="train", streaming=True)
        else:
            data = load_dataset(str(source), split=get_dataset_split_names(str(source))[0], streaming=True)
    except (OSError, ConnectionError) as error:
        raise FileNotFoundError(
            f"'{source}' is neither a folder of pictures here nor a data set that can be reached on the Hugging Face "
            f"hub ({type(error).__name__}): check the spelling and the network, or give {SAMPLES}."
        ) from error
    columns(data)
    return data.shuffle(seed=seed, buffer_size=256)


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


def load_samples(source: str | Path | None, count: int, seed: int = 0) -> Iterator[dict]:
    """At most `count` samples {"image": RGB picture, "question", "answer"}, in the same order for the same seed.

    Says with a progress bar how far it is, after the first sample how many minutes all will take (if more than one),
    and at the end what was skipped and why.

    Args:
        source: hub id, folder in `imagefolder` form, or None (see `open_dataset`); a column "question" replaces
            "Describe this image.".
    """
    data, skipped = open_dataset(source, seed), Counter()
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


# ---- Samples -> tensors ---------------------------------------------------------------------------------------------


class Samples(Iterable):
    """`make(sample)` of each sample, made anew at each iteration."""

    def __init__(self, make, source: str | Path | None, count: int, seed: int):
        self.make, self.source, self.count, self.seed = make, source, count, seed

    def __iter__(self):
        return (self.make(sample) for sample in load_samples(self.source, self.count, self.seed))


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
    """

    check_processor(processor, count)

    def inputs(sample):
        tensors = processed(processor, sample)
        return image_inputs(
            tensors["pixel_values"][0, 0], tensors["aspect_ratio_ids"][0, 0], tensors["aspect_ratio_mask"][0, 0]
        )

    return Samples(inputs, source, count, seed)


def prepare_dataset_llm(
    processor, image_encoder: OVImageEncoder, count: int, source: str | Path | None = None, seed: int = 0
) -> Iterable[dict]:
    """Inputs of the language IR by port name: the whole conversation about each of `count` pictures as one prompt.

    Args:
        image_encoder: encodes each picture when its turn comes; its K/V are gone with the sample.
        source, seed: as for `load_samples`.
    """

    check_processor(processor, count)

    def inputs(sample):
        tensors = processed(processor, sample)
        images = ImageInputs(*(tensors[name] for name in ImageInputs._fields))
        seen = tiles_seen(images.cross_attention_mask, tensors["input_ids"].shape[1])
        prompt = restrict(image_encoder.encode(images), seen, image_encoder.shapes)
        return language_inputs(tensors["input_ids"], prompt, tensors["attention_mask"])

    return Samples(inputs, source, count, seed)
