"""Deprecated: `python -m serving.app` is `ov-mllama serve`; to be deleted in 4.0."""

import sys
import warnings

from ov_mllama.__main__ import main

warnings.warn("python -m serving.app is now ov-mllama serve.", DeprecationWarning, stacklevel=1)
if __name__ == "__main__":
    sys.argv[1:1] = ["serve"]
    main()
