"""The server of `ov_mllama.serving.app` as replicas on several machines, on Ray Serve:

    serve run ov_mllama.serving.replicas:app model_dir=models/demo_model replicas=2

Each replica loads the model; requests go to one that is free. `ray start --head` on one machine and `ray start
--address=...` on the others make them a cluster; all need the model's folder and this project at the same place.
"""

from pathlib import Path

from pydantic import BaseModel
from ray import serve


class Arguments(BaseModel):
    """Of `app`, on the command line or in a file of Ray Serve's.

    Attributes:
        model_dir: folder of a converted model, on each machine.
        replicas: how many load it.
        threads: of each; None: those of its machine.
        key: that clients must give; none if it is empty. A file of Ray Serve's tells it to fewer than the command line.
        trusted_hosts: names of the server, by which clients may reach it beside IP addresses, with blanks between.
    """

    model_dir: str
    replicas: int = 1
    threads: int | None = None
    key: str = ""
    trusted_hosts: str = ""


def build(arguments: Arguments):
    """A replica's FastAPI app, with a model of its own."""
    from ov_mllama.serving import load
    from ov_mllama.serving.app import create_app
    from ov_mllama.serving.scheduler import IMAGE_CACHE_BYTES, Scheduler

    model_dir = Path(arguments.model_dir)
    batches = Scheduler(*load(model_dir, threads=arguments.threads, image_cache_bytes=IMAGE_CACHE_BYTES))
    hosts = arguments.trusted_hosts.split()
    return create_app(batches, model_dir.resolve().name, arguments.key or None, trusted_hosts=hosts)


class Replica:
    """Answers as `ov_mllama.serving.app` does."""


def app(arguments: Arguments):
    """What `serve run` runs."""
    deployment = serve.deployment(
        num_replicas=arguments.replicas,
        max_ongoing_requests=32,  # what waits in a replica can share its steps
        max_queued_requests=64,
    )

    def built():  # Ray Serve takes a function for a builder, and a partial for the app itself
        return build(arguments)

    return deployment(serve.ingress(built)(Replica)).bind()
