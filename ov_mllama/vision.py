"""The pictures: what the vision IR makes of them, and the part of it that each step of the language model reads.

processor's tensors -> OVImageEncoder -> K/V of all tiles -> restrict -> CrossAttention
"""

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import openvino as ov

from ov_mllama.graphs import MASKED, MllamaShapes

# ---- The pictures ---------------------------------------------------------------------------------------------------


def image_inputs(pixels: np.ndarray, aspect_ratio_id: int, tile_mask: np.ndarray) -> dict[str, np.ndarray]:
    """Everything that one inference of the vision IR takes, by port name, for one picture as the processor gives it.

    Args:
        pixels: f32 [tiles, channels, height, width].
        tile_mask: i64 [tiles], 1 for real tiles.
    """
    return {
        "pixel_values": np.ascontiguousarray(pixels, np.float32),
        "aspect_ratio_ids": np.array([aspect_ratio_id], np.int64),
        "aspect_ratio_mask": np.ascontiguousarray(tile_mask, np.int64),
    }


class OVImageEncoder:
    """The vision IR: pictures -> cross-attention K/V.

    The pictures used last are kept encoded: a follow-up question does not wait for them again.

    Args:
        path: of the IR.
        device, ov_config: as for `OVMLlamaForConditionalGeneration`.
        cache_bytes: room for encoded pictures; one takes 0.42 GB with the 11B, whatever its size. 0 keeps none.

    Attributes:
        infer_time: seconds for each different picture, next to nothing for those kept; whoever reads it clears it.
        kept: how many of those were kept; cleared likewise.
        pictures: what tells the pictures of the last call apart, for each row of the batch.
        output_shapes: of K/V by port name.
    """

    def __init__(
        self,
        path: str | Path,
        shapes: MllamaShapes,
        device: str = "CPU",
        ov_config: dict | None = None,
        cache_bytes: int = 1_000_000_000,
    ):
        self.shapes = shapes
        self.infer_time: list[float] = []
        self.kept = 0
        self.pictures: list[tuple[bytes, ...]] = []
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[bytes, dict[str, np.ndarray]] = OrderedDict()  # the picture used last is at the end
        self._model = ov.Core().compile_model(path, device, ov_config or {})
        self.output_shapes = {port.get_any_name(): tuple(port.shape) for port in self._model.outputs}
        self._request = self._model.create_infer_request()

    def encode(
        self, pixel_values: np.ndarray, aspect_ratio_ids: np.ndarray, aspect_ratio_mask: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Pictures -> cross-attention K/V by port name (shapes in `CrossAttention`), rows = images * tiles * patches.

        Pictures are encoded one by one (batching gains nothing where arithmetic is the limit), and each different one
        once: beams, repeated pictures and the processor's fill-up pictures cost nothing more. When all rows of the
        batch hold the same pictures, the result has a batch of 1, which broadcasts.

        Args:
            pixel_values: f32 [batch, images, tiles, channels, height, width].
            aspect_ratio_ids: i64 [batch, images].
            aspect_ratio_mask: i64 [batch, images, tiles].
        Raises:
            ValueError: pixels of another model's processor; FloatingPointError: K/V that are not finite.
        """
        takes = tuple(self._model.input("pixel_values").shape)
        if pixel_values.shape[2:] != takes:
            raise ValueError(
                f"pixel_values are {pixel_values.shape[2:]} for each picture, and this model takes {takes}: use the "
                "processor in the model's own folder."
            )
        encoded, prompts = {}, []
        for row in zip(pixel_values, aspect_ratio_ids, aspect_ratio_mask, strict=True):
            prompt = []
            for picture in zip(*row, strict=True):
                key = b"".join(hashlib.sha256(np.ascontiguousarray(part)).digest() for part in picture)
                if key not in encoded:
                    encoded[key] = self._encode_image(key, *picture)
                prompt.append(key)
            prompts.append(tuple(prompt))
        self.pictures = prompts
        if len(set(prompts)) == 1:
            prompts = prompts[:1]

        joined = {}
        for name in self.shapes.cross_kv_names:
            row_axis = 3 if name.endswith(".key") else 2
            joined[name] = join([join([encoded[key][name] for key in prompt], row_axis) for prompt in prompts], axis=0)
        return joined

    def _encode_image(self, key: bytes, *picture) -> dict[str, np.ndarray]:
        started = time.perf_counter()
        key_values = self._cache.pop(key, None)
        if key_values is None:
            key_values = {name: np.empty(shape, np.float32) for name, shape in self.output_shapes.items()}
            for name, array in key_values.items():  # written where it will be kept: the 11B's K/V are 0.4 GB
                self._request.set_tensor(name, ov.Tensor(array, shared_memory=True))
            self._request.infer(image_inputs(*picture), share_inputs=True)
            for array in key_values.values():
                check_finite(array, "image's keys and values")
            self._model.release_memory()  # of what the layers held, while the language model answers
        else:
            self.kept += 1
        self._cache[key] = key_values
        while self._cache and self.cached_bytes > self.cache_bytes:
            self._cache.popitem(last=False)
        self.infer_time.append(time.perf_counter() - started)
        return key_values

    def forget(self) -> None:
        """Drops the pictures kept."""
        self._cache.clear()

    @property
    def cached_bytes(self) -> int:
        """Bytes that the pictures kept take."""
        return sum(array.nbytes for key_values in self._cache.values() for array in key_values.values())


def check_finite(array: np.ndarray, what: str) -> None:
    """Refuses numbers that would come out as "!!!!".

    Raises:
        FloatingPointError: with the precision to set.
    """
    if not np.isfinite(array).all():
        raise FloatingPointError(
            f"The {what} are not finite: the numbers have outgrown the precision that this device computes in. Load "
            "the model with ov_config={'INFERENCE_PRECISION_HINT': 'f32'}; if that is set, the weights are broken."
        )


def join(arrays: list[np.ndarray], axis: int) -> np.ndarray:
    """Concatenated, or the only one itself: K/V of a picture are too large to copy for nothing."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)


# ---- What the language model reads of the pictures ------------------------------------------------------------------


@dataclass
class CrossAttention:
    """The pictures as one step of the language model reads them. Any axis of 1 broadcasts.

    Attributes:
        key_values: by port name, f32: key [batch, kv heads, head_dim, rows], value [batch, kv heads, rows, head_dim].
        bias: f32 [batch, 1, query, rows], 0 or MASKED; a single 0 where every token may see every row.
        rows: f32 [batch, query, 1], 0 for tokens that may see no picture, else 1.
    """

    key_values: dict[str, np.ndarray]
    bias: np.ndarray
    rows: np.ndarray


def no_pictures(shapes: MllamaShapes) -> CrossAttention:
    """For text only: one all-zero row and `rows` closed, so that the cross-attention layers add exactly nothing."""
    key, value = (1, shapes.num_kv_heads, shapes.head_dim, 1), (1, shapes.num_kv_heads, 1, shapes.head_dim)
    key_values = {name: np.zeros(key if name.endswith(".key") else value, np.float32) for name in shapes.cross_kv_names}
    return CrossAttention(key_values, bias=np.zeros((1, 1, 1, 1), np.float32), rows=np.zeros((1, 1, 1), np.float32))


def restrict(key_values: dict[str, np.ndarray], mask: np.ndarray, shapes: MllamaShapes) -> CrossAttention:
    """The part of the pictures that tokens may see, and the bias that hides the rest.

    A token that may see no tile at all (text before the first picture) attends to every row, padding tiles included,
    and only its MLP is switched off: what transformers does, and its open question (transformers#39379). So no row can
    be left out of a step that has such a token.

    Args:
        key_values: of all rows, as the vision encoder wrote them.
        mask: bool [batch, query, images * tiles].
    """
    sees_any = mask.any(-1, keepdims=True)
    needed = mask.any((0, 1)) if sees_any.all() else np.ones(mask.shape[-1], bool)
    if not needed.all():
        key_values = {name: take_tiles(name, array, needed) for name, array in key_values.items()}
    visible = mask[..., needed] | ~sees_any
    if visible.all():
        bias = np.zeros((1, 1, 1, 1), np.float32)
    else:
        bias = np.where(visible, np.float32(0), np.float32(MASKED)).repeat(shapes.patches_per_tile, axis=-1)[:, None]
    return CrossAttention(key_values, bias, rows=sees_any.astype(np.float32))


def tiles_seen(cross_attention_mask: np.ndarray, length: int) -> np.ndarray:
    """Which tiles each token of a prompt of `length` may see: bool [batch, length, images * tiles].

    Args:
        cross_attention_mask: [batch, tokens, images, tiles] from the processor; of tokens beyond it (as when an answer
            is continued) each sees what the last one does.
    """
    mask = cross_attention_mask.astype(bool).reshape(*cross_attention_mask.shape[:2], -1)
    missing = max(length - mask.shape[1], 0)
    return np.concatenate([mask[:, :length], mask[:, -1:].repeat(missing, axis=1)], axis=1)


def take_tiles(name: str, array: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """A contiguous copy of a key's or value's rows that belong to `tiles` (bool [images * tiles])."""
    axis = 3 if name.endswith(".key") else 2
    by_tile = array.reshape(*array.shape[:axis], len(tiles), -1, *array.shape[axis + 1 :])
    taken = by_tile.compress(tiles, axis)
    return taken.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])


# ---- On a GPU -------------------------------------------------------------------------------------------------------


class DeviceTensors:
    """A GPU's memory for the K/V that the language model reads, so that they go there once per prompt and not once per
    token: OpenVINO copies an input that lies in the host's memory at each inference.

    Encoded pictures stay with the host, where they are kept and cut (`restrict`). Not verified on hardware: there was
    none, and the tests use a stand-in for the context.

    Args:
        context: `ov.RemoteContext` of the device.
    """

    SHAPES = 2  # a prompt has at most two views of its pictures: its own tokens' and that of the tokens after it

    def __init__(self, context):
        self.context = context
        self._tensors: OrderedDict[tuple, dict] = OrderedDict()  # by shapes; those used last are at the end

    @classmethod
    def of(cls, device: str) -> "DeviceTensors | None":
        """Those of a "GPU" or "GPU.1"; None for other devices, and where the driver has no such memory."""
        if not device.startswith("GPU"):
            return None
        try:
            return cls(ov.Core().get_default_context(device))
        except RuntimeError:  # what OpenVINO raises for any reason
            return None

    def place(self, cross_attention: CrossAttention) -> CrossAttention:
        """The same with its K/V in the device's memory, allocated once per shape; the next prompt writes over it."""
        arrays = cross_attention.key_values
        shapes = tuple(array.shape for array in arrays.values())
        tensors = self._tensors.pop(shapes, None)
        if tensors is None:
            while len(self._tensors) >= self.SHAPES:
                self._tensors.popitem(last=False)
            tensors = {
                name: self.context.create_tensor(ov.Type.f32, ov.Shape(array.shape), {})
                for name, array in arrays.items()
            }
        self._tensors[shapes] = tensors
        for name, array in arrays.items():
            tensors[name].copy_from(ov.Tensor(np.ascontiguousarray(array), shared_memory=True))
        return replace(cross_attention, key_values=tensors)
