"""Module paths of version 2, importable with a `DeprecationWarning`; to be deleted in 4.0."""

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec

UNCHANGED = {
    "runtime": "checks companions cross_attention golden images inference language model reference stats vision",
    "export": "checkpoint compress convert costs graphs plan prepare quality settings tracing",
    "chat": "owners pages proxies",
}
MOVED = {name: f"{room}.{name}" for room, names in UNCHANGED.items() for name in names.split()} | {
    "cache": "runtime.kv_cache",
    "conversation": "runtime.prompts",
    "conversations": "chat.store",
    "draft_model": "runtime.speculative",
    "drafts": "runtime.speculative",
    "files": "runtime.ir",
    "kept": "runtime.image_cache",
    "machine": "runtime.memory",
    "photographs": "export.samples",
    "pieces": "export.piecewise",
    "precision": "runtime.devices",
    "progress": "runtime.inference",
}


class MovedModules:
    """Import hook that resolves each old path to the module that took its place, and asks no other."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        return ModuleSpec(name, MovedModules) if package == "ov_mllama" and module in MOVED else None  # type: ignore

    @staticmethod
    def create_module(spec):
        return None

    @staticmethod
    def exec_module(module) -> None:
        new = f"ov_mllama.{MOVED[module.__name__.partition('.')[2]]}"
        warnings.warn(f"{module.__name__} is now {new}.", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(new)


def install() -> None:
    """Let Python ask `MovedModules` for what no other finder has."""
    if MovedModules not in sys.meta_path:
        sys.meta_path.append(MovedModules)  # type: ignore
