"""The whole way through the server on a GPU, in 4 and in 16 bits: train, pause, resume, generate, export merged."""

from pathlib import Path

import pytest

from support.calls import CALL_SECONDS, inline, load, prepare, train, watch
from support.running_server import RunningServer
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.artifact_pb2 import EXPORT_FORMAT_MERGED_16BIT
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import Training, TrainingConfig

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

STEPS = 12
CONFIG = TrainingConfig(max_steps=STEPS, warmup_steps=1, learning_rate=1e-3, batch_size=2, save_steps=4)
ROWS = [
    {"text": f"The quick brown fox number {number} jumps over {'many ' * (number % 50)}lazy dogs."}
    for number in range(96)
]
GIB = 1024**3


@pytest.mark.parametrize("load_in_4bit", [True, False], ids=["4bit", "16bit"])
def test_a_model_is_trained_paused_resumed_asked_and_exported(
    server: RunningServer, stub: UnslothServiceStub, load_in_4bit: bool
):
    model = load(stub, "llama-3.2-1b", max_seq_length=256, load_in_4bit=load_in_4bit)
    assert (model.load_in_4bit, model.dtype) == (load_in_4bit, "bfloat16")
    model_id = prepare(stub, model.model_id, CONFIG).model_id

    def text(**fields: bool) -> str:
        request = pb.GenerateRequest(model_id=model_id, prompt="The quick brown", max_new_tokens=8, **fields)
        *parts, last = stub.Generate(request, timeout=CALL_SECONDS)
        assert 1 <= last.summary.completion_tokens <= 8
        return "".join(part.text for part in parts)

    events = train(stub, model_id, inline(ROWS))
    training_id = next(event.training_id for event in events if event.step.step == 5)
    stub.PauseTraining(pb.PauseTrainingRequest(training_id=training_id), timeout=CALL_SECONDS)
    assert any(event.state_changed.state == Training.STATE_PAUSED for event in events)
    assert stub.GetModel(pb.GetModelRequest(model_id=model_id)).model.state == Model.STATE_SUSPENDED

    stub.ResumeTraining(pb.ResumeTrainingRequest(training_id=training_id), timeout=CALL_SECONDS)
    events = list(watch(stub, training_id))
    assert events[-1].HasField("succeeded"), events[-1]
    steps = [event.step for event in events if event.HasField("step")]
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    assert steps[-1].loss < steps[0].loss

    assert text() == text()
    assert text() != text(without_adapter=True)

    request = pb.ExportModelRequest(model_id=model_id, format=EXPORT_FORMAT_MERGED_16BIT)
    *_, last = stub.ExportModel(request, timeout=CALL_SECONDS)
    merged = sum(file.stat().st_size for file in Path(last.artifact.path).glob("*.safetensors"))
    assert 2 * GIB < merged < 3 * GIB
    stub.UnloadModel(pb.UnloadModelRequest(model_id=model_id), timeout=CALL_SECONDS)
