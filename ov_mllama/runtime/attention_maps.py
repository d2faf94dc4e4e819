"""Heat maps of an answer's cross-attention over its images, computed afterwards from its queries and the cached keys of
the images.

    generate(..., queries=AnswerQueries(prompt tokens)) -> queries -> image_attention -> a map for each image
"""

import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import get_image_size_fit_to_canvas

from .checks import image_arrays
from .cross_attention import tiles_seen, visible_kv
from .errors import InputError
from .shapes import MllamaShapes
from .vision import Encoded, ImageInputs


class AnswerQueries:
    """Cross-attention queries of an answer, in float16: 64 KB per token of the 11B.

    Args:
        prompt_tokens: number of tokens before the answer.

    Attributes:
        tokens: the answer's token ids; set when `generate` returns.
        rows: f16 [layers * heads * head_dim] by the position of the token in the answer; -1 is the prompt's last one,
            which predicts the answer's first.
    """

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.tokens: list[int] = []
        self.rows: dict[int, np.ndarray] = {}

    def record(self, end: int, queries: np.ndarray) -> None:
        """Record the queries f32 [1, tokens, layers * heads * head_dim] of the last tokens before position `end` of
        prompt and answer. Those of rejected draft tokens are replaced by the next step's.

        Raises:
            InputError: for more than one row.
        """
        if len(queries) > 1:
            raise InputError(f"Queries of {len(queries)} rows cannot be recorded: give one prompt, without beams.")
        start = end - queries.shape[1] - self.prompt_tokens
        for place, row in enumerate(queries[0], start):
            if place >= -1:
                self.rows[place] = row.astype(np.float16)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows.values())

    def predicting(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the queries that predict tokens, given by their indices in the answer: f16 [tokens, ...]."""
        wrong = [token for token in tokens if token - 1 not in self.rows]
        if wrong or not len(tokens):
            raise InputError(
                f"Token {wrong[:1] or 'none'} of an answer of {len(self.tokens)}: give indices from 0, of an answer "
                "that `generate(..., queries=...)` has recorded."
            )
        return np.stack([self.rows[token - 1] for token in tokens])


def image_attention(
    model, inputs: Mapping, queries: AnswerQueries, tokens: Sequence[int], images: Sequence[Image.Image]
) -> list[np.ndarray | None]:
    """Return the cross-attention of a word of an answer over each image: weights, averaged over the word's tokens, all
    heads and all layers.

    A token's map is that of the query which predicts it, at the position before. Chosen on 58 held-out drawings of the
    demo model, where the peak was on the shape asked about in 86 %, against 36 % with the query at the token's own
    position; on 199 others it was in 89 % and 33 %, and 17 % by chance. Weighting heads by their sharpness gave 91 %, a
    layer alone 75 and 79 %, the difference to the answer's mean 88 %: the plain average is nearly as good.

    Class tokens of tiles, empty tiles and padding are left out. Images that are no longer in the encoder's cache or
    store are encoded again.

    Args:
        model: an `OVMLlamaForConditionalGeneration`.
        inputs: the processor's tensors of the prompt, one row.
        queries: of its answer, from `generate(**inputs, queries=queries)`.
        tokens: indices of the word's tokens in `queries.tokens`.
        images: those of the prompt, as given to the processor.
    Returns:
        f32 [height, width] for each image, in pixels of the tiles that the model sees; None for one that the answer
        cannot see.
    Raises:
        InputError: for tokens without queries, or `inputs` of several rows.
    """
    arrays = image_arrays(*(inputs.get(name) for name in ImageInputs._fields))
    if arrays is None:
        return []
    if len(arrays.pixel_values) > 1:
        raise InputError(f"The prompt has {len(arrays.pixel_values)} rows: give the inputs of one.")
    asked, shapes = queries.predicting(tokens), model.shapes
    seen = tiles_seen(arrays.cross_attention_mask, inputs["input_ids"].shape[1])[0, -1]
    if not seen.any():
        return [None] * len(images)
    weights = attention_weights(asked, model.image_encoder.encode(arrays), seen, shapes).mean((0, 1, 2))
    grids = np.zeros((len(seen), shapes.patches_per_tile - 1), np.float32)
    grids[seen] = weights.reshape(-1, shapes.patches_per_tile)[:, 1:]  # the class token comes first
    ratios = model.config.vision_config.supported_aspect_ratios
    return [
        in_image(of_tiles, ratios[ratio - 1], image.size, shapes.tile_size) if visible.any() else None
        for of_tiles, visible, ratio, image in zip(
            np.split(grids, len(images)), np.split(seen, len(images)), arrays.aspect_ratio_ids[0], images, strict=True
        )
    ]


def in_image(tiles: np.ndarray, canvas: Sequence[int], size: tuple[int, int], tile_size: int) -> np.ndarray:
    """Return the values of patches, f32 [tiles, patches], as f32 [height, width] of the image, without its padding.

    Args:
        canvas: tiles along its height and its width.
        size: width and height of the image before the processor fits it into the canvas, at its top left.
    """
    high, wide = canvas
    side = round(tiles.shape[1] ** 0.5)
    grid = tiles[: high * wide].reshape(high, wide, side, side).swapaxes(1, 2).reshape(high * side, wide * side)
    height, width = get_image_size_fit_to_canvas(size[1], size[0], high * tile_size, wide * tile_size, tile_size)
    patch = tile_size / side
    fitted = (int(width), int(height))
    box = (0, 0, width / patch, height / patch)
    return np.asarray(Image.fromarray(grid).resize(fitted, Image.Resampling.BILINEAR, box=box))


def attention_weights(queries: np.ndarray, encoded: Encoded, seen: np.ndarray, shapes: MllamaShapes) -> np.ndarray:
    """Return the cross-attention's weights, f32 [layers, heads, tokens, rows of the visible tiles].

    Args:
        queries: [tokens, layers * heads * head_dim], as the language IR returns them.
        seen: bool [images * tiles], the tiles that the tokens see.
    """
    view = visible_kv(encoded, seen[None, None], shapes)
    tokens, layers, kv_heads = len(queries), len(shapes.cross_layers), shapes.num_kv_heads
    by_layer = queries.astype(np.float32).reshape(tokens, layers, kv_heads, -1, shapes.head_dim)
    weights = []
    for layer, name in enumerate(shapes.cross_kv_names[::2]):  # keys, scaled already
        query = by_layer[:, layer].transpose(1, 2, 0, 3).reshape(kv_heads, -1, shapes.head_dim)
        scores = (query @ view.key_values[name][0]).reshape(shapes.num_heads, tokens, -1) + view.bias[0]
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        weights.append(scores / scores.sum(-1, keepdims=True))
    return np.stack(weights)


def word_tokens(tokenizer, tokens: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Return the words of an answer, and the indices of each one's tokens."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = [tokenizer.decode(tokens[:end], **options) for end in range(len(tokens) + 1)]
    # the first tokens of a character of several are decoded as U+FFFD
    spans = [(len(text.rstrip("\ufffd")), len(after)) for text, after in itertools.pairwise(texts)]
    words = []
    for match in re.finditer(r"\w[\w'’.,-]*\w|\w", texts[-1]):
        touched = [index for index, (start, end) in enumerate(spans) if start < match.end() and end > match.start()]
        words.append((match[0], touched))
    return words
