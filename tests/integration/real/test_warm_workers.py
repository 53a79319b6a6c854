"""A load with real Unsloth on a warm worker: no import phase, and the model works as any other."""

import pytest

from support.calls import CALL_SECONDS, inline, prepare, train
from support.running_server import RunningServer
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.model_pb2 import LoadProgress
from unslothd.v1.training_pb2 import TrainingConfig

pytestmark = pytest.mark.timeout(400)

IMPORT_SECONDS = 150.0


def test_a_load_by_a_spare_has_no_import_phase_and_its_model_trains(warm: RunningServer):
    stub = warm.stub()
    info = pb.GetServerInfoRequest()
    wait_until(lambda: bool(stub.GetServerInfo(info, timeout=CALL_SECONDS).warm_workers), IMPORT_SECONDS)

    request = pb.LoadModelRequest(model_name="tiny", max_seq_length=64)
    responses = list(stub.LoadModel(request, timeout=CALL_SECONDS))

    assert {response.progress.phase for response in responses[:-1]} == {LoadProgress.PHASE_LOADING_WEIGHTS}
    model = prepare(stub, responses[-1].model.model_id, TrainingConfig(max_steps=1))
    events = list(train(stub, model.model_id, inline([{"text": "The quick brown fox."}] * 4)))
    assert events[-1].HasField("succeeded")
