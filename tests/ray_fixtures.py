"""A local Ray in a process of its own, with an application whose model is fake: `python -m tests.ray_fixtures`.

Arguments are a folder and a port of 127.0.0.1. Each line on stdin is a deployment: its options and its settings, as a
JSON list; when it runs, a line is answered.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from gram_core.types import Answer, Plan
from server.fake import FakeClassifier, FakeClassSet, FakePrepared
from server.ray_app import Options, application, replica_app

RUN_S = 0.05  # of each run of the model


class Slow(FakeClassifier):
    """Answers like the fake, after a while."""

    def classify(self, images: Sequence[FakePrepared], classes: FakeClassSet, plan: Plan, **options: Any) -> Answer:
        time.sleep(RUN_S)
        return super().classify(images, classes, plan, **options)


def build(options: Options, pids: Path, settings: dict[str, str]) -> serve.Application:
    """As `server.ray_app.build`; each replica leaves a file named by its process in `pids`."""

    def make() -> FastAPI:
        os.environ.update(settings)
        (pids / str(os.getpid())).touch()
        return replica_app(load=Slow)

    return application(make, options)


def main(folder: Path, port: int) -> None:
    """Until stdin ends."""
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _temp_dir=str(folder),
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    for line in sys.stdin:
        options, settings = json.loads(line)
        serve.run(build(Options(**options), folder / "pids", settings), name="gram", route_prefix="/")
        os.write(1, b"deployed\n")
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
