"""Module paths of version 2, importable until 4.0."""

import sys
from importlib import import_module

import pytest

from ov_mllama.deprecated import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_old_module_path_resolves_to_the_moved_module(old):
    sys.modules.pop(f"ov_mllama.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"ov_mllama.{old} is now ov_mllama.{MOVED[old]}"):
        module = import_module(f"ov_mllama.{old}")
    assert module is import_module(f"ov_mllama.{MOVED[old]}")


def test_old_serving_command_still_runs(start):
    program = start("import runpy; runpy.run_module('serving.app', run_name='__main__', alter_sys=True)", "--help")
    assert program.wait() == 0, program.said()
    assert "--model-dir" in program.said()
    assert "python -m serving.app is now ov-mllama serve" in program.said()
