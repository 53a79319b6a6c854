"""Real Unsloth, interrupted in every way: the losses and the adapter are those of a run that nothing happened to."""

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.calls import CALL_SECONDS, inline, load, prepare, train, watch
from support.running_server import RunningServer
from support.tiny_model import build_tiny_llama
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.model_pb2 import LoraConfig, Model
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import Training, TrainingConfig

pytestmark = pytest.mark.timeout(600)

STEPS = 8
ROWS = [
    {"text": f"The quick brown fox number {number} jumps over {'many ' * (number % 5)}lazy dogs."}
    for number in range(20)
]
CONFIG = TrainingConfig(
    max_steps=STEPS,
    warmup_steps=1,
    learning_rate=1e-2,
    batch_size=2,
    gradient_accumulation_steps=2,
    save_steps=2,
    eval_steps=3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("going-on")
    build_tiny_llama(folder / "models" / "tiny")
    return folder


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> tuple[list[float], str]:
    """Losses and adapter of a run that nothing happened to."""
    with RunningServer(folder) as server:
        stub = server.stub()
        model = fresh_model(stub)
        events = list(train(stub, model.model_id, inline(ROWS), eval_dataset=inline(ROWS[:3])))
        unload(stub, model.model_id)
    return losses(events), adapter_of(events[-1])


def fresh_model(stub: UnslothServiceStub) -> Model:
    model = load(stub, "tiny", max_seq_length=128)
    return prepare(stub, model.model_id, CONFIG, lora=LoraConfig(r=8, lora_dropout=0.1))


def unload(stub: UnslothServiceStub, model_id: str) -> None:
    stub.UnloadModel(pb.UnloadModelRequest(model_id=model_id, force=True), timeout=CALL_SECONDS)


def losses(events: list[TrainingEvent]) -> list[float]:
    """The last loss of each step: a step that was done again counts as done then."""
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    by_step = {event.step.step: event.step.loss for event in events if event.HasField("step")}
    assert sorted(by_step) == list(range(1, STEPS + 1))
    return [by_step[step] for step in sorted(by_step)]


def adapter_of(last: TrainingEvent) -> str:
    assert last.HasField("succeeded"), last
    return hashlib.sha256((Path(last.succeeded.output_dir) / "adapter_model.safetensors").read_bytes()).hexdigest()


def until_step(events: Iterator[TrainingEvent], step: int) -> str:
    return next(event.training_id for event in events if event.step.step == step)


def kill_worker(server: RunningServer) -> None:
    (worker,) = psutil.Process(server.process.pid).children()
    os.kill(worker.pid, signal.SIGKILL)


def test_pausing_restarting_and_killing_change_no_bit(folder: Path, unbroken: tuple[list[float], str]):
    with RunningServer(folder) as server:
        stub = server.stub()
        events = train(stub, fresh_model(stub).model_id, inline(ROWS), eval_dataset=inline(ROWS[:3]))
        training_id = until_step(events, 3)
        stub.PauseTraining(pb.PauseTrainingRequest(training_id=training_id), timeout=CALL_SECONDS)
        next(event for event in events if event.state_changed.state == Training.STATE_PAUSED)
    with RunningServer(folder) as server:  # another server: the training is still paused
        stub = server.stub()
        stub.ResumeTraining(pb.ResumeTrainingRequest(training_id=training_id), timeout=CALL_SECONDS)
        until_step(watch(stub, training_id), 5)
        kill_worker(server)
        events = list(watch(stub, training_id))
        assert len([event for event in events if event.HasField("recovery")]) == 1
        assert (losses(events), adapter_of(events[-1])) == unbroken
        model_id = stub.GetTraining(pb.GetTrainingRequest(training_id=training_id)).training.model_id
        unload(stub, model_id)
