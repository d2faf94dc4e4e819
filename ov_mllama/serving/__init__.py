"""OpenAI-compatible server, and captions for folders of images."""

from pathlib import Path


def load(
    model_dir: Path,
    device: str = "CPU",
    language: str | None = None,
    encoder: str | None = None,
    threads: int | None = None,
    **options,
):
    """Return the model of a folder and its processor.

    Args:
        language, encoder: names of its .xml files; default: the newest compressed ones.
        threads: for a process that shares its machine with others; None for all.
        options: of `OVMLlamaForConditionalGeneration`.
    """
    from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, newest
    from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
    from ov_mllama.runtime.prompts import load_processor

    # pinned, the threads of each process would take the machine's first cores and leave the others idle
    shared = {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    model = OVMLlamaForConditionalGeneration(
        model_dir,
        device,
        ov_config=shared if threads else None,
        language_model_name=language or newest(model_dir, LANGUAGE_MODEL_NAME),
        image_encoder_name=encoder or newest(model_dir, VISION_ENCODER_NAME),
        **options,
    )
    return model, load_processor(model_dir)


def positive(text: str) -> int:
    """Parse a command-line argument that must be at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)
