"""Deprecated: `python -m serving.caption` is `ov-mllama caption`; to be deleted in 4.0."""

import sys
import warnings

from ov_mllama.__main__ import main

warnings.warn("python -m serving.caption is now ov-mllama caption.", DeprecationWarning, stacklevel=1)
if __name__ == "__main__":
    sys.argv[1:1] = ["caption"]
    main()
