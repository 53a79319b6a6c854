"""Real Unsloth in a real worker whose disk fills up: nothing from before is lost, and it goes on when there is room."""

import resource

import psutil
import pytest

from support.calls import CALL_SECONDS, inline, prepared_model, train, watch
from support.running_server import RunningServer
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.model_pb2 import LoraConfig
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import TrainingConfig

pytestmark = pytest.mark.timeout(600)

STEPS = 20
CONFIG = TrainingConfig(max_steps=STEPS, warmup_steps=0, gradient_accumulation_steps=1, save_steps=2)
TEXTS = [{"text": f"The quick brown fox number {number} jumps over many lazy dogs."} for number in range(8)]
# Less than an adapter of r=8 here (64 KiB), more than the log of events or of the worker.
ONLY_LOGS_FIT = 60_000


def limit_files_of_worker(server: RunningServer, num_bytes: int) -> None:
    (worker,) = psutil.Process(server.process.pid).children()
    worker.rlimit(psutil.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def steps(events: list[TrainingEvent]) -> list[int]:
    return [event.step.step for event in events if event.HasField("step")]


def test_a_training_whose_disk_fills_up_goes_on_fails_at_its_result_and_resumes(
    server: RunningServer, stub: UnslothServiceStub
):
    with prepared_model(stub, "tiny", CONFIG, lora=LoraConfig(r=8)) as model:
        events = train(stub, model.model_id, inline(TEXTS))
        training_id = next(event.training_id for event in events if event.step.step == 3)
        limit_files_of_worker(server, ONLY_LOGS_FIT)
        failed = list(watch(stub, training_id))
        assert steps(failed) == list(range(1, STEPS + 1))
        assert "CHECKPOINT_NOT_SAVED" in {event.warning.reason for event in failed}
        training = stub.GetTraining(pb.GetTrainingRequest(training_id=training_id), timeout=CALL_SECONDS).training
        assert "Free some space, then go on with ResumeTraining" in training.error.message
        last = training.checkpoints[-1].step
        assert last >= 2
        limit_files_of_worker(server, resource.RLIM_INFINITY)
        stub.ResumeTraining(pb.ResumeTrainingRequest(training_id=training_id), timeout=CALL_SECONDS)
        events = list(watch(stub, training_id))
    assert events[: len(failed)] == failed
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert steps(events[len(failed) :]) == list(range(last + 1, STEPS + 1))
    assert events[-1].HasField("succeeded")
