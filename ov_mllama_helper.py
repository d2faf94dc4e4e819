"""The two IRs as one model that behaves like transformers' `MllamaForConditionalGeneration`.

    processor's tensors -> vision IR -> cross-attention K/V -> language IR (stateful) -> logits -> generate

This file knows what `generate` asks of a model and what the IRs take. It knows nothing of text (tokens in, tokens out)
nor of how the IRs came to be: that is `ov_mllama_convert.py`, whose `convert_mllama` can be imported from here too.
"""

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from transformers import AutoConfig, GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.modeling_outputs import CausalLMOutputWithPast

from ov_mllama_convert import (
    CONVERTER_VERSION,
    LANGUAGE_MODEL_NAME,
    VISION_ENCODER_NAME,
    convert_mllama,
    ir_stamp,
)
from ov_mllama_generation import GenerationStats, InVocabularyDrafts, InVocabularyProcessors, OVCache
from ov_mllama_graphs import MASKED, MllamaShapes

__all__ = ["GenerationStats", "OVMLlamaForConditionalGeneration", "convert_mllama"]

PICTURE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")


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


def language_inputs(
    input_ids: np.ndarray,
    cross_attention: CrossAttention,
    attention_mask: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
    beam_idx: np.ndarray | None = None,
    past: int = 0,
    logits_to_keep: int = 1,
) -> dict[str, np.ndarray]:
    """Everything that one inference of the language IR takes, by port name.

    Args:
        input_ids: i64 [batch, query].
        attention_mask: i64 [batch, past + query]; default all ones.
        position_ids: i64 [batch, query]; default consecutive after `past`.
        beam_idx: i32 [batch], state row that each row continues; default its own.
        past: columns that the state holds already.
        logits_to_keep: how many of the last positions get logits.
    """
    batch, query = input_ids.shape
    if attention_mask is None:
        attention_mask = np.ones((batch, past + query), np.int64)
    if position_ids is None:
        position_ids = np.arange(past, past + query)[None].repeat(batch, 0)
    return {
        "input_ids": input_ids,
        "attention_mask": np.ascontiguousarray(attention_mask, np.int64),
        "position_ids": np.ascontiguousarray(np.broadcast_to(position_ids, (batch, query)), np.int64),
        "beam_idx": np.arange(batch, dtype=np.int32) if beam_idx is None else beam_idx,
        "logits_to_keep": np.array(logits_to_keep, np.int64),
        "cross_attention_bias": cross_attention.bias,
        "cross_attention_rows": cross_attention.rows,
        **cross_attention.key_values,
    }


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
        model = ov.Core().compile_model(path, device, ov_config or {})
        self._output_shapes = {name: tuple(model.output(name).shape) for name in shapes.cross_kv_names}
        self._request = model.create_infer_request()

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
        """
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
            key_values = {name: np.empty(shape, np.float32) for name, shape in self._output_shapes.items()}
            for name, array in key_values.items():  # written where it will be kept: the 11B's K/V are 0.4 GB
                self._request.set_tensor(name, ov.Tensor(array, shared_memory=True))
            self._request.infer(image_inputs(*picture), share_inputs=True)
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


def join(arrays: list[np.ndarray], axis: int) -> np.ndarray:
    """Concatenated, or the only one itself: K/V of a picture are too large to copy for nothing."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)


# ---- The model ------------------------------------------------------------------------------------------------------


class OVMLlamaForConditionalGeneration(GenerationMixin):
    """Llama 3.2 Vision on OpenVINO, used as transformers' class is: `model.generate(**processor(...))`.

    One model holds one conversation: the KV cache lives in its infer request. A prompt that begins as the one before
    did, about the same pictures, is computed from where they part; any other starts anew.

    Args:
        model_dir: folder written by `convert_mllama`.
        device: OpenVINO device of both IRs: "CPU", "GPU", "AUTO", ...
        ov_config: OpenVINO properties for both. By default a CPU with bf16 instructions computes in bf16 and keeps the
            KV cache in 8 bit. A compressed language model is computed in f32 there, because the plugin then multiplies
            in 8 bit (dynamic quantization): on a Xeon with AMX a token takes two thirds of the time, a prompt of 512
            tokens twice as long; for long prompts and short answers give {"INFERENCE_PRECISION_HINT": "bf16"}.
            {"EXECUTION_MODE_HINT": "ACCURACY"} computes and keeps all in f32, and then gives
            transformers' tokens (INFERENCE_PRECISION_HINT alone leaves the cache in 8 bit).
        language_model_name, image_encoder_name: file names in `model_dir`, to choose compressed variants.
        slice_lm_head: compute only the logits that are asked for (the last position's, when generating). False computes
            all of them and returns the same.
        warm_up: run the language model once, so that the first question does not wait while the CPU plugin repacks the
            weights (26 s for the 11B's INT4 ones).
        image_cache_bytes: room to keep encoded pictures in, see `OVImageEncoder`.

    Attributes:
        vision_encoder_infer_time: seconds for each different picture that the last prompt brought, next to nothing for
            those that were kept encoded; empty for text only.
        llm_infer_time: seconds for each step of the language model since then; the first is the prompt's.
        stats: `GenerationStats` of the last prompt and the tokens since.

    Raises:
        FileNotFoundError: the folder lacks an IR or the config.
        ValueError: an IR is incomplete or made by another converter version, or the two are of different checkpoints.
    """

    # Read by GenerationMixin (transformers 5.23, generation/utils.py)
    main_input_name = "input_ids"
    base_model_prefix = "model"
    _is_stateful = False  # True would rule out beam search; OVCache tells generate about the state instead
    device = torch.device("cpu")  # of inputs and logits, whichever device computes
    dtype = torch.float32

    def __init__(
        self,
        model_dir: str | Path,
        device: str = "CPU",
        ov_config: dict | None = None,
        language_model_name: str = LANGUAGE_MODEL_NAME,
        image_encoder_name: str = VISION_ENCODER_NAME,
        slice_lm_head: bool = True,
        warm_up: bool = True,
        image_cache_bytes: int = 1_000_000_000,
    ):
        model_dir = Path(model_dir)
        stamps = check_model_dir(model_dir, (image_encoder_name, language_model_name))
        self.config = AutoConfig.from_pretrained(model_dir)
        if (model_dir / "generation_config.json").is_file():
            self.generation_config = GenerationConfig.from_pretrained(model_dir)
        else:
            self.generation_config = GenerationConfig.from_model_config(self.config)
        self.shapes = MllamaShapes.from_config(self.config)
        self.slice_lm_head = slice_lm_head
        self.llm_infer_time: list[float] = []
        self.stats = GenerationStats()
        self._cache: OVCache | None = None  # whose tokens are in the language request's state

        started = time.perf_counter()
        self.image_encoder = OVImageEncoder(
            model_dir / image_encoder_name, self.shapes, device, ov_config, image_cache_bytes
        )
        language_config = ov_config or {}
        if device == "CPU" and "samples" in stamps[language_model_name]:
            language_config = {"INFERENCE_PRECISION_HINT": "f32", **language_config}
        language_model = ov.Core().compile_model(model_dir / language_model_name, device, language_config)
        self._language_request = language_model.create_infer_request()
        self._load_s, self._warm_up_s = time.perf_counter() - started, 0.0
        if warm_up:
            self._warm_up()

    def _warm_up(self) -> None:
        started = time.perf_counter()
        self._language_request.infer(language_inputs(np.zeros((1, 1), np.int64), no_pictures(self.shapes)))
        self._language_request.reset_state()
        self._warm_up_s = time.perf_counter() - started
        print(f"✅ Language model warmed up in {self._warm_up_s:.1f} s")

    @property
    def vision_encoder_infer_time(self) -> list[float]:
        return self.image_encoder.infer_time

    def __call__(self, *args, **kwargs) -> CausalLMOutputWithPast:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor | None = None,
        aspect_ratio_mask: torch.LongTensor | None = None,
        aspect_ratio_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        cross_attention_mask: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: OVCache | None = None,
        use_cache: bool | None = True,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits for new tokens: a whole prompt, or what follows the tokens in `past_key_values`.

        Args:
            input_ids: i64 [batch, query].
            pixel_values: f32 [batch, images, tiles, channels, height, width], with `aspect_ratio_ids` [batch, images],
                `aspect_ratio_mask` [batch, images, tiles] and `cross_attention_mask` [batch, query, images, tiles]: all
                from the processor, and only with a prompt. Later tokens see what the prompt's last one does.
            attention_mask: i64 [batch, past + query], all ones by default.
            position_ids: i64 [batch, query], consecutive by default.
            past_key_values: from the output of the step before; None or a new one starts anew.
            use_cache: False returns no `past_key_values`.
            logits_to_keep: how many of the last positions get logits; 0 for all.
            return_dict: accepted because generate passes it; the output always is one.
        Returns:
            `logits` f32 [batch, kept, vocab] and `past_key_values`.
        Raises:
            ValueError: pictures without their masks or after the prompt, or a cache that a later prompt has replaced.
        """
        cache = OVCache() if past_key_values is None else past_key_values
        if cache.size == 0:
            first_needed = input_ids.shape[1] - logits_to_keep if use_cache and logits_to_keep else 0
            plain = len(input_ids) == 1 and counts_up(position_ids) and (attention_mask is None or attention_mask.all())
            pictures = (pixel_values, aspect_ratio_ids, aspect_ratio_mask, cross_attention_mask)
            cross_attention = self._start(cache, input_ids.numpy(), pictures, reusable=first_needed if plain else 0)
            cache.tokens = cache.tokens if plain else None
            input_ids = input_ids[:, len(cache.columns) :]
            position_ids = None if position_ids is None else position_ids[:, len(cache.columns) :]
        elif cache is not self._cache:
            raise ValueError("This cache's tokens are gone: the model has begun another prompt since. Start anew.")
        elif pixel_values is not None:
            raise ValueError("Pictures can only come with the prompt: call without past_key_values, with all the text.")
        else:
            cross_attention = cache.cross_attention

        batch, query = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(batch, len(cache.columns) + query, dtype=torch.int64)
        inputs = language_inputs(
            input_ids.numpy(),
            cross_attention,
            cache.hide(attention_mask.numpy()),
            None if position_ids is None else position_ids.numpy(),
            cache.beam_idx,
            past=len(cache.columns),
            logits_to_keep=logits_to_keep if logits_to_keep and self.slice_lm_head else query,
        )
        self._cache = None  # an interrupted inference leaves a state that nothing may build on
        started = time.perf_counter()
        self._language_request.infer(inputs, share_inputs=True)
        self._count(cache, time.perf_counter() - started, drafts=max(logits_to_keep - 1, 0))

        # copied, because the next step's logits go into the same memory
        logits = torch.from_numpy(self._language_request.get_tensor("logits").data.copy())
        cache.append(inputs["input_ids"])
        cache.beam_idx = None
        self._cache = cache
        return CausalLMOutputWithPast(logits=logits[:, -logits_to_keep:], past_key_values=cache if use_cache else None)

    def _start(self, cache: OVCache, input_ids: np.ndarray, pictures: tuple, reusable: int) -> CrossAttention:
        """Begins a prompt: encodes its pictures, leaves the later tokens' view of them in the cache and returns the
        view of the prompt's tokens that are still to be computed.

        Those before are a beginning that this prompt shares with the one before, at most `reusable` tokens: its columns
        in the state go to the new cache. If they would be less than half of the state, it is cleared instead.
        """
        previous, self._cache = self._cache, None
        self.image_encoder.infer_time, self.image_encoder.kept, self.llm_infer_time = [], 0, []
        length = input_ids.shape[1]
        if pictures[0] is None:
            seen = np.zeros((len(input_ids), length, 0), bool)
        else:
            key_values, seen = self._encode(*pictures, length)
            cache.pictures = self.image_encoder.pictures[0]
        cache.seen = seen[0]

        reused = 0
        if previous and reusable > 0:
            reused = min(previous.common_prefix(input_ids[0], cache.seen, cache.pictures), reusable)
        if previous and 0 < previous.size <= 2 * reused:
            previous.keep(reused)
            cache.columns, cache.tokens, cache.size = previous.columns, previous.tokens, previous.size
        else:
            self._language_request.reset_state()
        self._begin_stats(cache, length)

        if pictures[0] is None:
            cache.cross_attention = no_pictures(self.shapes)
            return cache.cross_attention
        last, rest = seen[:, -1:], seen[:, len(cache.columns) :]
        cache.cross_attention = restrict(key_values, last, self.shapes)
        return cache.cross_attention if (rest == last).all() else restrict(key_values, rest, self.shapes)

    def _encode(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask, cross_attention_mask, length):
        """K/V of a prompt's pictures, and which of their tiles each of its `length` tokens may see."""
        if aspect_ratio_ids is None or aspect_ratio_mask is None or cross_attention_mask is None:
            raise ValueError(
                "pixel_values need aspect_ratio_ids, aspect_ratio_mask and cross_attention_mask beside them: pass all "
                "that the processor returns for text and images together, model.generate(**inputs)."
            )
        key_values = self.image_encoder.encode(
            pixel_values.numpy(), aspect_ratio_ids.numpy(), aspect_ratio_mask.numpy()
        )
        return key_values, tiles_seen(cross_attention_mask.numpy(), length)

    def _begin_stats(self, cache: OVCache, length: int) -> None:
        encoder = self.image_encoder
        self.stats = cache.stats = GenerationStats(
            load_s=self._load_s,
            warm_up_s=self._warm_up_s,
            images=len(encoder.infer_time),
            images_kept=encoder.kept,
            vision_s=sum(encoder.infer_time),
            prompt_tokens=length,
            reused_tokens=len(cache.columns),
        )

    def _count(self, cache: OVCache, seconds: float, drafts: int) -> None:
        """Notes a step of the language model."""
        self.llm_infer_time.append(seconds)
        if len(self.llm_infer_time) == 1:
            cache.stats.prefill_s = seconds
            cache.stats.prompt_tokens -= drafts  # they came behind it
        else:
            cache.stats.step_s.append(seconds)
        cache.stats.drafted_tokens += drafts

    def forget(self) -> None:
        """Drops the conversation and the pictures kept: the next prompt is computed from its first token."""
        self._cache = None
        self._language_request.reset_state()
        self.image_encoder.forget()

    # ---- What GenerationMixin calls ----

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict:
        return {}

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, use_cache=True, **kwargs):
        """After the prompt only text goes in: the cache holds the pictures."""
        if use_cache and not is_first_iteration:
            for name in PICTURE_INPUTS:
                kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args) -> None:
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = OVCache()

    def _get_candidate_generator(self, model_kwargs, assistant_model=None, **kwargs) -> CandidateGenerator:
        """Drafts come from text alone: an assistant model knows no pictures."""
        text_kwargs = {name: value for name, value in model_kwargs.items() if name not in PICTURE_INPUTS}
        drafts = super()._get_candidate_generator(model_kwargs=text_kwargs, assistant_model=assistant_model, **kwargs)
        return InVocabularyDrafts(drafts, self.shapes.vocab_size, back_off=assistant_model is None)

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        return InVocabularyProcessors(super()._get_logits_processor(*args, **kwargs))


def counts_up(position_ids: torch.LongTensor | None) -> bool:
    """Whether they are what they are by default: 0, 1, 2, ..."""
    return position_ids is None or torch.equal(position_ids[0], torch.arange(position_ids.shape[1]))


def check_model_dir(model_dir: Path, names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Refuses a folder whose IRs are missing, incomplete, foreign, outdated or of two different checkpoints.

    Returns:
        the `ir_stamp` of each.

    Raises:
        FileNotFoundError, ValueError: with the sentence that names the fix.
    """
    for name in ("config.json", *names):
        if not (model_dir / name).is_file():
            raise FileNotFoundError(
                f"{model_dir / name} is missing: run convert_mllama(model_id, '{model_dir}') first."
            )
    stamps = {name: ir_stamp(model_dir / name) for name in names}
    for name, stamp in stamps.items():
        if not stamp:
            raise ValueError(
                f"{model_dir / name} is incomplete or was not written by convert_mllama: delete it and convert again."
            )
        if stamp["converter_version"] != CONVERTER_VERSION:
            raise ValueError(
                f"{model_dir / name} was made by converter version {stamp['converter_version']}, this is version "
                f"{CONVERTER_VERSION}: run convert_mllama again, it replaces what is outdated."
            )
    if len({stamp["checkpoint"] for stamp in stamps.values()}) > 1:
        raise ValueError(
            f"{' and '.join(names)} in {model_dir} come from different checkpoints: run convert_mllama again with the "
            "one you want, into a folder of its own."
        )
    return stamps
