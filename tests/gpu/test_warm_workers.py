"""A spare worker on a GPU host: it holds no more of the device than a context, and its load has no import."""

import time
from pathlib import Path

import pytest

from support.calls import CALL_SECONDS
from support.gpu_models import RandomModels
from support.running_server import RunningServer
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.model_pb2 import LoadProgress

pytestmark = [pytest.mark.gpu, pytest.mark.whole_gpu, pytest.mark.timeout(600)]

IMPORT_SECONDS = 300
# Of torch, with the libraries that `import unsloth` loads into it: 727 MiB on an H100.
CONTEXT_BYTES = 1024 * 1024 * 1024


def test_a_spare_holds_no_more_than_a_context_and_its_load_has_no_import(tmp_path: Path, random_models: RandomModels):
    random_models.made()
    arguments = ("--model-root", str(random_models.root), "--warm-workers", "1")
    with RunningServer(tmp_path, arguments=arguments) as warm:
        stub = warm.stub()

        def info() -> pb.GetServerInfoResponse:
            return stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=CALL_SECONDS)

        before = info().devices[0].free_memory_bytes
        wait_until(lambda: info().warm_workers > 0, IMPORT_SECONDS)
        assert before - info().devices[0].free_memory_bytes < CONTEXT_BYTES

        request = pb.LoadModelRequest(model_name="llama-3.2-1b", max_seq_length=512)
        began = time.monotonic()
        responses = list(stub.LoadModel(request, timeout=CALL_SECONDS))
        print(f"warm LoadModel: {time.monotonic() - began:.2f} s")
        assert {response.progress.phase for response in responses[:-1]} == {LoadProgress.PHASE_LOADING_WEIGHTS}
        assert responses[-1].model.device.startswith("cuda")
