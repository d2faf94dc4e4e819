"""The demo checkpoint and its training; see README.md in this folder."""

from pathlib import Path

SAMPLES = Path(__file__).parent / "samples"  # held-out images, questions and right answers, in `imagefolder` form
