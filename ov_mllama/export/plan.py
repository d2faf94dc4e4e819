"""What to do with a checkpoint on a machine: which IRs, and what each step takes. It only computes: `memory.py` looks,
`costs.py` has the formulas."""

import errno
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig, MllamaConfig

from ov_mllama.export.costs import (
    FOUR_TILES,
    ONE_TILE,
    READ,
    REPACKED,
    Cost,
    answering_memory,
    compression_cost,
    conversion_cost,
    duration,
    gigabytes,
    vision_cost,
    weights,
)
from ov_mllama.export.settings import DEFAULT_VISION_OPTION, VISION_OPTIONS, Settings
from ov_mllama.runtime.devices import cores
from ov_mllama.runtime.ir import DRAFT_MODEL_NAME, LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME
from ov_mllama.runtime.memory import existing, free_disk, free_memory
from ov_mllama.runtime.shapes import MllamaShapes


@dataclass(frozen=True)
class Machine:
    """What a plan is made for.

    Attributes:
        memory: bytes that are free, or can be had by dropping cached files.
        disk: bytes that are free where the model will be.
        downloads: those where checkpoints are downloaded to; None where that is the same disk.
        cores: physical ones that this process may use.
    """

    memory: float
    disk: float
    cores: int = 2
    downloads: float | None = None

    @classmethod
    def here(cls, folder: str | Path, cache: str | Path | None = None) -> "Machine":
        """This machine now.

        Args:
            folder: where the model will be; it need not exist yet.
            cache: where checkpoints are downloaded to, likewise; default there too.
        """
        apart = cache is not None and existing(cache).stat().st_dev != existing(folder).stat().st_dev
        return cls(free_memory(), free_disk(folder), cores(), free_disk(cache or folder) if apart else None)


SYSTEM = 4e9  # bytes of a machine's memory that its system and a browser take


@dataclass(frozen=True)
class Step:
    """One step, and what it takes. As text, a sentence to say before it."""

    what: str
    cost: Cost
    longest: float = 0

    @property
    def time(self) -> str:
        """What its seconds are; those of the longest case beside them."""
        shortest, longest = duration(self.cost.seconds), duration(self.longest)
        return shortest if not self.longest or longest == shortest else f"{shortest} to {longest}"

    def on(self, cores: int) -> "Step":
        """The same on so many cores; more than two count as two, of which there are measurements."""
        slower = 2 / min(cores, 2)
        return Step(self.what, self.cost._replace(seconds=slower * self.cost.seconds), slower * self.longest)

    def __str__(self) -> str:
        takes = f"about {self.time}"
        takes += f", {gigabytes(self.cost.memory)} of memory" * bool(self.cost.memory)
        return f"{self.what}: {takes}{f', {gigabytes(self.cost.disk)} of disk' * bool(self.cost.disk)}"


@dataclass(frozen=True)
class Plan:
    """What to do with a checkpoint on a machine.

    Attributes:
        machine: for which.
        write_16_bit: whether to write the language model in 16 bit too. Where it could not be run, it would only take
            disk: `compress(..., checkpoint=...)` makes the same smaller IR without it.
        compare_with_pytorch: whether the original fits in float32, and after it the 16-bit IRs computed in float32.
        steps: by name, in order.
    """

    machine: Machine
    write_16_bit: bool
    compare_with_pytorch: bool
    steps: dict[str, Step]

    @property
    def disk(self) -> float:
        """Bytes that all steps write, the download among them."""
        return sum(step.cost.disk for step in self.steps.values())

    @property
    def shortfalls(self) -> tuple[str, ...]:
        """Sentences that say what this machine has too little of; none where all fits."""
        memory, lacking = self.machine.memory, lacking_disk(self.steps, self.machine)
        most = max(self.steps.values(), key=lambda step: step.cost.memory)
        if most.cost.memory > memory:
            lacking.append(
                f"To {most.what} takes {gigabytes(most.cost.memory)} of memory and {gigabytes(memory)} are free: close "
                "other programs, or take a machine with more."
            )
        return tuple(lacking)

    def check_disk(self) -> None:
        """Before an hour of downloads ends with a full disk.

        Raises:
            OSError: there is too little of it (errno.ENOSPC); the sentence says what to do.
        """
        lacking = lacking_disk(self.steps, self.machine)
        if lacking:
            raise OSError(errno.ENOSPC, " ".join(lacking))

    def __str__(self) -> str:
        rows = [
            (
                step.what,
                (step.time if step.cost.seconds else "") if any(step.cost) else "done already",
                gigabytes(step.cost.memory) if step.cost.memory else "",
                gigabytes(step.cost.disk) if step.cost.disk else "",
            )
            for step in self.steps.values()
        ]
        cores = "one core" if self.machine.cores == 1 else "two cores"  # more were not measured
        return markdown(("step", f"time on {cores}", "memory", "disk"), rows)


def plan(
    config: MllamaConfig,
    machine: Machine,
    settings: Settings,
    downloaded: bool = True,
    made: Collection[str] = (),
    draft: LlamaConfig | None = None,
    draft_downloaded: bool = True,
    for_chat: bool = False,
) -> Plan:
    """What to do with a checkpoint on a machine.

    Args:
        settings: of the language model's compression.
        downloaded: whether the checkpoint is on this disk already.
        made: file names of the IRs that are there already; they are not made again.
        draft: config of the draft model, if there is to be one.
        draft_downloaded: as `downloaded`, of its checkpoint.
        for_chat: only what a chat needs: no language model in 16 bit.
    """
    size, rows = weights(config), MllamaShapes.from_config(config).patches_per_tile
    original, made = 2 * (size.language + size.vision), {made} if isinstance(made, str) else made
    vision_name = VISION_ENCODER_NAME.replace(".xml", f"{VISION_OPTIONS[DEFAULT_VISION_OPTION]}.xml")
    small, smaller = compression_cost(settings, config), vision_cost(DEFAULT_VISION_OPTION, config)
    guessing = compression_cost(Settings(), draft) if draft else Cost()
    download = original * (not downloaded) + (2 * weights(draft).language if draft and not draft_downloaded else 0)
    loaded = small.disk + smaller.disk + guessing.disk

    def making(write_16_bit: bool) -> dict[str, Step]:
        both = "vision encoder and language model" if write_16_bit else "vision encoder"
        missing = VISION_ENCODER_NAME not in made, write_16_bit and LANGUAGE_MODEL_NAME not in made
        to_compress = f"compress the language model, {settings.algo} in groups of {settings.group_size}"
        steps = {
            "download": Step("download", Cost(disk=download)),
            "convert": Step(f"convert the {both}, 16 bit", conversion_cost(config, *missing)),
            "compress": Step(to_compress, Cost() if settings.file_name in made else small),
            "draft": Step("compress the draft model", Cost() if DRAFT_MODEL_NAME in made else guessing),
            "vision": Step(
                f"make the vision encoder smaller, {DEFAULT_VISION_OPTION}", Cost() if vision_name in made else smaller
            ),
        }
        left_out = {"download": not download, "draft": not draft}
        return {name: step for name, step in steps.items() if not left_out.get(name)}

    write_16_bit = not for_chat and answering_memory(config, original) <= machine.memory
    if write_16_bit and lacking_disk(making(True), machine):
        write_16_bit = False
    answering = answering_memory(config, loaded)
    steps = {
        **making(write_16_bit),
        "load": loading(config, loaded),
        "picture": Step(
            "look at a picture of one to four tiles",
            Cost(memory=answering, seconds=ONE_TILE * size.tower * rows),
            FOUR_TILES * size.tower * rows,
        ),
        "token": Step("write a token", Cost(memory=answering, seconds=READ * (small.disk - size.embedding))),
    }
    float32 = answering_memory(config, 2 * original)
    steps = {name: step.on(machine.cores) for name, step in steps.items()}
    return Plan(machine, write_16_bit, write_16_bit and float32 <= machine.memory, steps)


def lacking_disk(steps: dict[str, Step], machine: Machine) -> list[str]:
    """Sentences on the disks that are too small for what all steps write; none where there is room."""
    download = steps["download"].cost.disk if "download" in steps else 0
    writes = sum(step.cost.disk for step in steps.values())
    lacking = []
    if machine.downloads is not None:
        writes -= download
        if download > machine.downloads:
            lacking.append(
                f"The download takes {gigabytes(download)} and {gigabytes(machine.downloads)} are free on its disk: "
                "make room, or let HF_HOME name a folder on another."
            )
    if writes > machine.disk:
        lacking.append(
            f"All steps write {gigabytes(writes)} and {gigabytes(machine.disk)} of disk are free: make room, or choose "
            "a folder on another disk."
        )
    return lacking


def loading(config: MllamaConfig, weight_bytes: float) -> Step:
    """Of reading all IRs and repacking their weights; the memory is what answering takes.

    Args:
        weight_bytes: of all of them.
    """
    return Step("load them", Cost(0, answering_memory(config, weight_bytes), 1 + REPACKED * weight_bytes))


def by_memory(config: MllamaConfig, settings: Settings, sizes: Iterable[int] = (16, 24, 32, 64)) -> str:
    """A table in Markdown of what a machine of so many GB does with a checkpoint, given enough disk.

    Args:
        settings: as for `plan`.
    """
    rows = []
    for size in sizes:
        made = plan(config, Machine(size * 2**30 - SYSTEM, float("inf")), settings, downloaded=False)
        making, answering = (
            max(made.steps[name].cost.memory for name in names)
            for names in (("convert", "compress", "vision"), ("picture", "token"))
        )
        also = ["the 16-bit model beside it"] * made.write_16_bit
        also += ["a comparison with PyTorch in float32"] * made.compare_with_pytorch
        both = f"{settings.algo}, vision encoder: {DEFAULT_VISION_OPTION}"
        first = "nothing: too little memory" if made.shortfalls else both
        rows.append(
            (f"{size} GB", first, gigabytes(making), gigabytes(answering), gigabytes(made.disk), ", ".join(also) or "–")
        )
    header = ("machine", "default setup", "peak RAM to convert", "peak RAM to run", "disk, total", "also fits")
    return markdown(header, rows)


def markdown(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
