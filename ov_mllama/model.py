"""The two IRs as one model that behaves like transformers' `MllamaForConditionalGeneration`.

    processor's tensors -> vision IR -> cross-attention K/V -> language IR (stateful) -> logits -> generate

This file knows what `generate` asks of a model and what the IRs take. It knows nothing of text (tokens in, tokens out)
nor of how the IRs came to be: that is `ov_mllama_convert.py`, whose `convert_mllama` can be imported from here too.
"""

import json
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import openvino as ov
import psutil
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.modeling_outputs import CausalLMOutputWithPast

from ov_mllama.convert import convert_mllama
from ov_mllama.files import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, check_model_dir
from ov_mllama.generation import GenerationStats, InVocabularyDrafts, InVocabularyProcessors, OVCache
from ov_mllama.graphs import MllamaShapes
from ov_mllama.vision import (
    CrossAttention,
    DeviceTensors,
    OVImageEncoder,
    check_finite,
    no_pictures,
    restrict,
    tiles_seen,
)

__all__ = ["GenerationStats", "OVMLlamaForConditionalGeneration", "convert_mllama"]

PICTURE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")


# ---- The language model's inputs ------------------------------------------------------------------------------------


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


# ---- The model ------------------------------------------------------------------------------------------------------


class OVMLlamaForConditionalGeneration(GenerationMixin):
    """Llama 3.2 Vision on OpenVINO, used as transformers' class is: `model.generate(**processor(...))`.

    One model holds one conversation: the KV cache lives in its infer request. A prompt that begins as the one before
    did, about the same pictures, is computed from where they part; any other starts anew. Threads take turns: a call of
    `generate` waits for the one before to end.

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
            weights (26 s for the 11B's INT4 ones); then compare the golden answer, if the checkpoint brought one.
        image_cache_bytes: room to keep encoded pictures in, see `OVImageEncoder`.
        use_remote_tensors: on a GPU, give the pictures' K/V to the language model in the device's own memory (see
            `DeviceTensors`; not verified on hardware). Elsewhere it changes nothing.

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
        use_remote_tensors: bool = True,
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
        self._device = device
        self.llm_infer_time: list[float] = []
        self.stats = GenerationStats()
        self._turn = threading.RLock()  # a thread's, for as long as its generate takes
        self._cache: OVCache | None = None  # whose tokens are in the language request's state

        started = time.perf_counter()
        self.image_encoder = OVImageEncoder(
            model_dir / image_encoder_name, self.shapes, device, ov_config, image_cache_bytes
        )
        language_config = ov_config or {}
        if device == "CPU" and "samples" in stamps[language_model_name]:
            language_config = {"INFERENCE_PRECISION_HINT": "f32", **language_config}
        self._language_model = ov.Core().compile_model(model_dir / language_model_name, device, language_config)
        check_ports(self.shapes, self.image_encoder.output_shapes, self._language_model, model_dir)
        self._language_request = self._language_model.create_infer_request()
        self._device_tensors = DeviceTensors.of(device) if use_remote_tensors else None
        self._load_s, self._warm_up_s = time.perf_counter() - started, 0.0
        if warm_up:
            self._warm_up()
            if (model_dir / "golden.json").is_file():
                self._check_golden_answer(model_dir)

    def _warm_up(self) -> None:
        started = time.perf_counter()
        self._language_request.infer(language_inputs(np.zeros((1, 1), np.int64), no_pictures(self.shapes)))
        self._language_request.reset_state()
        self._warm_up_s = time.perf_counter() - started
        print(f"✅ Language model warmed up in {self._warm_up_s:.1f} s")

    def _check_golden_answer(self, model_dir: Path) -> None:
        """Warns where this device answers otherwise than transformers did, as some drivers make models do
        (openvino_notebooks#2900). The demo checkpoint brings such an answer: load it first on a device you do not know.
        """
        golden = json.loads((model_dir / "golden.json").read_text(encoding="utf-8"))
        processor = AutoProcessor.from_pretrained(model_dir)
        content = [{"type": "image"}, {"type": "text", "text": golden["question"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        with Image.open(model_dir / golden["picture"]) as picture:
            inputs = processor(text=prompt, images=[picture], add_special_tokens=False, return_tensors="pt")
        output = self.generate(**inputs, do_sample=False, max_new_tokens=64)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if answer != golden["answer"]:
            warnings.warn(
                f"On {self._device} this model answers '{answer}' where transformers answers '{golden['answer']}'. Use "
                "device='CPU', or ov_config={'INFERENCE_PRECISION_HINT': 'f32'}, or another driver.",
                stacklevel=3,
            )
        self.forget()
        self.stats, self.llm_infer_time, self.image_encoder.infer_time = GenerationStats(), [], []

    @property
    def vision_encoder_infer_time(self) -> list[float]:
        return self.image_encoder.infer_time

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "This model lives in OpenVINO's memory and can be neither copied nor pickled: load it once more with "
            "OVMLlamaForConditionalGeneration(model_dir)."
        )

    def __call__(self, *args, **kwargs) -> CausalLMOutputWithPast:
        return self.forward(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """`GenerationMixin.generate`, one thread at a time."""
        with self._turn:
            return super().generate(*args, **kwargs)

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
            MemoryError: a longer prompt than this machine's memory holds.
            ValueError: no tokens, more than the model's context holds, pictures without their masks or after the
                prompt, or a cache that a later prompt has replaced.
            FloatingPointError: the logits are not finite; says which precision to set.
        """
        with self._turn:
            return self._forward(
                input_ids,
                (pixel_values, aspect_ratio_ids, aspect_ratio_mask, cross_attention_mask),
                attention_mask,
                position_ids,
                past_key_values,
                use_cache,
                logits_to_keep,
            )

    def _forward(
        self, input_ids, pictures, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep
    ) -> CausalLMOutputWithPast:
        cache = OVCache() if past_key_values is None else past_key_values
        if cache.size == 0:
            first_needed = input_ids.shape[1] - logits_to_keep if use_cache and logits_to_keep else 0
            plain = len(input_ids) == 1 and counts_up(position_ids) and (attention_mask is None or attention_mask.all())
            cross_attention = self._start(cache, input_ids.numpy(), pictures, reusable=first_needed if plain else 0)
            cache.tokens = cache.tokens if plain else None
            input_ids = input_ids[:, len(cache.columns) :]
            position_ids = None if position_ids is None else position_ids[:, len(cache.columns) :]
        elif cache is not self._cache:
            raise ValueError("This cache's tokens are gone: the model has begun another prompt since. Start anew.")
        elif pictures[0] is not None:
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
        check_finite(logits.numpy(), "logits")
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
        self._check_room(*input_ids.shape, tiles=0 if pictures[2] is None else int(pictures[2].sum()))
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

        place = self._device_tensors.place if self._device_tensors else lambda cross_attention: cross_attention
        if pictures[0] is None:
            cache.cross_attention = place(no_pictures(self.shapes))
            return cache.cross_attention
        last, rest = seen[:, -1:], seen[:, len(cache.columns) :]
        cache.cross_attention = place(restrict(key_values, last, self.shapes))
        return cache.cross_attention if (rest == last).all() else place(restrict(key_values, rest, self.shapes))

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

    def _check_room(self, batch: int, tokens: int, tiles: int) -> None:
        """Refuses a prompt that the context or this machine's memory cannot hold, before anything is computed."""
        text = self.config.text_config
        advice = "shorten it, or ask about its parts one by one."
        if not 0 < tokens <= text.max_position_embeddings:
            raise ValueError(
                f"The prompt has {tokens} tokens, and this model takes 1 to {text.max_position_embeddings}: "
                + (advice if tokens else "write a question.")
            )
        new = max(tokens - (len(self._cache.columns) if self._cache else 0), 1)
        # seen with the 11B: MLP and attention of one layer, the causal mask, scores against image rows
        rows = tiles * self.shapes.patches_per_tile
        memory = batch * new * (28 * text.intermediate_size + 48 * tokens) + new * 16 * self.shapes.num_heads * rows
        available = psutil.virtual_memory().available
        if available < memory:
            raise MemoryError(
                f"A prompt of {tokens} tokens takes {memory / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are "
                f"free, {(memory - available) / 1e9:.1f} GB too little: {advice}"
            )

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


def check_ports(shapes: MllamaShapes, key_values: dict, language_model: ov.CompiledModel, model_dir: Path) -> None:
    """Refuses IRs that are not what the folder's config describes.

    Args:
        key_values: shapes of the vision encoder's outputs by port name.

    Raises:
        ValueError: with the sentence that names the fix.
    """
    rows, heads, dim = shapes.max_num_tiles * shapes.patches_per_tile, shapes.num_kv_heads, shapes.head_dim
    expected = {
        name: (1, heads, dim, rows) if name.endswith(".key") else (1, heads, rows, dim)
        for name in shapes.cross_kv_names
    }
    read = {name for port in language_model.inputs for name in port.get_names()}
    vocabulary = language_model.output("logits").partial_shape[2].get_length()
    if key_values != expected or not expected.keys() <= read or vocabulary != shapes.vocab_size:
        raise ValueError(
            f"{model_dir / 'config.json'} describes another model than the IRs beside it: run convert_mllama again, "
            "into a folder of its own."
        )


def counts_up(position_ids: torch.LongTensor | None) -> bool:
    """Whether they are what they are by default: 0, 1, 2, ..."""
    return position_ids is None or torch.equal(position_ids[0], torch.arange(position_ids.shape[1]))
