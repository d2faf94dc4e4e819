"""`ModuleCompatMixin`: the `nn.Module` and `PreTrainedModel` methods that apply, clear errors for the rest."""

from .errors import InputError

WEIGHTS = "the weights are inside OpenVINO's compiled model; load the checkpoint with transformers for them."
PRECISION = "set the precision when loading, ov_config={'INFERENCE_PRECISION_HINT': 'bf16'}."
UNAVAILABLE = {
    **dict.fromkeys(("parameters", "named_parameters", "state_dict", "num_parameters", "named_modules"), WEIGHTS),
    **dict.fromkeys(("get_input_embeddings", "get_output_embeddings", "resize_token_embeddings"), WEIGHTS),
    **dict.fromkeys(("float", "half", "bfloat16"), PRECISION),
    "cuda": "load with device='GPU' for an Intel GPU; OpenVINO supports no other.",
    "train": "OpenVINO runs inference only; train the checkpoint with transformers, then convert it.",
    "save_pretrained": "the model is on disk already; copy the folder that convert_mllama wrote.",
}


class ModuleCompatMixin:
    """The methods of `nn.Module` and `PreTrainedModel` that apply to a compiled model."""

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def eval(self):
        return self

    def to(self, *args, **kwargs):
        """Return self for "cpu" and torch.float32: inputs may have any type.

        Raises:
            InputError: for another device or precision; both are set at loading.
        """
        for target in (*args, *kwargs.values()):
            if str(target) not in ("cpu", "torch.float32", "None", "True", "False"):
                raise InputError(
                    f"The model cannot be moved to {target}: load it with OVMLlamaForConditionalGeneration(model_dir, "
                    "device='GPU', ov_config={'INFERENCE_PRECISION_HINT': 'bf16'}). Inputs and logits stay on the CPU."
                )
        return self

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        raise TypeError(
            "from_pretrained is not supported: convert the checkpoint with convert_mllama(model_id, model_dir), then "
            "load OVMLlamaForConditionalGeneration(model_dir)."
        )

    def __getattr__(self, name: str):
        raise AttributeError(f"'{type(self).__name__}' has no '{name}': {UNAVAILABLE.get(name, 'check its spelling.')}")

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "A compiled model can be neither copied nor pickled: load another one with "
            "OVMLlamaForConditionalGeneration(model_dir)."
        )

    # ---- Called by GenerationMixin (tests/runtime/test_interface.py checks that they still are) ----

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict:
        return {}

    @property
    def vision_encoder_infer_time(self) -> list[float]:
        """Seconds for each different image of the last prompt, about 0 for cached ones."""
        return self.stats.image_s

    @property
    def llm_infer_time(self) -> list[float]:
        """Seconds for each step of the language model since the last prompt; the first is the prompt's."""
        return [self.stats.prefill_s, *self.stats.step_s] if self.stats.prefill_s else []
