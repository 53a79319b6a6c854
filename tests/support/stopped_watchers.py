"""A program: watchers of one training that stop reading. `python stopped_watchers.py TARGET TRAINING_ID COUNT`.

Each has a connection of its own and reads one event; then the program prints "ready" and reads nothing any more. Stop
it with SIGSTOP and not even its kernel takes part.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import grpc.aio

from unslothd.v1.service_pb2 import WatchTrainingRequest
from unslothd.v1.service_pb2_grpc import UnslothServiceStub


@contextmanager
def stopped_watchers(target: str, training_id: str, count: int) -> Iterator["subprocess.Popen[str]"]:
    """Watchers that have read one event each and then stopped; killed at the end."""
    command = [sys.executable, str(Path(__file__).resolve()), target, training_id, str(count)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the watchers failed; their error is above")
            yield process
        finally:
            process.kill()


async def main(target: str, training_id: str, count: int) -> None:
    """Reads one event a watcher, then nothing."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(target, options=options) for _ in range(count)]
    calls = [UnslothServiceStub(each).WatchTraining(WatchTrainingRequest(training_id=training_id)) for each in channels]
    await asyncio.gather(*(call.read() for call in calls))
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
