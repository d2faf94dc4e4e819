"""The two IRs as one model that behaves like transformers' `MllamaForConditionalGeneration`.

    processor's tensors -> vision.py -> cross-attention K/V -> language.py -> logits -> generate

This file knows what transformers asks of a model, and nothing else: the images are `vision.py`'s, the KV cache is
`language.py`'s, what may be asked is `checks.py`'s, and how the IRs came to be is `convert.py`'s.
"""

import contextlib
import logging
import threading
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, GenerationMixin, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from .checks import (
    as_array,
    check_arguments,
    check_cache,
    check_continuation,
    check_images,
    check_ports,
    check_tokens,
    image_arrays,
    images_alone,
    token_arrays,
    warn_of_double_bos,
)
from .compat import ModuleCompatMixin
from .cross_attention import tiles_seen
from .golden import check_golden_answer
from .inference import Progress, StopOnEvent, acquire
from .ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, check_model_dir, generation_config, named
from .kv_cache import OVCache, Prompt
from .language import OVLanguageModel
from .reference import Reference
from .sessions import SessionPool, evict_for
from .shapes import MllamaShapes
from .speculative import (
    InVocabularyDrafts,
    InVocabularyProcessor,
    ModelDrafts,
    OVDraftModel,
    in_vocabulary,
)
from .stats import GenerationStats
from .vision import ImageInputs, OVImageEncoder, image_keys

logger = logging.getLogger(__name__)


class OVMLlamaForConditionalGeneration(ModuleCompatMixin, GenerationMixin):
    """Llama 3.2 Vision on OpenVINO, used as transformers' class is: `model.generate(**processor(...))`.

    A prompt that begins as an earlier conversation did, about the same images, is computed from where they part; any
    other begins a new one. Calls of the model itself, without `past_key_values`, all use `session`. Threads take turns:
    a call of `generate` waits for the one before to end.

    Args:
        model_dir: folder written by `convert_mllama`.
        device: OpenVINO device of both IRs: "CPU", "GPU", "AUTO", ...
        ov_config: OpenVINO properties for both, before what `devices.choose` takes for this CPU and each IR
            (`chosen` of `image_encoder` and of `language_model` tells it, and why). A CPU keeps the KV cache in 8 bit.
            {"EXECUTION_MODE_HINT": "ACCURACY"} computes and keeps all in f32, and then gives
            transformers' tokens (INFERENCE_PRECISION_HINT alone leaves the cache in 8 bit).
        language_model_name, image_encoder_name: file names in `model_dir`, to choose compressed variants; default the
            16-bit ones.
        slice_lm_head: compute only the logits that are asked for (the last position's, when generating). False computes
            all of them and returns the same.
        warm_up: run the language model once: the CPU plugin repacks the weights then, 26 s for the 11B's INT4 ones.
        check_golden: ask the checkpoint's golden question, if it brought one, and warn where this device answers
            otherwise than transformers did.
        image_cache_bytes: memory for encoded images, see `OVImageEncoder`.
        kv_cache_bytes: memory for sessions, see `SessionPool`. A token of the 11B takes 66 KB in 8 bit, 0.26 MB in
            f32; what is read of an image, 0.1 GB for each of its tiles.
        use_remote_tensors: on a GPU, keep the images' K/V in its memory (`DeviceTensors`; not verified on hardware).
        dynamic_shape: there for the published notebook's sake: shapes always follow the inputs.

    Attributes:
        session: of the calls without `past_key_values` (`generate` takes one of its own).
        turn: the lock that a thread holds while it computes; whoever takes it may decide then whether to begin at all.
        reference: that its IRs follow, see `reference.Reference`.
        about: its name, the formats of its weights and its device, for people.
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
        language_model_name: str | None = None,
        image_encoder_name: str | None = None,
        slice_lm_head: bool = True,
        warm_up: bool = True,
        check_golden: bool = True,
        image_cache_bytes: int = 1_000_000_000,
        kv_cache_bytes: int = 500_000_000,
        use_remote_tensors: bool = False,
        dynamic_shape: bool = True,
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
        self._watched: tuple = None, Progress()  # stop and progress of the call of generate under way
        self._calls = 0  # under way in the thread whose turn it is: generate calls the model

        started = time.perf_counter()
        self.image_encoder = OVImageEncoder(
            model_dir / vision, self.shapes, device, ov_config, image_cache_bytes, stamps[vision]
        )
        self.language_model = OVLanguageModel(
            model_dir / language, self.shapes, device, ov_config, stamps[language], use_remote_tensors
        )
        check_ports(self.shapes, self.image_encoder, self.language_model.compiled, model_dir)
        self.session, self.sessions = self.language_model.session(), SessionPool(self.language_model, kv_cache_bytes)
        self.about = named(model_dir, stamps[language], stamps[vision], device)
        self._load_s, self._warm_up_s = time.perf_counter() - started, 0.0
        if warm_up:
            self._warm_up_s = self.language_model.warm_up()
            logger.info("Language model warmed up in %.1f s", self._warm_up_s)
        if check_golden and (model_dir / "golden.json").is_file():
            check_golden_answer(self, model_dir, device)
            self.forget()
            self.stats = GenerationStats()

    @property
    def vision_encoder_infer_time(self) -> list[float]:
        """Seconds for each different image of the last prompt, about 0 for cached ones; empty for text only."""
        return self.stats.image_s

    @property
    def llm_infer_time(self) -> list[float]:
        """Seconds for each step of the language model since the last prompt; the first is the prompt's."""
        return [self.stats.prefill_s, *self.stats.step_s] if self.stats.prefill_s else []

    def forget(self) -> None:
        """Drops all conversations and images kept: the next prompt is computed from its first token."""
        with self.turn:
            self.session.reset()
            self.sessions.forget()
            self.image_encoder.forget()

    def generate(self, *args, stop: threading.Event | None = None, progress: Progress | None = None, **kwargs):
        """`GenerationMixin.generate`, one thread at a time. Once `stop` is set, the answer ends with the token under
        way; before the first one `Cancelled` is raised (`inference.py`). `progress` is told what is done."""
        if stop:
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), StopOnEvent(stop)]
        with self._in_turn(stop):
            self._watched = stop, progress or Progress()
            try:
                return super().generate(*args, **kwargs)
            finally:
                self._watched = None, Progress()

    def encode_images(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask, stop=None) -> list[float]:
        """Encodes images ahead of the question about them and keeps them, as far as `image_cache_bytes` goes. A prompt
        that comes meanwhile waits for the image under way, its own or not, and goes before the next one; it does not
        encode its own again. This takes no turn: other prompts are answered meanwhile.

        Args:
            pixel_values, aspect_ratio_ids, aspect_ratio_mask: from the processor, as for `forward`.
            stop: `threading.Event`; once it is set, the image under way is given up between two layers, unless a prompt
                waits for it.
        Returns:
            seconds for each different image, next to nothing for those that were kept.
        Raises:
            Cancelled: `stop` was set (`ov_mllama.runtime.inference`); images that were done are kept.
            ValueError, TypeError: as for `forward`.
        """
        tensors = (pixel_values, aspect_ratio_ids, aspect_ratio_mask)
        images = images_alone(*tensors, self.image_encoder.pixels_shape, self.config)
        return self.image_encoder.prefetch(images, stop) if images else []

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
        """Logits for new tokens: a whole prompt, or what follows the tokens in `past_key_values`.

        Args, in transformers' order:
            input_ids: i64 [batch, query].
            pixel_values: f32 [batch, images, tiles, channels, height, width], with `aspect_ratio_ids` [batch, images],
                `aspect_ratio_mask` [batch, images, tiles] and `cross_attention_mask` [batch, query, images, tiles]: all
                from the processor, and only with a prompt. Later tokens see what the prompt's last one does.
            attention_mask, position_ids: i64 [batch, past + query], default ones; [batch, query], default consecutive.
            past_key_values: from the output of the step before; None or a new one starts anew.
            labels: i64 [batch, query], for the `loss` of predicting each from what is before it; -100 counts nowhere.
            use_cache: False returns no `past_key_values`; default as the config says.
            logits_to_keep: how many of the last positions get logits, 0 for all; or a tensor of the positions.
            kwargs: `return_dict=False` for a tuple. `cross_attention_states`, `inputs_embeds`, `output_attentions` and
                `output_hidden_states` are there for transformers' sake and refused if they ask for anything.
        Returns:
            `logits` f32 [batch, kept, vocab], `past_key_values`, and `loss` if there are `labels`.
        Raises:
            ValueError, TypeError: inputs that cannot be answered, see `checks.py`; each sentence names the fix.
            MemoryError, FloatingPointError: too long a prompt for this machine; logits that are not finite.
        """
        check_arguments({"cross_attention_states": cross_attention_states, "inputs_embeds": inputs_embeds, **kwargs})
        check_cache(past_key_values, self.language_model)
        ids, mask, positions = token_arrays(input_ids, attention_mask, position_ids)
        seen = as_array("cross_attention_mask", cross_attention_mask)
        images = image_arrays(pixel_values, aspect_ratio_ids, aspect_ratio_mask, cross_attention_mask)
        query, wanted = ids.shape[1], logits_to_keep
        last = min(wanted, query) if isinstance(wanted, int) and wanted > 0 and self.slice_lm_head else query
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        with self._in_turn():
            cache = OVCache(self.session) if past_key_values is None else past_key_values
            session = check_continuation(cache, ids, images, seen) if cache.positions else None
            check_tokens(ids, mask, positions, len(cache.positions), self.shapes)
            drafts = wanted - 1 if cache.drafting and isinstance(wanted, int) and wanted > 0 else 0
            if session:
                self.sessions.use(session)
                logits = session.decode(ids, mask, positions, last)
            else:
                if not use_cache:
                    self.session.reset()
                logits = self._begin(cache, images, Prompt(ids, mask, positions, logits_to_keep=last), drafts)
            cache.stats.drafted_tokens += drafts
        logits = slice_logits_to_keep(torch.from_numpy(logits), wanted)
        loss = None if labels is None else ForCausalLMLoss(logits, labels, self.shapes.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def _begin(self, cache: OVCache, images: ImageInputs | None, prompt: Prompt, drafts: int) -> np.ndarray:
        """Logits of a prompt, whose last `drafts` tokens are drafts, in the cache's session or that of its prefix."""
        if images:
            check_images(images, prompt.input_ids.shape, self.image_encoder.pixels_shape, self.config)
            prompt.seen = tiles_seen(images.cross_attention_mask, prompt.input_ids.shape[1])
            prompt.image_keys = image_keys(images)
        rows = self.image_encoder.rows_read(images, prompt.seen, self.language_model.row_mask) if images else 0
        warn_of_double_bos(prompt.input_ids, self.config.text_config.bos_token_id)
        session = cache.session or self.sessions.take(prompt, rows)
        images = None if session.holds_images(prompt) else images
        evict_for(prompt, session, self.sessions, self.image_encoder, self.config, rows, images)
        encoded = self.image_encoder.encode(images, prompt.image_keys, *self._watched) if images else None
        held = len({key for row in prompt.image_keys for key in row})  # in the session, where none is encoded
        self.stats = cache.stats = GenerationStats(
            load_s=self._load_s,
            warm_up_s=self._warm_up_s,
            image_s=encoded.image_s if encoded else [0.0] * held,
            images_kept=encoded.kept if encoded else held,
            prompt_tokens=prompt.input_ids.shape[1] - drafts,
        )
        return session.prefill(prompt, encoded, cache, *self._watched)

    @contextlib.contextmanager
    def _in_turn(self, stop=None):
        """One thread at a time; when its outermost call ends, conversations that there is no room for are dropped."""
        with acquire(self.turn, stop):
            self._calls += 1
            try:
                yield
            finally:
                self._calls -= 1
                if not self._calls:
                    self.sessions.release()

    # ---- What GenerationMixin calls (tests/runtime/test_interface.py checks that it still does) ----

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, use_cache=True, **kwargs):
        """After the prompt only text goes in: the cache holds the images. Tokens behind those that the processor saw,
        as when an answer is continued by hand, see the tiles that its last one does."""
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
            raise ValueError(
                f"cache_implementation='{generation_config.cache_implementation}' cannot be served: the KV cache stays "
                "inside OpenVINO and grows as needed. Leave it out."
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = OVCache()
        if generation_config.is_assistant and model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"].activate_past_recording()

    def _get_candidate_generator(self, model_kwargs, assistant_model=None, **kwargs) -> CandidateGenerator:
        """Drafts come from text alone: an assistant model knows no images."""
        if isinstance(assistant_model, OVDraftModel):
            return ModelDrafts(assistant_model, self.shapes.vocab_size, kwargs["generation_config"], self)
        text_kwargs = {name: value for name, value in model_kwargs.items() if name not in ImageInputs._fields}
        drafts = super()._get_candidate_generator(model_kwargs=text_kwargs, assistant_model=assistant_model, **kwargs)
        return InVocabularyDrafts(drafts, self.shapes.vocab_size, back_off=assistant_model is None)

    def _get_logits_processor(self, *args, encoder_input_ids=None, **kwargs) -> LogitsProcessorList:
        """Those of transformers that look up logits by the prompt's ids do not see `<|image|>`; all others do."""
        if encoder_input_ids is not None and encoder_input_ids.ndim == 2:
            encoder_input_ids = in_vocabulary(encoder_input_ids, self.shapes.vocab_size)
        processors = super()._get_logits_processor(*args, encoder_input_ids=encoder_input_ids, **kwargs)
        for index, processor in enumerate(processors):
            if isinstance(processor, RepetitionPenaltyLogitsProcessor):
                processors[index] = InVocabularyProcessor(processor)
        return processors
