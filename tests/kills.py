"""Steps that the tests of faults run in processes that are killed: every step that writes into a model's folder."""

import contextlib
import io

from demo_model import SAMPLES
from ov_mllama.export.convert import convert_mllama
from ov_mllama_compression import compress, optimize_vision_encoder

SMALLER = ("llm_int4_asym_r10_gs32.xml", "openvino_vision_encoder_int8.xml")

PROGRAM = """
import sys
from pathlib import Path
import kills
kills.everything(*map(Path, sys.argv[1:3]), quantize=sys.argv[3] == "True")
"""


def everything(checkpoint, out_dir, quantize=True) -> None:
    """Convert, compress and quantise, or all but that, which takes as long as the rest; print nothing."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        convert_mllama(checkpoint, out_dir)
        compress(out_dir, group_size=32)
        if quantize:
            optimize_vision_encoder(out_dir, "INT8 quantization", dataset_size=1, source=SAMPLES)
