"""Shapes and tensor names shared by converter and runtime, and the layout of cross-attention keys and values."""

from dataclasses import dataclass

import numpy as np

# Additive mask value: finite in float16 even when added to a score, so that no masked row becomes NaN ("!!!!" answers,
# openvino_notebooks#2442); its exp() is 0 in every precision.
MASKED = float(np.finfo(np.float16).min) / 2

# Output of the language IR: cross-attention queries of the positions with logits. IRs of earlier versions lack it.
QUERIES = "cross_attention_queries"


@dataclass(frozen=True)
class MllamaShapes:
    """Shapes of the two IRs, from the checkpoint's config.

    Attributes:
        max_num_tiles: tiles of an image, real or padding.
        canvas_tiles: tiles of the canvas, by aspect ratio id; id 0 is no image.
        tile_size: pixels along a tile's edge.
        vision_size: channels of the vision tower.
        patches_per_tile: K/V rows of one tile: its patches and the class token (1601 for 560/14 pixels).
        num_heads, num_kv_heads, head_dim: of the language model's attention.
        self_layers, cross_layers: indices of its self- and cross-attention layers.
        vocab_size: columns of the logits; `<|image|>`, which has none, may have this id.
        embeddings: rows of the embedding table.
        max_positions: context length in tokens.
    """

    max_num_tiles: int
    patches_per_tile: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    self_layers: tuple[int, ...]
    cross_layers: tuple[int, ...]
    vocab_size: int
    embeddings: int
    max_positions: int
    canvas_tiles: tuple[int, ...] = ()
    tile_size: int = 0
    vision_size: int = 0

    @classmethod
    def from_config(cls, config) -> "MllamaShapes":
        """Read a transformers `MllamaConfig`, or a `LlamaConfig`, which has no cross-attention layers."""
        text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", None)
        layers = range(text.num_hidden_layers)
        cross_layers = tuple(i for i in layers if i in getattr(text, "cross_attention_layers", ()))
        return cls(
            max_num_tiles=vision.max_num_tiles if vision else 0,
            patches_per_tile=(vision.image_size // vision.patch_size) ** 2 + 1 if vision else 0,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.hidden_size // text.num_attention_heads,
            self_layers=tuple(i for i in layers if i not in cross_layers),
            cross_layers=cross_layers,
            vocab_size=text.vocab_size,
            embeddings=text.vocab_size + (EXTRA_EMBEDDINGS if vision else 0),
            max_positions=text.max_position_embeddings,
            canvas_tiles=(1, *(high * wide for high, wide in vision.supported_aspect_ratios)) if vision else (),
            tile_size=vision.image_size if vision else 0,
            vision_size=vision.hidden_size if vision else 0,
        )

    # ---- Cross-attention keys and values: outputs of the vision IR, inputs of the language IR ----

    @property
    def cross_kv_names(self) -> list[str]:
        return [f"cross_attn_key_values.{i}.{part}" for i in self.cross_layers for part in ("key", "value")]

    def cross_kv_shape(self, name: str, batch: int, rows: int) -> tuple[int, ...]:
        """Return a shape; keys are transposed for `query @ key`, rows in the order of images and their tiles."""
        shape = [batch, self.num_kv_heads, self.head_dim, self.head_dim]
        shape[rows_axis(name)] = rows
        return tuple(shape)

    def cross_kv_bytes(self, rows: int) -> int:
        """Return the bytes of so many rows of an image, in f32."""
        return 4 * 2 * len(self.cross_layers) * self.num_kv_heads * self.head_dim * rows

    # ---- The text's KV cache: state of the language IR, [batch, kv heads, slots, head_dim] ----

    @property
    def past_names(self) -> list[str]:
        return [f"past_key_values.{i}.{part}" for i in self.self_layers for part in ("key", "value")]

    @property
    def present_names(self) -> list[str]:
        return [f"present.{i}.{part}" for i in self.self_layers for part in ("key", "value")]


EXTRA_EMBEDDINGS = 8  # embeddings of MllamaTextModel beyond vocab_size, `<|image|>` the first


def rows_axis(name: str) -> int:
    """Return the rows' axis of a cross-attention key or value."""
    return 3 if name.endswith(".key") else 2


def static_shape(port) -> tuple[int, ...]:
    """Return the shape of a port of OpenVINO, -1 for any length."""
    return tuple(axis.get_length() if axis.is_static else -1 for axis in port.partial_shape)
