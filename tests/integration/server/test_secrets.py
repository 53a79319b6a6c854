"""A token is nowhere but in the memory of who needs it; and what the server writes is for its user alone."""

import os
import resource
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from doubles.fake_worker import fake_row
from support.calls import CALL_SECONDS, error_of, inline, prepare, train
from support.running_server import RunningServer, a_model
from support.uploads import as_jsonl, upload
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.artifact_pb2 import ExportFormat, TrainingCheckpoint
from unslothd.v1.server_info_pb2 import Scope
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd_server.access.tokens import TokenFile

IN_REQUEST = "hf_PlantedInTheRequest0123456789"
IN_ENVIRONMENT = "hf_PlantedInTheEnvironment012345"
FAILURES = ("raise", "exit:7", "SIGSEGV", "out_of_memory", "sys.exit")


class Traces:
    """Everything that callers and onlookers saw of a server."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.processes: list[str] = []

    def hear(self, messages: Iterable[object]) -> list[object]:
        heard = list(messages)
        self.told.extend(str(message) for message in heard)
        return heard

    def look(self, server: RunningServer) -> None:
        """At the command lines and environments of the server's processes, as its user can."""
        family = psutil.Process(server.process.pid)
        for process in [family, *family.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                self.processes.append(" ".join(process.cmdline()))
                if process != family:
                    self.processes.append(str(process.environ()))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Started by an operator with lax file modes, core dumps on and a token in the environment."""
    before, limits = os.umask(0), resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (limits[1], limits[1]))
    try:
        environment = {"HF_TOKEN": IN_ENVIRONMENT, "HUGGING_FACE_HUB_TOKEN": IN_ENVIRONMENT}
        arguments = ("--verbose",)
        folder = tmp_path_factory.mktemp("secrets")
        with RunningServer(folder, fake_workers=True, arguments=arguments, environment=environment) as running:
            yield running
    finally:
        os.umask(before)
        resource.setrlimit(resource.RLIMIT_CORE, limits)


@pytest.fixture(scope="module")
def bearer(server: RunningServer) -> str:
    return TokenFile(server.home).create("planted", Scope.SCOPE_ADMIN, None)


@pytest.fixture(scope="module")
def traces(server: RunningServer, bearer: str) -> Traces:
    """A whole life: loads, rows, trainings, an export and a download, each also with a failure."""
    seen = Traces()
    with server.channel() as channel:
        stub = UnslothServiceStub(WithToken(channel, bearer))
        a_model(server, "tiny")
        for failure in FAILURES:
            a_model(server, f"bad-{failure.replace(':', '-')}", load=failure)
            name = f"bad-{failure.replace(':', '-')}"
            request = pb.LoadModelRequest(model_name=name, token=IN_REQUEST)
            seen.told.append(str(error_of(lambda request=request: stub.LoadModel(request, timeout=CALL_SECONDS))))
        wrong = pb.LoadModelRequest(model_name="tiny", token=IN_REQUEST, max_seq_length=1)
        seen.told.append(str(error_of(lambda: stub.LoadModel(wrong, timeout=CALL_SECONDS))))
        long = pb.LoadModelRequest(model_name="tiny", token=IN_REQUEST * 100)
        seen.told.append(str(error_of(lambda: stub.LoadModel(long, timeout=CALL_SECONDS))))
        load = pb.LoadModelRequest(model_name="tiny", token=IN_REQUEST, request_id="once")
        model_id = seen.hear(stub.LoadModel(load, timeout=CALL_SECONDS))[-1].model.model_id
        seen.hear(stub.LoadModel(load, timeout=CALL_SECONDS))
        seen.look(server)
        prepare(stub, model_id)
        dataset = upload(stub, as_jsonl([{"text": "a"}])).dataset
        seen.told.append(str(dataset))
        events = seen.hear(train(stub, model_id, inline([fake_row(steps=2)])))
        training_id = events[0].training_id
        rows = inline([fake_row(steps=2, die_at_step=1, die="raise")])
        seen.told.append(str(error_of(lambda: train(stub, model_id, rows))))
        seen.hear(stub.WatchTraining(pb.WatchTrainingRequest(training_id=training_id), timeout=CALL_SECONDS))
        checkpoint = TrainingCheckpoint(training_id=training_id)
        for form in (ExportFormat.EXPORT_FORMAT_ADAPTER, ExportFormat.EXPORT_FORMAT_MERGED_16BIT):
            export = pb.ExportModelRequest(checkpoint=checkpoint, format=form)
            artifact = seen.hear(stub.ExportModel(export, timeout=CALL_SECONDS))[-1].artifact
        download = pb.DownloadArtifactRequest(artifact_id=artifact.artifact_id, headers_only=True)
        seen.hear(stub.DownloadArtifact(download, timeout=CALL_SECONDS))
        seen.hear([stub.ListModels(pb.ListModelsRequest()), stub.ListTrainings(pb.ListTrainingsRequest())])
        seen.look(server)
    return seen


class WithToken:
    """A channel whose every call carries a bearer token."""

    def __init__(self, channel: object, token: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {token}"),)

    def __getattr__(self, kind: str) -> object:
        def method(*arguments: object, **options: object) -> object:
            call = getattr(self._channel, kind)(*arguments, **options)
            return lambda request, timeout=CALL_SECONDS: call(request, timeout=timeout, metadata=self._metadata)

        return method


def all_files(server: RunningServer) -> list[Path]:
    folder = server.home.parent
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def test_no_file_holds_a_token(server: RunningServer, traces: Traces, bearer: str):
    files = all_files(server)
    names = {path.name for path in files}
    assert {"server.log", "audit.jsonl", "training.json", "events.binpb", "bootstrap.binpb"} <= names
    assert any(path.parent.name == "logs" for path in files)
    secrets = [secret.encode() for secret in (IN_REQUEST, IN_ENVIRONMENT, bearer)]
    assert [path for path in files if any(secret in path.read_bytes() for secret in secrets)] == []


def test_no_answer_event_or_error_tells_a_token(traces: Traces, bearer: str):
    told = "\n".join(traces.told)
    assert "succeeded" in told
    assert not any(secret in told for secret in (IN_REQUEST, IN_ENVIRONMENT, bearer))


def test_no_command_line_and_no_workers_environment_holds_a_token(traces: Traces, bearer: str):
    processes = "\n".join(traces.processes)
    assert "fake_worker.py" in processes
    assert not any(secret in processes for secret in (IN_REQUEST, IN_ENVIRONMENT, bearer))


def test_neither_server_nor_workers_dump_their_memory(server: RunningServer, traces: Traces):
    family = psutil.Process(server.process.pid)
    workers = family.children(recursive=True)
    assert workers
    for process in (family, *workers):
        assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)


def test_what_is_written_under_a_lax_umask_is_for_the_servers_user_alone(server: RunningServer, traces: Traces):
    written = [path for root in (server.home, server.output_root) for path in (root, *root.rglob("*"))]
    assert len(written) > 20
    lax = {str(path): oct(stat.S_IMODE(path.lstat().st_mode)) for path in written if path.lstat().st_mode & 0o077}
    assert {path: mode for path, mode in lax.items() if not Path(path).is_symlink()} == {}
