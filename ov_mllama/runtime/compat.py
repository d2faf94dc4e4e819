"""What scripts written for transformers' class do with a model besides calling it: done, or refused with a sentence."""

WEIGHTS = "the weights are inside OpenVINO's compiled model; load the checkpoint with transformers for them."
PRECISION = "set the precision when loading, ov_config={'INFERENCE_PRECISION_HINT': 'bf16'}."
NOT_HERE = {
    **dict.fromkeys(("parameters", "named_parameters", "state_dict", "num_parameters", "named_modules"), WEIGHTS),
    **dict.fromkeys(("get_input_embeddings", "get_output_embeddings", "resize_token_embeddings"), WEIGHTS),
    **dict.fromkeys(("float", "half", "bfloat16"), PRECISION),
    "cuda": "load it with device='GPU' for an Intel GPU; others OpenVINO does not use.",
    "train": "a converted model only answers; train the checkpoint with transformers, then convert it.",
    "save_pretrained": "it is saved already: copy the folder that convert_mllama wrote.",
}


class ModuleCompatMixin:
    """The little of `nn.Module` and `PreTrainedModel` that a compiled model can be asked for."""

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def eval(self):
        """Itself: it always is."""
        return self

    def to(self, *args, **kwargs):
        """Itself, for `.to("cpu")` and `.to(torch.float32)`. Inputs may have any type in either case.

        Raises:
            ValueError: another device or precision; both are chosen when the model is loaded.
        """
        for wanted in (*args, *kwargs.values()):
            if str(wanted) not in ("cpu", "torch.float32", "None", "True", "False"):
                raise ValueError(
                    f"The model cannot be moved to {wanted}: load it with OVMLlamaForConditionalGeneration(model_dir, "
                    "device='GPU', ov_config={'INFERENCE_PRECISION_HINT': 'bf16'}). Inputs and logits stay on the CPU."
                )
        return self

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        raise TypeError(
            "A checkpoint is converted first: convert_mllama(model_id, model_dir), then "
            "OVMLlamaForConditionalGeneration(model_dir)."
        )

    def __getattr__(self, name: str):
        raise AttributeError(f"'{type(self).__name__}' has no '{name}': {NOT_HERE.get(name, 'check its spelling.')}")

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "This model lives in OpenVINO's memory and can be neither copied nor pickled: load it once more with "
            "OVMLlamaForConditionalGeneration(model_dir)."
        )

    # ---- What GenerationMixin asks (tests/runtime/test_interface.py checks that it still does) ----

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict:
        return {}
