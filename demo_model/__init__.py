"""The demo checkpoint, and how it was made: README.md beside this file."""

from pathlib import Path

SAMPLES = Path(__file__).parent / "samples"  # held-out pictures with questions and right answers, in `imagefolder` form
