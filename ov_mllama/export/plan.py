"""The plan for a checkpoint on a machine: which IRs to make, and the cost of each step.

Nothing is measured here; the formulas are in `costs.py`.
"""

import errno
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from transformers import LlamaConfig, MllamaConfig

from ov_mllama.export.costs import (
    LOAD_S_PER_BYTE,
    PREDICTION_ERROR,
    Cost,
    answering_memory,
    compression_cost,
    conversion_cost,
    duration,
    gigabytes,
    image_seconds,
    measured_format,
    prompt_seconds,
    taking_over_cost,
    token_seconds,
    vision_cost,
    weights,
)
from ov_mllama.export.machine import Machine
from ov_mllama.export.settings import DEFAULT_VISION_OPTION, VISION_OPTIONS, Settings, own_name
from ov_mllama.runtime.errors import DiskError, OutOfMemoryError
from ov_mllama.runtime.ir import DRAFT_MODEL_NAME, LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME
from ov_mllama.runtime.measure import PROMPT, Speed

SYSTEM_BYTES = 4e9  # of a machine's memory, taken by its system and a browser


@dataclass(frozen=True)
class Step:
    """A step of a plan and its cost.

    Attributes:
        what: an imperative, such as "download".
        cost: in the shortest case.
        longest: seconds in the longest case; 0 if there is only one.
        scratch: bytes of a temporary file, freed at the step's end.
    """

    what: str
    cost: Cost
    longest: float = 0
    scratch: float = 0

    @property
    def time(self) -> str:
        """The time for people, as a range if there is a longest case."""
        shortest, longest = duration(self.cost.seconds), duration(self.longest)
        return shortest if not self.longest or longest == shortest else f"{shortest} to {longest}"

    def on_one_core(self) -> "Step":
        """Return the step on one core instead of two; on more it is as on two, for which there are measurements."""
        return replace(self, cost=self.cost._replace(seconds=2 * self.cost.seconds))

    @property
    def disk(self) -> str:
        """The bytes of disk for people."""
        temporary = f"{gigabytes(self.scratch)} for a while" if self.scratch else ""
        return " + ".join(filter(None, (gigabytes(self.cost.disk) if self.cost.disk else "", temporary)))

    def __str__(self) -> str:
        takes = f"about {self.time}"
        takes += f", {gigabytes(self.cost.memory)} of memory" * bool(self.cost.memory)
        return f"{self.what}: {takes}{f', {self.disk} of disk' * bool(self.disk)}"


class Files(NamedTuple):
    """Bytes that a checkpoint's files take, beyond what its config tells.

    Attributes:
        download: that are still to be downloaded.
        vision: of the temporary file of the vision encoder's weights that are not stored in 16 bit.
        language: likewise, of the language model's.
        both: likewise, of all.
        own_form: of a language model that is taken over completely, as `Checkpoint.own_form`.
        own_bytes: of that language model in the IR; a temporary copy is in `language`.
    """

    download: float = 0
    vision: float = 0
    language: float = 0
    both: float = 0
    own_form: str = ""
    own_bytes: float = 0


@dataclass(frozen=True)
class Plan:
    """The steps for a checkpoint on a machine.

    Attributes:
        machine: that it is made for.
        write_16_bit: whether to write the language model in 16 bit too. Where it cannot run, it would only take disk:
            `compress(..., checkpoint=...)` makes the same smaller IR without it.
        compare_with_pytorch: whether the original fits in float32, and after it the 16-bit IRs computed in float32.
        steps: by name, in order.
    """

    machine: Machine
    write_16_bit: bool
    compare_with_pytorch: bool
    steps: dict[str, Step]

    @property
    def disk(self) -> float:
        """Bytes that all steps take at the peak, the download and the largest temporary file included."""
        return written(self.steps)

    @property
    def makes(self) -> bool:
        """True if anything is to be downloaded or made."""
        return any(step.cost.disk for step in self.steps.values())

    @property
    def shortfalls(self) -> tuple[str, ...]:
        """Sentences about missing disk and memory, each with the fix; none if all steps fit."""
        memory, sentences = self.machine.memory, disk_shortfalls(self.steps, self.machine)
        largest = max(self.steps.values(), key=lambda step: step.cost.memory)
        if largest.cost.memory > memory:
            sentences.append(
                f"To {largest.what} takes {gigabytes(largest.cost.memory)} of memory and {gigabytes(memory)} are free: "
                "close other programs, or use a machine with more."
            )
        return tuple(sentences)

    def check_disk(self) -> None:
        """Refuse a plan that fills a disk, before an hour of downloads.

        Raises:
            DiskError: if there is too little disk (errno.ENOSPC).
        """
        sentences = disk_shortfalls(self.steps, self.machine)
        if sentences:
            raise DiskError(errno.ENOSPC, " ".join(sentences))

    def check(self) -> None:
        """Refuse a plan that lacks disk or memory, before anything is downloaded or made.

        Raises:
            DiskError: if there is too little disk (errno.ENOSPC).
            OutOfMemoryError: if there is too little memory.
        """
        advice = "Nothing was downloaded; --yes (in Python yes=True) goes on."
        text = " ".join((*self.shortfalls, advice))
        if disk_shortfalls(self.steps, self.machine):
            raise DiskError(errno.ENOSPC, text)
        if self.shortfalls:
            raise OutOfMemoryError(text)

    def __str__(self) -> str:
        rows = [
            (
                step.what,
                (step.time if step.cost.seconds else "") if any(step.cost) else "done already",
                gigabytes(step.cost.memory) if step.cost.memory else "",
                step.disk,
            )
            for step in self.steps.values()
        ]
        table, speed = markdown(("step", "time", "memory", "disk"), rows), self.machine.speed
        if not speed:
            return table
        return (
            f"{table}\n\nImage, prompt and token: predicted from this CPU's speed, with {speed.threads} threads and "
            f"{gigabytes(speed.read)} a second from memory, within about {100 * PREDICTION_ERROR:.0f} %."
        )


def plan(
    config: MllamaConfig,
    machine: Machine,
    settings: Settings,
    downloaded: bool = True,
    made: Collection[str] = (),
    draft: LlamaConfig | None = None,
    draft_downloaded: bool = True,
    for_chat: bool = False,
    files: Files | None = None,
    draft_files: Files | None = None,
) -> Plan:
    """Plan the steps for a checkpoint on a machine.

    Args:
        settings: of the language model's compression.
        downloaded: whether the checkpoint is on this disk already.
        made: file names of the IRs that exist; they cost nothing.
        draft: config of the draft model, if any.
        draft_downloaded: as `downloaded`, of its checkpoint.
        for_chat: leave out the language model in 16 bit, which a chat does not need.
        files: of the checkpoint; default: those of 16-bit weights, as large as the config tells.
        draft_files: likewise, of the draft model.
    """
    size = weights(config)
    original, made = 2 * (size.language + size.vision), {made} if isinstance(made, str) else made
    vision_name = VISION_ENCODER_NAME.replace(".xml", f"{VISION_OPTIONS[DEFAULT_VISION_OPTION]}.xml")
    smaller = vision_cost(DEFAULT_VISION_OPTION, config)
    drafting = compression_cost(settings, draft) if draft else Cost()
    files = files or Files(0 if downloaded else original)
    to_compress, small_name, small = smaller_language_model(config, settings, files)
    draft_files = draft_files or Files(2 * weights(draft).language if draft and not draft_downloaded else 0)
    download = files.download + draft_files.download
    loaded = small.disk + smaller.disk + drafting.disk

    def made_by(what: str, name: str, cost: Cost, scratch: float = 0) -> Step:
        return Step(what, Cost()) if name in made else Step(what, cost, scratch=scratch)

    def making(write_16_bit: bool) -> dict[str, Step]:
        both = "vision encoder and language model" if write_16_bit else "vision encoder"
        missing = VISION_ENCODER_NAME not in made, write_16_bit and LANGUAGE_MODEL_NAME not in made
        steps = {
            "download": Step("download", Cost(disk=download)),
            "convert": Step(
                f"convert the {both}, 16 bit",
                conversion_cost(config, *missing),
                scratch=any(missing) * (files.both if write_16_bit else files.vision),
            ),
            "compress": made_by(to_compress, small_name, small, files.language),
            "draft": made_by("compress the draft model", DRAFT_MODEL_NAME, drafting, draft_files.both),
            "vision": made_by(f"make the vision encoder smaller, {DEFAULT_VISION_OPTION}", vision_name, smaller),
        }
        left_out = {"download": not download, "draft": not draft}
        return {name: step for name, step in steps.items() if not left_out.get(name)}

    fits = not (for_chat or files.own_form) and answering_memory(config, original) <= machine.memory
    write_16_bit = fits and not disk_shortfalls(making(True), machine)
    answering = answering_memory(config, loaded)
    steps = {**making(write_16_bit), "load": loading(config, loaded)}
    if machine.speed and machine.speed.threads == 1:
        steps = {name: step.on_one_core() for name, step in steps.items()}
    steps |= answers(config, machine.speed, answering, measured_format(settings, files.own_form))
    compare = write_16_bit and answering_memory(config, 2 * original) <= machine.memory
    return Plan(machine, write_16_bit, compare, steps)


def answers(config: MllamaConfig, speed: Speed | None, memory: float, form: str) -> dict[str, Step]:
    """Return the steps of answering, with their seconds if the CPU's speed is known.

    Args:
        memory: of answering, bytes.
        form: of the language model's layers, of `measure.FORMATS`.
    """
    image, longest, prompt, token = 4 * (0.0,)
    if speed:
        image, longest = (image_seconds(config, speed, tiles) for tiles in (1, config.vision_config.max_num_tiles))
        prompt, token = prompt_seconds(config, speed, form), token_seconds(config, speed, form)
    return {
        "picture": Step("encode an image of one to four tiles", Cost(memory=memory, seconds=image), longest),
        "prompt": Step(f"read a prompt of {PROMPT} tokens", Cost(memory=memory, seconds=prompt)),
        "token": Step("write a token", Cost(memory=memory, seconds=token)),
    }


def smaller_language_model(config: MllamaConfig, settings: Settings, files: Files) -> tuple[str, str, Cost]:
    """Return how the smaller language model is made, its file name, and the cost."""
    if files.own_form:
        what = f"take over the language model, {files.own_form.upper()} as it is stored"
        return what, own_name(files.own_form), taking_over_cost(files.own_bytes)
    what = f"compress the language model, {settings.algo} in groups of {settings.group_size}"
    return what, settings.file_name, compression_cost(settings, config)


def written(steps: dict[str, Step]) -> float:
    """Return the bytes that all steps take at the peak."""
    return sum(step.cost.disk for step in steps.values()) + max(step.scratch for step in steps.values())


def disk_shortfalls(steps: dict[str, Step], machine: Machine) -> list[str]:
    """Return a sentence for each disk that is too small for what all steps write."""
    download = steps["download"].cost.disk if "download" in steps else 0
    writes = written(steps)
    sentences = []
    if machine.downloads is not None:
        writes -= download
        if download > machine.downloads:
            sentences.append(
                f"The download takes {gigabytes(download)} and {gigabytes(machine.downloads)} are free on its disk: "
                "free disk space, or set HF_HOME to a folder on another."
            )
    if writes > machine.disk:
        sentences.append(
            f"All steps write {gigabytes(writes)} and {gigabytes(machine.disk)} of disk are free: free disk "
            "space, or choose a folder on another disk."
        )
    return sentences


def loading(config: MllamaConfig, weight_bytes: float) -> Step:
    """Return the step of reading all IRs and repacking their weights; its memory is that of answering.

    Args:
        weight_bytes: of all IRs.
    """
    return Step("load them", Cost(0, answering_memory(config, weight_bytes), 1 + LOAD_S_PER_BYTE * weight_bytes))


def by_memory(config: MllamaConfig, settings: Settings, sizes: Iterable[int] = (16, 24, 32, 64)) -> str:
    """Return a Markdown table of plans for a checkpoint by a machine's memory, given enough disk.

    Args:
        settings: as for `plan`.
        sizes: memory of the machines, GiB.
    """
    rows = []
    for size in sizes:
        made = plan(config, Machine(size * 2**30 - SYSTEM_BYTES, float("inf")), settings, downloaded=False)
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
    """Return a Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
