"""Write an IR and its companions once: skip what is current, check resources, lock the folder, write atomically."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import openvino as ov

from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.costs import Cost, duration, gigabytes
from ov_mllama.runtime.companions import are_current, write_companions
from ov_mllama.runtime.ir import check_disk_and_memory, exclusive_lock, is_current, outdated_files, save_ir

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Companions:
    """The files beside a checkpoint's IRs: config, tokenizer and the like.

    Attributes:
        folder: of the IRs.
        checkpoint: whose files they are.
        save: writes them into the folder that it is given.
        remove_outdated: remove the folder's IRs of other checkpoints too.
    """

    folder: Path
    checkpoint: Checkpoint
    save: Callable[[Path], None]
    remove_outdated: bool = False

    def are_current(self) -> bool:
        """Return whether the folder holds these, complete and unchanged."""
        return are_current(self.folder, self.checkpoint.fingerprint, self.checkpoint.source_digest)

    def update(self) -> None:
        """Write them unless they are current. The caller holds the folder's lock."""
        if not self.are_current():
            outdated = outdated_files(self.folder, self.checkpoint.fingerprint) if self.remove_outdated else []
            write_companions(
                self.folder,
                self.checkpoint.fingerprint,
                self.checkpoint.source_digest,
                self.save,
                outdated,
                self.checkpoint.origin,
            )


def build_ir(
    path: Path,
    stamp: dict[str, str],
    cost: Cost,
    make: Callable[[], ov.Model],
    name: str,
    advice: str = "close other programs",
    companions: Companions | None = None,
    force: bool = False,
) -> bool:
    """Write the IR that `make` returns, and its companions, unless both are current.

    Args:
        path: of the .xml.
        stamp: that identifies a current IR, see `ir_stamp`.
        cost: of making it; too little disk or memory is refused before anything is written.
        make: called with the folder's lock held.
        name: of the IR, for log messages.
        advice: to save memory, for the error.
        companions: written before the IR, after `make`.
        force: write the IR even if it is current.
    Returns:
        whether anything was written.
    Raises:
        DiskError, OutOfMemoryError: as `check_disk_and_memory`.
        DiskError: as `exclusive_lock` and `save_ir`; the folder's former IR is left as it was.
    """
    needed = force or not is_current(path, stamp)
    if not needed and (companions is None or companions.are_current()):
        logger.info("✅ %s already exists: %s", name, path)
        return False
    check_disk_and_memory(path.parent, cost.disk * needed, cost.memory * needed, advice)
    with exclusive_lock(path.parent):
        needed = force or not is_current(path, stamp)  # checked again: another process may have written it meanwhile
        if needed:
            logger.info(
                "⌛ %s: writing %s, %s, about %s on two cores, %s of memory",
                *(name, path.name, gigabytes(cost.disk), duration(cost.seconds), gigabytes(cost.memory)),
            )
            model = make()  # before the companions: a checkpoint that it refuses leaves the folder as it was
        if companions:
            companions.update()
        if needed:
            save_ir(model, path, stamp)
    logger.info("✅ %s: %s", name, path)
    return True
