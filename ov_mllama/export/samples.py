"""Photographs of installed packages, for questions and calibration without network.

None is in this repository: scikit-image and scikit-learn bring the files, and name their authors and licences in the
docstrings of `skimage.data` and in sklearn's datasets/images/README.txt. Only those in the public domain, CC0 or CC BY
are used. Captions were written by hand for each crop.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ov_mllama.runtime.errors import NotFoundError
from ov_mllama.runtime.images import load_image

QUESTION = "Describe this image."  # about crops
SKIMAGE = "https://scikit-image.org/docs/stable/api/skimage.data.html"
FLICKR = "https://www.flickr.com/photos"
FILES = {  # name: file in an installed package; its author, licence and source
    "astronaut": ("skimage/data/astronaut.png", "NASA, public domain, https://flic.kr/p/r9qvLn"),
    "camera": ("skimage/data/camera.png", f"Lav Varshney, CC0, {SKIMAGE}"),
    "cat": ("skimage/data/chelsea.png", f"Stefan van der Walt, CC0, {SKIMAGE}"),
    "coffee": ("skimage/data/coffee.png", f"Rachel Michetti, CC0, {SKIMAGE}"),
    "galaxies": (
        "skimage/data/hubble_deep_field.jpg",
        "NASA, public domain, http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
    ),
    "handwriting": ("skimage/data/text.png", "public domain, https://en.wikipedia.org/wiki/File:Corner.png"),
    "tower": ("sklearn/datasets/images/china.jpg", f"danielbuechele, CC BY 2.0, {FLICKR}/danielbuechele/6061409035/"),
    "dahlia": ("sklearn/datasets/images/flower.jpg", f"vultilion, CC BY 2.0, {FLICKR}/vultilion/6056698931/"),
}


class View(NamedTuple):
    """A photograph or a crop of it; enlarged, a crop fills more tiles, as a phone's photographs do."""

    file: str  # key of FILES
    caption: str  # answers the question
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels; None: all of it
    zoom: int = 1
    question: str = QUESTION


PHOTOGRAPHS = {
    "astronaut": View(
        "astronaut",
        "An orange space suit. Behind her are the flag of the United States and a model of a space shuttle.",
        question="What is the woman wearing, and what is behind her?",
    ),
    "patch": View(
        "astronaut",
        "Collins, Ashby, Coleman, Hawley and Tognini.",
        (120, 335, 220, 435),
        zoom=4,
        question="Which names are on the patch?",
    ),
    "camera": View("camera", "A man looks through a video camera on a tripod.", question="What is the man doing?"),
    "cat": View(
        "cat", "A tabby cat with yellow-green eyes.", question="What animal is this? What colour are its eyes?"
    ),
    "coffee": View("coffee", "A red cup of coffee on a red saucer, with a spoon.", question="What is on the table?"),
    "galaxies": View(
        "galaxies", "Space, with hundreds of galaxies, most of them small.", question="What does this picture show?"
    ),
    "handwriting": View(
        "handwriting", "Mathematical formulas, written by hand in dark ink.", question="What is on this paper?"
    ),
    "tower": View(
        "tower",
        "A Chinese tower of several storeys with curved roofs. Around it are trees, behind it a lake with small boats.",
        question="What kind of building is this, and what is around it?",
    ),
    "dahlia": View("dahlia", "An orange dahlia in full bloom.", question="What flower is this? What colour is it?"),
}
CROPS = (
    View("astronaut", "A smiling woman with short hair, her face seen from close by.", (140, 10, 310, 180), 2),
    View("astronaut", "A model of a space shuttle with its brown tank and two white boosters.", (352, 0, 470, 285), 3),
    View("astronaut", "A hanging flag of the United States, and below it an orange sleeve.", (0, 0, 95, 400), 3),
    View("astronaut", "A helmet with a black visor, in which a bright light is mirrored.", (275, 340, 512, 512)),
    View("astronaut", "An orange space suit with a round patch, and a black helmet visor.", (20, 290, 512, 512), 2),
    View("camera", "A man's head in profile, his eye at the viewfinder of a video camera.", (140, 40, 340, 240)),
    View("camera", "A tower block and lower buildings, in black and white.", (335, 105, 512, 236), 4),
    View("camera", "The legs of a tripod on short grass, in black and white.", (225, 312, 415, 512)),
    View("cat", "One yellow-green eye of a tabby cat.", (130, 70, 220, 160)),
    View("cat", "The two yellow-green eyes of a tabby cat.", (50, 75, 451, 175), 4),
    View("cat", "The nose of a cat and its long white whiskers.", (0, 190, 330, 300), 3),
    View("cat", "The striped forehead of a cat, and below it a reddish nose.", (190, 0, 310, 300), 4),
    View("coffee", "A cup with coffee in it, white inside and red outside.", (170, 10, 420, 260), 2),
    View("coffee", "A metal spoon on a red saucer, beside a cup.", (315, 60, 435, 340), 3),
    View("coffee", "The edge of a red saucer on a wooden table.", (0, 330, 600, 400), 2),
    View("galaxies", "A bright star with spikes, and galaxies, one large and orange.", (640, 400, 840, 620), 2),
    View("galaxies", "A pale spiral galaxy on black.", (80, 355, 170, 445)),
    View("galaxies", "Many small galaxies of different colours on black.", (0, 690, 1000, 872)),
    View("galaxies", "Galaxies of different shapes and colours on black.", (400, 0, 560, 872)),
    View("handwriting", "Strokes of handwriting on lined paper, seen from close by.", (0, 90, 300, 172), 4),
    View("tower", "A hazy lake with many small boats and a wooded island.", (355, 205, 545, 290), 4),
    View("tower", "The upper storeys of a Chinese tower with curved roofs; a pale sky.", (85, 20, 330, 265), 2),
    View("tower", "A tall green tree against a pale sky.", (545, 130, 640, 427), 3),
    View("dahlia", "An orange dahlia in full bloom, seen from the front.", (170, 82, 446, 360), 4),
    View("dahlia", "The centre of an orange dahlia, where the petals are rolled up.", (250, 170, 355, 265)),
    View("dahlia", "The middle of an orange dahlia, and below it the top of a second one.", (260, 0, 390, 427), 2),
)


def photographs() -> list[dict]:
    """Return PHOTOGRAPHS as {"image": RGB image, "name", "question", "caption", "credit"}.

    Raises:
        NotFoundError: if a package that brings them is not installed.
    """
    return [{**sample(view), "name": name, "credit": FILES[view.file][1]} for name, view in PHOTOGRAPHS.items()]


def calibration_samples() -> list[dict]:
    """Return PHOTOGRAPHS and CROPS as {"image": RGB image, "question", "caption"}, of one tile to four.

    Raises:
        NotFoundError: if a package that brings them is not installed.
    """
    return [sample(view) for view in (*PHOTOGRAPHS.values(), *CROPS)]


def sample(view: View) -> dict:
    """Return the image of a view with its question and caption."""
    image = load_image(installed(FILES[view.file][0])).crop(view.box)
    image = image.resize((image.width * view.zoom, image.height * view.zoom), Image.Resampling.BICUBIC)
    return {"image": image, "question": view.question, "caption": view.caption}


def installed(file: str) -> Path:
    """Return the path of a file in an installed package, which is found without importing it.

    Raises:
        NotFoundError: if the package is not installed, or lacks the file.
    """
    package, _, rest = file.partition("/")
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / rest).is_file():
            return Path(folder) / rest
    raise NotFoundError(
        f"{file} is missing: scikit-image and scikit-learn bring the photographs. Install both with "
        "pip install -r requirements.txt, or give a folder of your own images."
    )
