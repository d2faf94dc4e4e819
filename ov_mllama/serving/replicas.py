"""Replicas of the server on several machines, with Ray Serve:

    serve run ov_mllama.serving.replicas:app model_dir=models/demo_model replicas=2

Each replica loads the model; requests go to a free one. `ray start --head` on one machine and `ray start --address=...`
on the others form a cluster; all need the model's folder and this project at the same path.
"""

from pathlib import Path

from pydantic import BaseModel
from ray import serve


class Arguments(BaseModel):
    """Arguments of `app`, from the command line or a config file of Ray Serve.

    Attributes:
        model_dir: folder of a converted model, on each machine.
        replicas: number of processes that load it.
        threads: of each replica; None for all of its machine.
        key: that clients must send; empty for none. All users of the machine see the command line, not config files.
        trusted_hosts: host names of the server besides localhost and IP addresses, separated by blanks.
    """

    model_dir: str
    replicas: int = 1
    threads: int | None = None
    key: str = ""
    trusted_hosts: str = ""


def build(arguments: Arguments):
    """Return the FastAPI app of a replica, with its own model."""
    from ov_mllama.serving import load
    from ov_mllama.serving.app import create_app
    from ov_mllama.serving.scheduler import IMAGE_CACHE_BYTES, Scheduler

    model_dir = Path(arguments.model_dir)
    scheduler = Scheduler(*load(model_dir, threads=arguments.threads, image_cache_bytes=IMAGE_CACHE_BYTES))
    hosts = arguments.trusted_hosts.split()
    return create_app(scheduler, model_dir.resolve().name, arguments.key or None, trusted_hosts=hosts)


class Replica:
    """Base class that Ray Serve adds the app to."""


def app(arguments: Arguments):
    """Return the application that `serve run` deploys."""
    deployment = serve.deployment(
        num_replicas=arguments.replicas,
        max_ongoing_requests=32,  # those that wait in a replica can share its steps
        max_queued_requests=64,
    )

    def build_app():  # Ray Serve calls a function, and takes a partial for the app itself
        return build(arguments)

    return deployment(serve.ingress(build_app)(Replica)).bind()
