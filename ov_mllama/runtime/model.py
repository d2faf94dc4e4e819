"""Llama 3.2 Vision with the interface of transformers' `MllamaForConditionalGeneration`.

processor's tensors -> vision.py -> cross-attention K/V -> language.py -> logits -> generate
"""

import contextlib
import logging
import threading
import time
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationMixin, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from .attention_maps import AnswerQueries
from .checks import (
    as_array,
    check_arguments,
    check_cache,
    check_continuation,
    check_gives_queries,
    check_images,
    check_ports,
    check_tokens,
    image_arrays,
    token_arrays,
    warn_of_double_bos,
)
from .compat import ModuleCompatMixin
from .cross_attention import tiles_seen
from .errors import InputError
from .generation import generation_config
from .golden import check_golden_answer
from .image_store import ImageStore
from .inference import Progress, acquire, stopping_criterion
from .ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, check_model_dir, display_name
from .kv_cache import OVCache, Prompt
from .language import OVLanguageModel
from .prefetch import PrefetchMixin
from .reference import Reference
from .sessions import SessionPool, evict_for
from .shapes import MllamaShapes
from .speculative import InVocabularyDrafts, InVocabularyProcessor, ModelDrafts, OVDraftModel, in_vocabulary
from .stats import GenerationStats
from .vision import ImageInputs, OVImageEncoder, image_keys

logger = logging.getLogger(__name__)


class OVMLlamaForConditionalGeneration(ModuleCompatMixin, PrefetchMixin, GenerationMixin):
    """Llama 3.2 Vision on OpenVINO, used as transformers' class: `model.generate(**processor(...))`.

    `generate` reuses the longest prefix that a prompt shares with a session, for one thread at a time. Calls of the
    model itself without `past_key_values` share `session`.

    Args:
        model_dir: folder written by `convert_mllama`.
        device: OpenVINO device of both IRs: "CPU", "GPU", "AUTO", ...
        ov_config: OpenVINO properties for both, which override `devices.choose` (see `chosen` of `image_encoder` and
            `language_model`). On a CPU the KV cache is in 8 bit; {"EXECUTION_MODE_HINT": "ACCURACY"} makes everything
            f32, with transformers' tokens (INFERENCE_PRECISION_HINT alone leaves the cache in 8 bit).
        language_model_name, image_encoder_name: file names in `model_dir`, such as compressed IRs; default the 16-bit
            ones.
        slice_lm_head: compute only the logits that are returned; False computes all, for the same results.
        warm_up: run the language model once, as the CPU plugin repacks the weights then, 26 s for the 11B's INT4 ones.
        check_golden: verify the device by the checkpoint's golden question, if any, see `check_golden_answer`.
        image_cache_bytes: budget for encoded images, see `OVImageEncoder`.
        kv_cache_bytes: budget for sessions, see `SessionPool`. The 11B takes 66 KB per token in 8 bit, 0.26 MB in f32,
            and 0.1 GB per tile of an image.
        use_remote_tensors: on a GPU, store image K/V in its memory (`DeviceTensors`; not verified on hardware).
        dynamic_shape: ignored, for compatibility: shapes are always dynamic.
        image_store: for encoded images that outlive the process, which are rounded to 16 bit; default: none.

    Attributes:
        session: of calls without `past_key_values`; `generate` uses others.
        turn: lock that is held while a thread computes.
        reference: of its IRs, see `reference.Reference`.
        about: name, weight formats and device, for display.
        disk_bytes: size of both IRs' weights.
        stats: `GenerationStats` of the last prompt and the tokens since.

    Raises:
        NotFoundError, InputError: as `check_model_dir`.
    """

    # Read by GenerationMixin (transformers 5.23, generation/utils.py)
    main_input_name = "input_ids"
    base_model_prefix = "model"
    _is_stateful = False  # True excludes beam search; OVCache represents the state instead
    device = torch.device("cpu")  # of inputs and logits
    dtype = torch.float32

    def __init__(
        self,
        model_dir: str | Path,
        device: str = "CPU",
        ov_config: dict | None = None,
        language_model_name: str | None = None,
        image_encoder_name: str | None = None,
        slice_lm_head: bool = True,
        warm_up: bool = True,
        check_golden: bool = True,
        image_cache_bytes: int = 1_000_000_000,
        kv_cache_bytes: int = 500_000_000,
        use_remote_tensors: bool = False,
        dynamic_shape: bool = True,
        image_store: ImageStore | None = None,
    ):
        model_dir = Path(model_dir)
        vision, language = image_encoder_name or VISION_ENCODER_NAME, language_model_name or LANGUAGE_MODEL_NAME
        stamps = check_model_dir(model_dir, (vision, language))
        self.config = AutoConfig.from_pretrained(model_dir)
        self.generation_config = generation_config(model_dir, self.config)
        self.shapes, self.reference = MllamaShapes.from_config(self.config), Reference.of(stamps[vision])
        self.slice_lm_head = slice_lm_head
        self.stats = GenerationStats()
        self.turn = threading.RLock()
        self._watched: tuple = None, Progress()  # stop and progress of the current call of generate
        self._queries: AnswerQueries | None = None  # of the current call of generate
        self._calls = 0  # depth in the current thread: generate calls the model
        started = time.perf_counter()
        self.image_encoder = OVImageEncoder(
            model_dir / vision, self.shapes, device, ov_config, image_cache_bytes, stamps[vision]
        )
        self.language_model = OVLanguageModel(
            model_dir / language, self.shapes, device, ov_config, stamps[language], use_remote_tensors
        )
        check_ports(self.shapes, self.image_encoder, self.language_model.compiled, model_dir)
        self.session, self.sessions = self.language_model.session(), SessionPool(self.language_model, kv_cache_bytes)
        self.about = display_name(model_dir, stamps[language], stamps[vision], device)
        self.disk_bytes = sum((model_dir / name).with_suffix(".bin").stat().st_size for name in (vision, language))
        self._load_s, self._warm_up_s = time.perf_counter() - started, 0.0
        if warm_up:
            self._warm_up_s = self.language_model.warm_up()
            logger.info("Language model warmed up in %.1f s", self._warm_up_s)
        if check_golden and (model_dir / "golden.json").is_file():
            check_golden_answer(self, model_dir, device)
            self.forget()
            self.stats = GenerationStats()
        if image_store:  # after the golden answer, which verifies the encoder
            self.image_encoder.use_store(image_store)

    def forget(self) -> None:
        """Drop all sessions and cached images."""
        with self.turn:
            self.session.reset()
            self.sessions.forget()
            self.image_encoder.forget()

    def generate(self, *args, stop=None, progress=None, queries: AnswerQueries | None = None, **kwargs):
        """Run `GenerationMixin.generate`, one thread at a time.

        Args:
            stop: `threading.Event`; once set, the answer ends after the current token, and before the first one
                `Cancelled` is raised.
            progress: `Progress`, updated with the current stage.
            queries: filled for `image_attention`; InputError if the IR gives none, or there are several rows.
        """
        if queries is not None:
            check_gives_queries(self.language_model)
        if stop:
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), stopping_criterion(stop)]
        with self._in_turn(stop):
            self._watched, self._queries = (stop, progress or Progress()), queries
            try:
                output = super().generate(*args, **kwargs)
            finally:
                self._watched, self._queries = (None, Progress()), None
        if queries is not None:
            queries.tokens = getattr(output, "sequences", output)[0, queries.prompt_tokens :].tolist()
        return output

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        aspect_ratio_mask: torch.LongTensor | None = None,
        aspect_ratio_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        cross_attention_mask: torch.LongTensor | None = None,
        cross_attention_states: None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: OVCache | None = None,
        inputs_embeds: None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute logits of a prompt, or of tokens that follow those in `past_key_values`.

        Args, in transformers' order:
            input_ids: i64 [batch, query].
            pixel_values: f32 [batch, images, tiles, channels, height, width], with `aspect_ratio_ids` [batch, images],
                `aspect_ratio_mask` [batch, images, tiles] and `cross_attention_mask` [batch, query, images, tiles]: all
                from the processor, and only with a prompt. Later tokens see what the prompt's last one does.
            attention_mask, position_ids: i64 [batch, past + query], default ones; [batch, query], default consecutive.
            past_key_values: from the output of the step before; None or a new one for a prompt.
            labels: i64 [batch, query], for the `loss`; -100 is ignored.
            use_cache: False returns no `past_key_values`; default the config's.
            logits_to_keep: number of last positions that get logits, 0 for all; or a tensor of positions.
            kwargs: `return_dict=False` for a tuple; arguments for internals are rejected, see `checks.UNSUPPORTED`.
        Returns:
            `logits` f32 [batch, positions, vocab], `past_key_values`, and `loss` if there are `labels`.
        Raises:
            InputError, TypeError: for invalid inputs, see `checks.py`.
            OutOfMemoryError, NumericalError: if the prompt does not fit; if logits are not finite.
        """
        check_arguments({"cross_attention_states": cross_attention_states, "inputs_embeds": inputs_embeds, **kwargs})
        check_cache(past_key_values, self.language_model)
        ids, mask, positions = token_arrays(input_ids, attention_mask, position_ids)
        seen = as_array("cross_attention_mask", cross_attention_mask)
        images = image_arrays(pixel_values, aspect_ratio_ids, aspect_ratio_mask, cross_attention_mask)
        query, sliced = ids.shape[1], isinstance(logits_to_keep, int) and logits_to_keep > 0
        last = min(logits_to_keep, query) if sliced and self.slice_lm_head else query
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        with self._in_turn():
            cache = OVCache(self.session) if past_key_values is None else past_key_values
            session = check_continuation(cache, ids, images, seen) if cache.positions else None
            check_tokens(ids, mask, positions, len(cache.positions), self.shapes)
            cache.queries = self._queries
            drafts = logits_to_keep - 1 if cache.drafting and sliced else 0
            if session:
                self.sessions.use(session)
                logits = session.decode(ids, mask, positions, last)
            else:
                if not use_cache:
                    self.session.reset()
                warn_of_double_bos(ids, self.config.text_config.bos_token_id)
                prompt = prompt_of(self, ids, images, mask, positions, last)
                session, encoded = self.begin(cache, prompt, images, drafts=drafts)
                logits = session.prefill(prompt, encoded, cache, *self._watched)
            cache.stats.drafted_tokens += drafts
        logits = slice_logits_to_keep(torch.from_numpy(logits), logits_to_keep)
        loss = None if labels is None else ForCausalLMLoss(logits, labels, self.shapes.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def begin(self, cache: OVCache, prompt: Prompt, images: ImageInputs | None, encoded=None, drafts: int = 0):
        """Return the session for a prompt (the cache's, else the one with its longest prefix) once its memory is free,
        and its encoded images unless the session holds them. For a thread that holds `turn`.

        Args:
            images, encoded: of the prompt, as `Encoded` if encoded already.
            drafts: number of the prompt's last tokens that are drafts.
        """
        rows = self.image_encoder.rows_read(images, prompt.seen, self.language_model.row_mask) if images else 0
        session = cache.session or self.sessions.acquire(prompt, rows)
        images = None if session.holds_images(prompt) else images
        new = None if encoded else images
        evict_for(prompt, session, self.sessions, self.image_encoder, self.config, rows, new)
        encoded = self.image_encoder.encode(new, prompt.image_keys, *self._watched) if new else images and encoded
        held = len({key for row in prompt.image_keys for key in row})  # in the session, if none is encoded
        self.stats = cache.stats = GenerationStats(
            load_s=self._load_s,
            warm_up_s=self._warm_up_s,
            image_s=encoded.image_s if encoded else [0.0] * held,
            images_cached=encoded.cached if encoded else held,
            prompt_tokens=prompt.input_ids.shape[1] - drafts,
        )
        return session, encoded

    @contextlib.contextmanager
    def _in_turn(self, stop=None):
        """Hold `turn`; the outermost call of a thread evicts sessions beyond the budget when it ends."""
        with acquire(self.turn, stop):
            self._calls += 1
            try:
                yield
            finally:
                self._calls -= 1
                if not self._calls:
                    self.sessions.release()

    # ---- Called by GenerationMixin (tests/runtime/test_interface.py checks that it still does) ----

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, use_cache=True, **kwargs):
        """Drop the images after the prompt; extend the mask to tokens after the processor's."""
        if use_cache and not is_first_iteration:
            for name in ImageInputs._fields:
                kwargs.pop(name, None)
        seen = kwargs.get("cross_attention_mask")
        if seen is not None and seen.shape[1] < input_ids.shape[1]:
            more = seen[:, -1:].expand(-1, input_ids.shape[1] - seen.shape[1], -1, -1)
            kwargs["cross_attention_mask"] = torch.cat([seen, more], dim=1)
        return super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args) -> None:
        check_cache(model_kwargs.get("past_key_values"), self.language_model)
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise InputError(
                f"cache_implementation='{generation_config.cache_implementation}' is not supported, as the KV cache is "
                "inside OpenVINO. Leave it out."
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = OVCache()
        if generation_config.is_assistant and model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"].activate_past_recording()

    def _get_candidate_generator(self, model_kwargs, assistant_model=None, **kwargs) -> CandidateGenerator:
        """Return a draft source, which gets no images."""
        if isinstance(assistant_model, OVDraftModel):
            return ModelDrafts(assistant_model, self.shapes.vocab_size, kwargs["generation_config"], self)
        text_kwargs = {name: value for name, value in model_kwargs.items() if name not in ImageInputs._fields}
        drafts = super()._get_candidate_generator(model_kwargs=text_kwargs, assistant_model=assistant_model, **kwargs)
        return InVocabularyDrafts(drafts, self.shapes.vocab_size, back_off=assistant_model is None)

    def _get_logits_processor(self, *args, encoder_input_ids=None, **kwargs) -> LogitsProcessorList:
        """Hide `<|image|>`, which has no logit, from processors that index logits by the prompt's ids."""
        if encoder_input_ids is not None and encoder_input_ids.ndim == 2:
            encoder_input_ids = in_vocabulary(encoder_input_ids, self.shapes.vocab_size)
        processors = super()._get_logits_processor(*args, encoder_input_ids=encoder_input_ids, **kwargs)
        for index, processor in enumerate(processors):
            if isinstance(processor, RepetitionPenaltyLogitsProcessor):
                processors[index] = InVocabularyProcessor(processor)
        return processors


def prompt_of(
    model: OVMLlamaForConditionalGeneration, ids, images: ImageInputs | None, mask=None, positions=None, last: int = 1
) -> Prompt:
    """Return the prompt of arrays (`checks.token_arrays`, `checks.image_arrays`); its `last` tokens get logits."""
    prompt = Prompt(ids, mask, positions, logits_to_keep=last)
    if images:
        check_images(images, ids.shape, model.image_encoder.pixels_shape, model.config)
        prompt.seen, prompt.image_keys = tiles_seen(images.cross_attention_mask, ids.shape[1]), image_keys(images)
    return prompt
