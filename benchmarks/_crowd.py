"""A scripted training on a real server, and a crowd of watchers in processes of their own."""

import json
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _common import HERE, environment

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import load, prepare
from support.running_server import RunningServer, a_model
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import Training

READY_SECONDS = 120.0
END_SECONDS = 300.0
WATCHER_PROCESSES = 3


def scripted_model(server: RunningServer, stub: UnslothServiceStub, name: str) -> str:
    """Loads and prepares a model whose worker is a double; returns its id."""
    a_model(server, name)
    return prepare(stub, load(stub, name).model_id).model_id


def scripted_training(server: RunningServer, stub: UnslothServiceStub, model_id: str, name: str, **knobs: Any) -> str:
    """Starts a training that follows the knobs of the worker double; returns its id."""
    rows = server.model_root / f"{name}.jsonl"
    rows.write_text(fake_row(**knobs))
    call = stub.Train(pb.TrainRequest(model_id=model_id, train_dataset=DatasetSource(path=rows.name)))
    training_id = next(call).event.training_id
    call.cancel()  # the training goes on
    return training_id


def closed_gate(folder: Path) -> StepGate:
    """A gate before the first step, for the knob "gate"."""
    return StepGate(folder)


def end_of(stub: UnslothServiceStub, training_id: str) -> None:
    """Returns once a training has succeeded."""
    for _ in stub.WatchTraining(pb.WatchTrainingRequest(training_id=training_id), timeout=END_SECONDS):
        pass
    training = stub.GetTraining(pb.GetTrainingRequest(training_id=training_id)).training
    if training.state != Training.STATE_SUCCEEDED:
        raise RuntimeError(f"the training ended as {Training.State.Name(training.state)}: {training.error.message}")


def shares(watchers: int) -> list[int]:
    """Watchers a process, in the order in which they attach. The first and the last are alone in their process."""
    if watchers < 3:
        return [1] * watchers
    inner = watchers - 2
    parts = [inner // WATCHER_PROCESSES + (index < inner % WATCHER_PROCESSES) for index in range(WATCHER_PROCESSES)]
    return [1, *filter(None, parts), 1]


class Watchers:
    """A process with watchers that have all seen the training start."""

    def __init__(self, target: str, training_id: str, count: int) -> None:
        self.count = count
        command = [sys.executable, str(HERE / "_watchers.py"), target, training_id, str(count)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        try:
            self._wait_ready()
        except BaseException:
            self.kill()
            raise

    def _wait_ready(self) -> None:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(READY_SECONDS):
                raise TimeoutError(f"{self.count} watchers were not ready after {READY_SECONDS} s")
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the watchers ended before the training did; their error is above")

    def result(self) -> dict[str, Any]:
        """What they saw, once the training has ended."""
        output, _ = self._process.communicate(timeout=END_SECONDS)
        if self._process.returncode:
            raise RuntimeError("the watchers failed; their error is above")
        return json.loads(output)

    def kill(self) -> None:
        """Ends the process if it still runs."""
        self._process.kill()
        self._process.wait()


@contextmanager
def crowd(target: str, training_id: str, counts: Sequence[int]) -> Iterator[list[Watchers]]:
    """Processes with these numbers of watchers, attached in turn, all of them ready."""
    processes: list[Watchers] = []
    try:
        for count in counts:
            processes.append(Watchers(target, training_id, count))
        yield processes
    finally:
        for process in processes:
            process.kill()
