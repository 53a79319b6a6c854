"""Planted tokens, with real Unsloth: they get to the Hub and nowhere else, whatever is done and whatever fails."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import psutil
import pytest

from support.calls import CALL_SECONDS, error_of, inline, prepare, train
from support.exports import exporting
from support.refusing_hub import OPERATORS_TOKEN, RefusingHub
from support.running_server import RunningServer
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.artifact_pb2 import TrainingCheckpoint
from unslothd.v1.dataset_pb2 import DatasetSource, HubDataset
from unslothd.v1.server_info_pb2 import Scope
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.access.tokens import TokenFile

pytestmark = pytest.mark.timeout(400)

CALLERS_TOKEN = "hf_PlantedInTheRequest0123456789"
ROWS = inline([{"text": f"The quick brown fox jumps over the lazy dog number {number}."} for number in range(8)])
IMPORT_SECONDS = 150.0


@dataclass
class Run:
    """What callers heard, and what onlookers saw of processes."""

    told: list[str] = field(default_factory=list)
    command_lines: list[str] = field(default_factory=list)
    environments: list[str] = field(default_factory=list)
    core_limits: set[tuple[int, int]] = field(default_factory=set)

    def hear(self, messages: Iterable[object]) -> list:
        heard = list(messages)
        self.told += [str(message) for message in heard]
        return heard

    def look(self, server: RunningServer) -> None:
        parent = psutil.Process(server.process.pid)
        for process in (parent, *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                self.command_lines.append(" ".join(process.cmdline()))
                self.core_limits.add(process.rlimit(psutil.RLIMIT_CORE))
                if process != parent:  # the operator put a token into the server's own
                    self.environments.append(str(process.environ()))


@pytest.fixture(scope="module")
def bearer(warm: RunningServer) -> str:
    return TokenFile(warm.home).create("planted", Scope.SCOPE_ADMIN, None)


@pytest.fixture(scope="module")
def run(warm: RunningServer, bearer: str) -> Run:
    """A load that the Hub refuses, then a model that trains, fails, is exported, beside a spare."""
    run = Run()
    with warm.channel() as channel:
        stub = UnslothServiceStub(channel)
        known = (("authorization", f"Bearer {bearer}"),)
        run.hear([stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=CALL_SECONDS, metadata=known)])
        gated = pb.LoadModelRequest(model_name="org/gated", token=CALLERS_TOKEN)
        refused = error_of(lambda: stub.LoadModel(gated, timeout=CALL_SECONDS))
        run.hear([refused])
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "HUB_ACCESS_DENIED")

        load = pb.LoadModelRequest(model_name="tiny", token=CALLERS_TOKEN, max_seq_length=64)
        model_id = run.hear(stub.LoadModel(load, timeout=CALL_SECONDS))[-1].model.model_id
        run.look(warm)
        run.hear([prepare(stub, model_id, TrainingConfig(max_steps=2, save_steps=1))])
        training_id = run.hear(train(stub, model_id, ROWS))[-1].training_id
        hub_rows = DatasetSource(hub=HubDataset(name="org/rows"))
        run.hear([error_of(lambda: train(stub, model_id, hub_rows))])
        checkpoint = TrainingCheckpoint(training_id=training_id, step=1)
        assert run.hear(exporting(stub, "ADAPTER", checkpoint=checkpoint))[-1].HasField("artifact")
        run.hear([stub.ListModels(pb.ListModelsRequest()), stub.ListTrainings(pb.ListTrainingsRequest())])
        info = pb.GetServerInfoRequest()
        wait_until(lambda: bool(stub.GetServerInfo(info, timeout=CALL_SECONDS).warm_workers), IMPORT_SECONDS)
        run.look(warm)
        stub.UnloadModel(pb.UnloadModelRequest(model_id=model_id, force=True), timeout=CALL_SECONDS)
    return run


def test_the_callers_token_gets_to_the_hub(run: Run, hub: RefusingHub):
    assert f"Bearer {CALLERS_TOKEN}" in {header for path, header in hub.asked if "org/gated" in path}


def test_no_file_holds_a_token(run: Run, warm: RunningServer, bearer: str):
    files = [path for path in warm.home.parent.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {path.name for path in files}
    assert {"server.log", "audit.jsonl", "training.json", "events.binpb", "bootstrap.binpb", "worker.log"} <= names
    assert {"trainer_state.json", "adapter_model.safetensors", "receipt.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    secrets = [secret.encode() for secret in (CALLERS_TOKEN, OPERATORS_TOKEN, bearer)]
    assert [path for path in files if any(secret in path.read_bytes() for secret in secrets)] == []


def test_no_answer_event_or_error_tells_a_token(run: Run, bearer: str):
    told = "\n".join(run.told)
    assert "succeeded" in told
    assert not any(secret in told for secret in (CALLERS_TOKEN, OPERATORS_TOKEN, bearer))


def test_no_process_shows_a_token_and_no_worker_dumps_its_memory(run: Run, bearer: str):
    seen = "\n".join(run.command_lines + run.environments)
    workers = [line for line in run.command_lines if "unslothd_server.worker" in line]
    assert any("/workers/spare-" in line for line in workers), workers
    assert run.environments
    assert not any(secret in seen for secret in (CALLERS_TOKEN, OPERATORS_TOKEN, bearer))
    assert run.core_limits == {(0, 0)}


def test_the_home_is_closed_to_other_users(run: Run, warm: RunningServer):
    lax = [path for path in warm.home.rglob("*") if not path.is_symlink() and path.lstat().st_mode & 0o077]
    assert lax == []
