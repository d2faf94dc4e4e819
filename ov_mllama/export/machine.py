"""The machine that a plan is made for: its free memory and disk, and the speed of its CPU."""

from dataclasses import dataclass
from pathlib import Path

from ov_mllama.runtime.measure import Speed, speed_here
from ov_mllama.runtime.memory import existing, free_disk, free_memory


@dataclass(frozen=True)
class Machine:
    """Resources of a machine.

    Attributes:
        memory: free bytes, those of cached files included.
        disk: free bytes on the model's disk.
        downloads: free bytes on the disk that checkpoints are downloaded to; None if it is the model's.
        speed: of its CPU; without it the steps of answering have no seconds, and IRs are made on two cores.
    """

    memory: float
    disk: float
    downloads: float | None = None
    speed: Speed | None = None

    @classmethod
    def here(cls, folder: str | Path, cache: str | Path | None = None) -> "Machine":
        """Measure this machine.

        Args:
            folder: of the model; it need not exist yet.
            cache: folder that checkpoints are downloaded to, likewise; default: `folder`.
        """
        apart = cache is not None and existing(cache).stat().st_dev != existing(folder).stat().st_dev
        return cls(free_memory(), free_disk(folder), free_disk(cache or folder) if apart else None, speed_here())
