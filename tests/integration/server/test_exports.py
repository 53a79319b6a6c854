"""ExportModel: a real server, scripted workers, files that everybody can look at."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, error_of, inline, load, prepare, prepared_model, train
from support.exports import below, checkpoint_of, download, export, exporting, phases, train_job
from support.running_server import RunningServer, a_model
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.artifact_pb2 import ExportFormat, TrainingCheckpoint
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import Training, TrainingConfig

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}


@pytest.fixture(scope="module")
def training(server: RunningServer, stub: UnslothServiceStub) -> Training:
    return train_job(server, stub)


@pytest.fixture
def model_id(server: RunningServer, stub: UnslothServiceStub) -> Iterator[str]:
    with prepared_model(stub, "tiny") as model:
        yield model.model_id


LoadModel = Callable[[str], str]


@pytest.fixture
def loaded(stub: UnslothServiceStub) -> Iterator[LoadModel]:
    """Loads models by their folders' names, returns their ids, and unloads them at the end."""
    ids: list[str] = []

    def load_model(name: str) -> str:
        ids.append(load(stub, name).model_id)
        return ids[-1]

    yield load_model
    for each in stub.ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS).models:
        if each.model_id in ids:
            stub.UnloadModel(pb.UnloadModelRequest(model_id=each.model_id, force=True), timeout=CALL_SECONDS)


def gated_model(server: RunningServer, tmp_path: Path, **knobs: Any) -> tuple[str, Path]:
    """A model folder whose exports wait, half-written, for the file that is returned."""
    gate = tmp_path / "gate"
    name = f"gated-{tmp_path.name}"
    a_model(server, name, export_gate=str(gate), notes=str(tmp_path), **knobs)
    return name, gate


# ── a loaded model ──


def test_an_export_is_progress_then_the_artifact_whose_files_are_there(
    server: RunningServer, stub: UnslothServiceStub, model_id: str
):
    progress, artifact = phases(exporting(stub, model_id=model_id))
    assert progress[0].phase == "merging"
    assert Path(artifact.path) == server.output_root / "exports" / f"{model_id}-merged-16bit"
    assert {file.name for file in artifact.files} == below(Path(artifact.path))
    assert artifact.format == ExportFormat.EXPORT_FORMAT_MERGED_16BIT
    assert artifact.artifact_id


def test_a_second_export_gets_a_free_name(stub: UnslothServiceStub, model_id: str):
    first, second = export(stub, model_id=model_id), export(stub, model_id=model_id)
    assert second.path != first.path
    assert second.path.startswith(first.path.rstrip("0123456789"))
    assert second.artifact_id != first.artifact_id


def test_a_model_that_was_trained_here_is_exported_beside_its_results(server: RunningServer, stub: UnslothServiceStub):
    with prepared_model(stub, "tiny") as model:
        config = TrainingConfig(output_dir="beside")
        list(train(stub, model.model_id, inline([fake_row(steps=1)]), training_config=config))
        artifact = export(stub, "ADAPTER", model_id=model.model_id)
    assert Path(artifact.path) == server.output_root / "beside" / "exports" / "adapter"


def test_whoever_sees_the_end_of_a_training_can_export_at_once(stub: UnslothServiceStub, model_id: str):
    for _ in range(5):
        *_, last = train(stub, model_id, inline([fake_row(steps=1)]))
        assert last.HasField("succeeded")
        training = stub.GetTraining(pb.GetTrainingRequest(training_id=last.training_id), timeout=CALL_SECONDS).training
        artifact = export(stub, "ADAPTER", model_id=model_id)
        assert Path(artifact.path) == Path(training.output_dir).parent / "exports" / "adapter"


def test_a_chosen_folder_is_taken_once(server: RunningServer, stub: UnslothServiceStub, model_id: str):
    artifact = export(stub, model_id=model_id, output_dir="chosen/by-me")
    assert Path(artifact.path) == server.output_root / "chosen" / "by-me"
    error = error_of(lambda: exporting(stub, model_id=model_id, output_dir="chosen/by-me"))
    assert (error.code, error.reason) == ("ALREADY_EXISTS", "OUTPUT_DIR_TAKEN")


def test_a_folder_that_a_link_leads_out_of_the_output_root_is_refused(
    server: RunningServer, stub: UnslothServiceStub, model_id: str, tmp_path: Path
):
    (server.output_root / "way-out").symlink_to(tmp_path)
    error = error_of(lambda: exporting(stub, model_id=model_id, output_dir="way-out/here"))
    assert (error.code, error.reason) == ("PERMISSION_DENIED", "PATH_NOT_ALLOWED")
    assert not list(tmp_path.iterdir())


def test_an_unknown_model_is_not_found(stub: UnslothServiceStub):
    error = error_of(lambda: exporting(stub, model_id="nobody"))
    assert (error.code, error.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")


def test_forms_that_this_host_cannot_write_are_refused_and_not_promised(stub: UnslothServiceStub, model_id: str):
    formats = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=CALL_SECONDS).limits.export_formats
    assert ExportFormat.EXPORT_FORMAT_ADAPTER in formats
    assert ExportFormat.EXPORT_FORMAT_MERGED_16BIT in formats
    for name in ("MERGED_4BIT", "GGUF"):
        if ExportFormat.Value(f"EXPORT_FORMAT_{name}") not in formats:
            error = error_of(lambda: exporting(stub, name, model_id=model_id))  # noqa: B023 - called at once
            assert (error.code, error.reason) == ("FAILED_PRECONDITION", "EXPORT_UNSUPPORTED")
            assert "MERGED_16BIT" in error.message


def test_a_gguf_type_with_another_form_is_a_wrong_field(stub: UnslothServiceStub, model_id: str):
    error = error_of(lambda: exporting(stub, model_id=model_id, gguf_quantization="q8_0"))
    assert (error.code, error.fields) == ("INVALID_ARGUMENT", ["gguf_quantization"])


def test_llama_cpp_is_found_where_the_operator_says(tmp_path: Path):
    llama_cpp = tmp_path / "llama.cpp"
    llama_cpp.mkdir()
    (llama_cpp / "convert_hf_to_gguf.py").touch()
    with RunningServer(tmp_path, fake_workers=True, environment={"UNSLOTH_LLAMA_CPP_PATH": str(llama_cpp)}) as server:
        a_model(server, "tiny")
        stub = server.stub()
        model = load(stub, "tiny")
        info = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=CALL_SECONDS)
        assert ExportFormat.EXPORT_FORMAT_GGUF in info.limits.export_formats
        assert export(stub, "GGUF", model_id=model.model_id).path.endswith("-gguf-q8_0")
        unknown = error_of(lambda: exporting(stub, "GGUF", model_id=model.model_id, gguf_quantization="q9"))
        assert unknown.fields == ["gguf_quantization"]
        without = error_of(lambda: exporting(stub, "GGUF", model_id=model.model_id, gguf_quantization="q4_k_m"))
        assert without.reason == "EXPORT_UNSUPPORTED"
        assert "llama-quantize" in without.message


# ── trainings and exports of one model ──


def test_an_export_is_refused_while_a_training_runs(stub: UnslothServiceStub, model_id: str, tmp_path: Path):
    gate = StepGate(tmp_path / "gate")
    events = train(stub, model_id, inline([fake_row(steps=1, gate=str(gate))]))
    next(event for event in events if event.HasField("started"))
    error = error_of(lambda: exporting(stub, model_id=model_id))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "MODEL_BUSY")
    gate.open_all()
    assert list(events)[-1].HasField("succeeded")
    assert export(stub, model_id=model_id).files


def test_a_training_waits_for_an_export_that_runs(server: RunningServer, stub: UnslothServiceStub, tmp_path: Path):
    name, gate = gated_model(server, tmp_path)
    with prepared_model(stub, name) as model:
        responses = exporting(stub, model_id=model.model_id)
        next(responses)
        events = train(stub, model.model_id, inline([fake_row(steps=1)]))
        training_id = next(events).training_id
        training = stub.GetTraining(pb.GetTrainingRequest(training_id=training_id), timeout=CALL_SECONDS).training
        assert training.state == Training.STATE_QUEUED
        gate.touch()
        assert list(responses)[-1].HasField("artifact")
        assert list(events)[-1].HasField("succeeded")


def test_exports_of_one_model_take_turns(server: RunningServer, stub: UnslothServiceStub, tmp_path: Path):
    name, gate = gated_model(server, tmp_path)
    with prepared_model(stub, name) as model:
        first = exporting(stub, model_id=model.model_id)
        next(first)
        second = exporting(stub, "ADAPTER", model_id=model.model_id)
        assert next(second).progress.phase == "waiting"
        gate.touch()
        assert list(first)[-1].HasField("artifact")
        assert list(second)[-1].HasField("artifact")


def test_a_model_that_is_exported_is_unloaded_by_force_only_and_then_nothing_stays(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path, loaded: LoadModel
):
    name, _ = gated_model(server, tmp_path)
    model_id = loaded(name)
    responses = exporting(stub, model_id=model_id, output_dir="unloaded/export")
    next(responses)
    request = pb.UnloadModelRequest(model_id=model_id)
    busy = error_of(lambda: stub.UnloadModel(request, timeout=CALL_SECONDS))
    assert (busy.code, busy.reason) == ("FAILED_PRECONDITION", "MODEL_BUSY")
    request.force = True
    stub.UnloadModel(request, timeout=CALL_SECONDS)
    ended = error_of(lambda: responses)
    assert (ended.code, ended.reason) == ("ABORTED", "WORKER_DIED")
    assert list((server.output_root / "unloaded").iterdir()) == []


# ── callers that come and go ──


def test_an_equal_request_attaches_to_the_export_that_runs(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path, loaded: LoadModel
):
    name, gate = gated_model(server, tmp_path)
    model_id = loaded(name)
    with ThreadPoolExecutor(3) as pool:
        callers = [exporting(stub, model_id=model_id) for _ in range(3)]
        for caller in callers:
            next(caller)
        results = [pool.submit(list, caller) for caller in callers]
        gate.touch()
        artifacts = [result.result(CALL_SECONDS)[-1].artifact for result in results]
    assert len({artifact.artifact_id for artifact in artifacts}) == 1


def test_an_export_goes_on_when_its_caller_leaves(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path, loaded: LoadModel
):
    name, gate = gated_model(server, tmp_path)
    model_id = loaded(name)
    responses = exporting(stub, model_id=model_id, output_dir="left/alone")
    next(responses)
    responses.cancel()  # type: ignore[attr-defined] - a stream of grpc is a call too
    wait_until((tmp_path / "exporting").exists)
    assert not (server.output_root / "left" / "alone").exists()
    gate.touch()
    wait_until((server.output_root / "left" / "alone").exists)
    assert (server.output_root / "left" / "alone" / "model.safetensors").stat().st_size == 2_700_000


# ── what goes wrong ──


def test_the_death_of_the_worker_is_told_and_nothing_half_written_stays(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path, loaded: LoadModel
):
    name, gate = gated_model(server, tmp_path, export="SIGKILL")
    model_id = loaded(name)
    responses = exporting(stub, model_id=model_id, output_dir="died/export")
    next(responses)
    wait_until((tmp_path / "exporting").exists)
    assert below(server.output_root / "died") == {".export.partial/config.json"}
    gate.touch()
    error = error_of(lambda: responses)
    assert (error.code, error.reason) == ("ABORTED", "WORKER_DIED")
    assert list((server.output_root / "died").iterdir()) == []


def test_a_full_disk_is_told_and_nothing_stays(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path, loaded: LoadModel
):
    a_model(server, f"full-{tmp_path.name}", export="disk_full")
    model_id = loaded(f"full-{tmp_path.name}")
    error = error_of(lambda: exporting(stub, model_id=model_id, output_dir="full/export"))
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "DISK_FULL")
    assert list((server.output_root / "full").iterdir()) == []


def test_a_bug_in_the_export_leaks_nothing(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path, loaded: LoadModel
):
    a_model(server, f"bug-{tmp_path.name}", export="raise")
    model_id = loaded(f"bug-{tmp_path.name}")
    error = error_of(lambda: exporting(stub, model_id=model_id))
    assert (error.code, error.reason) == ("INTERNAL", "INTERNAL")
    assert "secret" not in error.message


# ── checkpoints ──


def test_the_adapter_of_a_checkpoint_is_its_files_without_the_trainers(
    server: RunningServer, stub: UnslothServiceStub, training: Training
):
    for step, name in ((0, "adapter"), (2, "checkpoint-2-adapter")):
        artifact = export(stub, "ADAPTER", checkpoint=checkpoint_of(training, step))
        assert Path(artifact.path) == server.output_root / "job" / "exports" / name
        assert below(Path(artifact.path)) == ADAPTER_FILES
        got = download(stub, artifact_id=artifact.artifact_id)
        assert got.contents["adapter_model.safetensors"] == bytes(range(256)) * 5000


def test_a_checkpoint_is_merged_by_a_worker_that_is_gone_afterwards(
    server: RunningServer, stub: UnslothServiceStub, training: Training
):
    before = stub.ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS).models
    children = len(psutil.Process(server.process.pid).children())
    progress, artifact = phases(exporting(stub, checkpoint=checkpoint_of(training, 2)))
    assert list(dict.fromkeys(each.phase for each in progress)) == ["starting worker", "loading weights", "merging"]
    source = json.loads((Path(artifact.path) / "config.json").read_text())["source"]
    assert source == str(server.output_root / "job" / "checkpoint-2")
    assert len(psutil.Process(server.process.pid).children()) == children
    assert stub.ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS).models == before
    assert not list((server.home / "workers").glob("export-*"))


@pytest.mark.parametrize(("knob", "reason"), [("load", "WORKER_DIED"), ("export", "WORKER_DIED")])
def test_a_worker_that_dies_over_a_checkpoint_leaves_neither_files_nor_a_process(
    server: RunningServer, stub: UnslothServiceStub, training: Training, knob: str, reason: str
):
    script = server.output_root / "job" / "checkpoint-2" / "fake.json"
    script.write_text(json.dumps({knob: "SIGKILL"}))
    try:
        error = error_of(lambda: exporting(stub, checkpoint=checkpoint_of(training, 2), output_dir="dead/export"))
    finally:
        script.unlink()
    assert (error.code, error.reason) == ("ABORTED", reason)
    assert "Export again" in error.message
    assert below(server.output_root / "dead") == set()
    assert not list((server.home / "workers").glob("export-*"))


def test_a_checkpoint_that_is_not_there_is_not_found(stub: UnslothServiceStub, training: Training):
    for step in (1, 99):
        error = error_of(lambda: exporting(stub, checkpoint=checkpoint_of(training, step)))  # noqa: B023 - called at once
        assert (error.code, error.reason) == ("NOT_FOUND", "CHECKPOINT_NOT_FOUND")
    unknown = TrainingCheckpoint(training_id="nobody")
    for call in (lambda: exporting(stub, checkpoint=unknown), lambda: download(stub, checkpoint=unknown)):
        assert error_of(call).reason == "TRAINING_NOT_FOUND"


def test_a_checkpoint_of_all_weights_has_no_adapter(server: RunningServer, stub: UnslothServiceStub):
    with prepared_model(stub, "tiny") as model:
        config = TrainingConfig(save_steps=1, output_dir="whole")
        first, *_ = train(stub, model.model_id, inline([fake_row(steps=1)]), training_config=config)
    checkpoint = TrainingCheckpoint(training_id=first.training_id, step=1)
    error = error_of(lambda: exporting(stub, "ADAPTER", checkpoint=checkpoint))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "EXPORT_UNSUPPORTED")


# ── restarts ──


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_server_that_ends_during_an_export_leaves_nothing_half_written(tmp_path: Path, how: str):
    with RunningServer(tmp_path, fake_workers=True) as server:
        a_model(server, "tiny", export_gate=str(tmp_path / "gate"), notes=str(tmp_path))
        stub = server.stub()
        model = load(stub, "tiny")
        prepare(stub, model.model_id)
        responses = exporting(stub, model_id=model.model_id, output_dir="half/export")
        next(responses)
        wait_until((tmp_path / "exporting").exists)
        getattr(server, how)()
        error = error_of(lambda: responses)
        assert error.code == "UNAVAILABLE"
    with RunningServer(tmp_path, fake_workers=True) as server:
        (tmp_path / "gate").touch()
        assert list((server.output_root / "half").iterdir()) == []
        assert list((server.home / "artifacts").iterdir()) == []
        server.stub().GetServerInfo(pb.GetServerInfoRequest(), timeout=CALL_SECONDS)
