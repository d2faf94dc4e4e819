"""Drawn images with questions and right answers: the demo checkpoint's training and test data.

All are pure functions of a `numpy.random.Generator`. A scene is first a specification, then pixels. A hash of its
specification assigns it to a split, and the handwritten digits are split by drawing, so no test item was trained on.
This file knows nothing of models or tokens.
"""

import functools
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 200, 30),
    "purple": (140, 60, 170),
    "black": (30, 30, 30),
}
BACKGROUNDS = ((255, 255, 255), (240, 240, 236), (250, 243, 224), (228, 238, 246))
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
TASKS = ("describe", "count", "place", "colour", "unusual", "digits")
HELD_OUT = 8  # one specification in so many


@dataclass(frozen=True)
class Thing:
    """A shape or a handwritten digit; x, y, size are fractions of the image's width, height and smaller side."""

    kind: str
    colour: str
    x: float
    y: float
    size: float
    place: str = ""
    drawing: int = -1  # index into the digits' drawings

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """The content of an image, its size in pixels, and all questions about it."""

    things: tuple[Thing, ...]
    width: int
    height: int
    questions: tuple[tuple[str, str, str], ...]  # (task, question, answer)


# ---- Specifications -------------------------------------------------------------------------------------------------


def random_scene(rng: np.random.Generator, width: int, height: int, held_out: bool = False, makers=None) -> Scene:
    """Return a scene of `width` x `height` pixels from the training or the held-out split, by one of `makers` (default
    MAKERS)."""
    makers = makers or MAKERS
    maker = makers[rng.integers(len(makers))]
    while True:
        scene = maker(rng, width, height, held_out)
        specification = " ".join(sorted(f"{t.kind}{t.colour}{t.place}" for t in scene.things)) + maker.__name__
        if maker is digit_scene or (zlib.crc32(specification.encode()) % HELD_OUT == 0) == held_out:
            return scene


def placed_scene(rng, width, height, held_out) -> Scene:
    """Return a scene of one to four different things, at most one in each quarter of the image."""
    places = sorted(rng.choice(4, size=rng.integers(1, 5), replace=False))
    names = rng.choice(len(SHAPES) * len(COLOURS), size=len(places), replace=False)
    things = []
    for place, name in zip(places, names, strict=True):
        size = rng.uniform(0.34, 0.44)
        half_x, half_y = size / 2 * min(width, height) / width, size / 2 * min(width, height) / height
        x = rng.uniform(half_x + 0.02, 0.48 - half_x) + 0.5 * (place % 2)
        y = rng.uniform(half_y + 0.02, 0.48 - half_y) + 0.5 * (place // 2)
        shape, colour = SHAPES[name // len(COLOURS)], list(COLOURS)[name % len(COLOURS)]
        things.append(Thing(shape, colour, x, y, size, PLACES[place]))
    listed = [f"a {t.name} at the {t.place}" for t in things]
    description = listed[0] if len(listed) == 1 else ", ".join(listed[:-1]) + " and " + listed[-1]
    questions = [
        ("describe", pick(rng, "Describe this image.", "What do you see in this image?"), f"{capital(description)}.")
    ]
    thing = things[rng.integers(len(things))]
    questions.append(
        (
            "place",
            pick(rng, *(f"{w} the {thing.name}?" for w in ("Where is", "Where do you see"))),
            f"At the {thing.place}.",
        )
    )
    questions.append(("place", f"What is at the {thing.place}?", f"A {thing.name}."))
    shapes = [t.kind for t in things]
    single = [t for t in things if shapes.count(t.kind) == 1]
    if single:
        thing = single[rng.integers(len(single))]
        questions.append(
            (
                "colour",
                pick(rng, f"What colour is the {thing.kind}?", f"Which colour does the {thing.kind} have?"),
                f"The {thing.kind} is {thing.colour}.",
            )
        )
    questions.append(count_question(rng, things))
    return Scene(tuple(things), width, height, tuple(questions))


def counted_scene(rng, width, height, held_out) -> Scene:
    """Return a scene of one to six things of one to three kinds on a grid."""
    cells = grid(rng, width, height)
    kinds = [(pick(rng, *SHAPES), pick(rng, *COLOURS)) for _ in range(rng.integers(1, 4))]
    chosen = cells[: rng.integers(1, min(6, len(cells)) + 1)]
    things = [Thing(*kinds[rng.integers(len(kinds))], *cell) for cell in chosen]
    questions = [count_question(rng, things) for _ in range(3)]
    return Scene(tuple(things), width, height, tuple(questions))


def unusual_scene(rng, width, height, held_out) -> Scene:
    """Return a scene of three or more equal things, perhaps one of them of another shape or colour."""
    cells = grid(rng, width, height)
    chosen = cells[: rng.integers(3, min(6, len(cells)) + 1)]
    shape, colour, way = pick(rng, *SHAPES), pick(rng, *COLOURS), rng.integers(5)
    things = [Thing(shape, colour, *cell) for cell in chosen]
    if way == 0:
        answer = f"Nothing is unusual: all {plural(shape)} are {colour}."
    elif way < 3:
        other = pick(rng, *(c for c in COLOURS if c != colour))
        things[0] = Thing(shape, other, *chosen[0])
        answer = f"One {shape} is {other}, but all the others are {colour}."
    else:
        other = pick(rng, *(s for s in SHAPES if s != shape))
        things[0] = Thing(other, colour, *chosen[0])
        answer = f"There is one {other} among {plural(shape)}."
    question = pick(
        rng, "What is unusual in this image?", "What is unusual on this image?", "What does not fit in this image?"
    )
    return Scene(tuple(things), width, height, (("unusual", question, answer), count_question(rng, things)))


def digit_scene(rng, width, height, held_out) -> Scene:
    """Return a scene of one to three handwritten digits in a row."""
    images, labels = digit_drawings(held_out)
    room = max(1, min(3, round(2 * width / height)))
    count = rng.integers(1, room + 1)
    colour, things = pick(rng, "black", "blue", "red"), []
    for i in range(count):
        drawing = int(rng.integers(len(images)))
        size = min(0.8, 0.92 * width / count / min(width, height)) * rng.uniform(0.75, 1.0)
        half_y = size / 2 * min(width, height) / height
        y = rng.uniform(half_y, 1 - half_y) if half_y < 0.5 else 0.5
        things.append(
            Thing(str(labels[drawing]), colour, (i + 0.5) / count, y, size, drawing=drawing + 10_000 * held_out)
        )
    if count == 1:
        question = pick(rng, "Which digit is written here?", "What digit do you see?")
        answer = f"The digit {things[0].kind}."
    else:
        question = pick(rng, "Which digits are written here?", "What digits do you see, from left to right?")
        answer = f"The digits {', '.join(t.kind for t in things)}."
    return Scene(tuple(things), width, height, (("digits", question, answer),))


MAKERS = (placed_scene, placed_scene, counted_scene, unusual_scene, digit_scene)


def grid(rng, width, height) -> list[tuple[float, float, float]]:
    """Return shuffled cells as (x, y, size) with jitter; two or more cells along the smaller side."""
    side = min(width, height) / 2
    if min(width, height) > 150 and rng.random() < 0.4:
        side /= 1.5
    columns, rows = int(width // side), int(height // side)
    cells = []
    for i in rng.permutation(columns * rows):
        size = rng.uniform(0.66, 0.86) * side
        x = ((i % columns) + 0.5) * width / columns + rng.uniform(-1, 1) * (side - size) / 2
        y = ((i // columns) + 0.5) * height / rows + rng.uniform(-1, 1) * (side - size) / 2
        cells.append((x / width, y / height, size / min(width, height)))
    return cells


def count_question(rng, things) -> tuple[str, str, str]:
    """Return a question for the number of shapes, of a kind, a colour or in all; sometimes of an absent kind."""
    way, thing = rng.integers(6), things[rng.integers(len(things))]
    if way == 0:
        noun, count = "shape", len(things)
    elif way < 3:
        noun, count = f"{thing.colour} shape", sum(t.colour == thing.colour for t in things)
    else:
        shape = thing.kind if way < 5 else pick(rng, *SHAPES)
        noun, count = shape, sum(t.kind == shape for t in things)
    question = pick(rng, f"How many {plural(noun)} are there?", f"How many {plural(noun)} do you see?")
    verb, noun = ("is", noun) if count == 1 else ("are", plural(noun))
    return "count", question, f"There {verb} {NUMBERS[count]} {noun}."


def plural(noun: str) -> str:
    """Return the plural of a regular noun."""
    return noun + ("es" if noun.endswith("s") else "s")


def capital(text: str) -> str:
    """Return the text with its first letter capitalised."""
    return text[0].upper() + text[1:]


def pick(rng, *options):
    """Return one of the options, drawn uniformly."""
    return options[rng.integers(len(options))]


# ---- Pixels ---------------------------------------------------------------------------------------------------------


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw the scene as uint8 [height, width, 3], antialiased; `rng` chooses background, tilt and shade."""
    canvas = np.empty((scene.height, scene.width, 3), np.float32)
    canvas[:] = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    for thing in scene.things:
        side = max(8, round(thing.size * min(scene.width, scene.height)))
        if thing.drawing >= 0:
            mask = digit_mask(thing, side, rng)
        else:
            mask = np.asarray(shape_mask(thing.kind, int(rng.integers(-2, 3)) * 6).resize((side, side), Image.BOX))
        colour = np.clip(np.array(COLOURS[thing.colour]) + rng.uniform(-18, 18, 3), 0, 255)
        left, top = round(thing.x * scene.width - side / 2), round(thing.y * scene.height - side / 2)
        rows = slice(max(top, 0), min(top + side, scene.height))
        columns = slice(max(left, 0), min(left + side, scene.width))
        alpha = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None] / np.float32(
            255
        )
        canvas[rows, columns] += alpha * (colour - canvas[rows, columns])
    return canvas.round().astype(np.uint8)


@functools.cache
def shape_mask(kind: str, tilt: int) -> Image.Image:
    """Return a shape's coverage, 8 bit, 240 x 240, rotated by `tilt` degrees."""
    full, image = 240, Image.new("L", (240, 240))
    pen, low, high, middle = ImageDraw.Draw(image), 12, 228, 120
    if kind in ("circle", "ring"):
        pen.ellipse((low, low, high, high), fill=255)
        if kind == "ring":
            pen.ellipse((72, 72, full - 72, full - 72), fill=0)
    elif kind == "square":
        pen.rectangle((30, 30, 210, 210), fill=255)
    elif kind == "triangle":
        pen.polygon([(middle, low + 6), (high, 212), (low, 212)], fill=255)
    elif kind == "cross":
        pen.rectangle((88, low, 152, high), fill=255)
        pen.rectangle((low, 88, high, 152), fill=255)
    else:
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radius = np.where(np.arange(10) % 2, 46, 114)
        pen.polygon(
            [(middle + r * np.cos(a), middle + 6 + r * np.sin(a)) for a, r in zip(angles, radius, strict=True)],
            fill=255,
        )
    return image.rotate(tilt, Image.BICUBIC)


@functools.cache
def digit_drawings(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's handwritten digits, uint8 [n, 8, 8], and their labels; every fifth drawing is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 0) == held_out
    return (data.images[chosen] * 255 / 16).astype(np.uint8), data.target[chosen]


def digit_mask(thing: Thing, side: int, rng) -> np.ndarray:
    """Return an enlarged drawing, slightly rotated and stretched."""
    images, _ = digit_drawings(False) if thing.drawing < 10_000 else digit_drawings(True)
    drawing = Image.fromarray(images[thing.drawing % 10_000])
    image = drawing.resize((side, side), Image.BICUBIC).rotate(rng.uniform(-8, 8), Image.BICUBIC)
    stretched = image.transform(
        (side, side),
        Image.AFFINE,
        (
            rng.uniform(0.95, 1.12),
            rng.uniform(-0.06, 0.06),
            rng.uniform(-2, 2),
            0,
            rng.uniform(0.95, 1.08),
            rng.uniform(-2, 2),
        ),
        Image.BILINEAR,
    )
    return np.asarray(stretched)
