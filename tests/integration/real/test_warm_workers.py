"""A second load with real Unsloth on a warm worker: no import phase, and the model works as any other."""

from collections.abc import Iterator

import pytest

from support.calls import CALL_SECONDS, inline, load, prepare, train
from support.running_server import RunningServer
from support.tiny_model import build_tiny_llama
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.model_pb2 import LoadProgress
from unslothd.v1.training_pb2 import TrainingConfig

pytestmark = pytest.mark.timeout(400)

IMPORT_SECONDS = 150.0


@pytest.fixture
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("warm"), arguments=("--warm-workers", "1")) as running:
        build_tiny_llama(running.model_root / "tiny")
        yield running


def test_a_second_load_has_no_import_phase_and_its_model_trains(warm: RunningServer):
    stub = warm.stub()
    load(stub, "tiny", max_seq_length=64)  # by the spare that imports since the start
    info = pb.GetServerInfoRequest()
    wait_until(lambda: bool(stub.GetServerInfo(info, timeout=CALL_SECONDS).warm_workers), IMPORT_SECONDS)

    request = pb.LoadModelRequest(model_name="tiny", max_seq_length=64)
    responses = list(stub.LoadModel(request, timeout=CALL_SECONDS))

    assert {response.progress.phase for response in responses[:-1]} == {LoadProgress.PHASE_LOADING_WEIGHTS}
    model = prepare(stub, responses[-1].model.model_id, TrainingConfig(max_steps=1))
    events = list(train(stub, model.model_id, inline([{"text": "The quick brown fox."}] * 4)))
    assert events[-1].HasField("succeeded")
