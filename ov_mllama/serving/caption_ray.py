"""Captions on Ray Data: the images are distributed among processes that load the model once, on one machine or many,
which see the same folders and have this project installed."""

import json
import logging
import os
from collections.abc import Generator
from pathlib import Path

import ray

from ov_mllama.chat.proxies import bypass_proxy_for_loopback
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.image_store import ImageStore
from ov_mllama.serving.caption_answers import Captioner, Settings, Task

logger = logging.getLogger(__name__)


class Worker:
    """Process with a model; arguments as for `Captioner`."""

    def __init__(self, model_dir: str, *arguments):
        self.captioner = Captioner(Path(model_dir), *arguments)

    def __call__(self, batch: dict) -> dict:
        """Answer a batch of tasks; their results are JSON."""
        paths = map(os.fsdecode, batch["path"])
        tasks = [Task(*map(str, task)) for task in zip(batch["id"], paths, batch["question"], strict=True)]
        results = self.captioner.answer(self.captioner.prepare(tasks))
        return {**batch, "result": [json.dumps(result) for result in results]}


def init_ray(address: str | None = None) -> None:
    """Start Ray on this machine, or join a cluster, with little output."""
    bypass_proxy_for_loopback()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # read when ray.data is first used
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # or warnings about actors' arguments are logged as errors
    ray.data.DataContext.get_current().enable_progress_bars = False
    new = address in (None, "local")
    local = {"include_dashboard": False, "object_store_memory": 200_000_000} if new else {}
    ray.init(address=address, log_to_driver=False, logging_level="error", **local)
    if not new and ray.available_resources().get("CPU", 0) < 1:
        logger.info("⌛ No core of the cluster is free (each replica of a server takes one): waiting for one")


def threads_per_worker(workers: int, threads: int | None) -> int | None:
    """Return the threads of each worker: `threads`, or its share of the cores; None (all) for a single one.

    Raises:
        InputError: if no machine has as many cores, as Ray would wait for one.
    """
    limit = int(max(node["Resources"].get("CPU", 0) for node in ray.nodes()))
    if threads and threads > limit:
        raise InputError(f"No machine here has {threads} cores for a process, only {limit}: give fewer --threads.")
    return threads or (max(1, int(ray.cluster_resources()["CPU"]) // workers) if workers > 1 else None)


def answer_on_ray(
    model_dir: Path,
    prompts: dict[str, str],
    settings: Settings,
    tasks: list[Task],
    batch: int,
    workers: int,
    threads: int | None,
    image_store: ImageStore | None = None,
) -> Generator[list[tuple[Task, dict]]]:
    """Yield tasks and results in batches, as workers complete them; `init_ray` has been called.

    Args:
        workers: processes that load the model.
        threads: of each worker; None for its share of the cluster's cores.
        image_store: as for `Captioner`.
    Raises:
        InputError: as `threads_per_worker`.
    """
    threads = threads_per_worker(workers, threads)
    rows = [{**task._asdict(), "path": os.fsencode(task.path)} for task in tasks]
    data = ray.data.from_items(rows, override_num_blocks=-(-len(tasks) // batch))
    results = data.map_batches(
        Worker,
        fn_constructor_args=(str(model_dir), prompts, settings, batch, threads, image_store),
        batch_size=None,  # one block of the above
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=threads or 1,
    )
    for columns in results.iter_batches(batch_size=None, prefetch_batches=0):
        keys = zip(columns["id"], map(os.fsdecode, columns["path"]), columns["question"], strict=True)
        answers = map(json.loads, columns["result"])
        yield [(Task(*map(str, key)), answer) for key, answer in zip(keys, answers, strict=True)]
