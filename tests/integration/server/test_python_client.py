"""The Python client and the command line against a real server: going on, plans, files and receipts."""

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import unslothd
from doubles.fake_worker import fake_row
from support.running_server import RunningServer
from unslothd import errors
from unslothd.cli.app import app
from unslothd.v1.training_pb2 import Training


@pytest.fixture
def client(server: RunningServer) -> Iterator[unslothd.Client]:
    with unslothd.Client(server.target) as client:
        yield client


@pytest.fixture
def model(client: unslothd.Client) -> Iterator[unslothd.Model]:
    model = client.load_model("tiny")
    client.prepare(model)
    yield model
    client.unload_model(model, force=True)


def rows(**knobs: object) -> list[dict[str, object]]:
    return [json.loads(fake_row(**knobs))]


def steps(events: list[unslothd.TrainingEvent]) -> list[int]:
    return [event.step.step for event in events if event.HasField("step")]


def read_to_step(run: unslothd.TrainingRun, step: int) -> None:
    next(event for event in run if event.step.step == step)


def read_to_state(run: unslothd.TrainingRun, state: int) -> None:
    next(event for event in run if event.state_changed.state == state)


def command(server: RunningServer, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--target", server.target], catch_exceptions=False)


def test_a_run_is_paused_and_resumed_and_both_readers_see_one_log_to_its_end(client, model, gate):
    run = client.train(model, rows(steps=4, gate=str(gate)))
    gate.open(1, 2)
    read_to_step(run, 2)
    run.pause()
    read_to_state(run, Training.STATE_PAUSED)
    before = run.last_sequence
    gate.open_all()
    resumed = client.resume(run)
    assert resumed.last_sequence == before
    later = list(resumed)
    assert steps(later) == [3, 4]
    assert later[0].sequence == before + 1
    assert list(run) == later
    assert run.result() == resumed.result()


def test_a_failed_training_that_is_resumed_is_read_to_its_end_by_a_watch_from_the_beginning(client, model, tmp_path):
    data = rows(steps=4, die_at_step=3, die="out_of_memory", die_once=str(tmp_path / "died"))
    run = client.train(model, data, save_steps=2)
    with pytest.raises(errors.TrainingFailed) as failed:
        run.result()
    assert failed.value.reason == "OUT_OF_MEMORY"
    assert client.resume(run, checkpoint_step=2).result().train_loss > 0
    events = list(client.watch(run))
    kinds = [event.WhichOneof("kind") for event in events]
    assert kinds.index("failed") < kinds.index("succeeded") == len(kinds) - 1
    assert steps(events) == [1, 2, 3, 4]
    assert client.watch(run).result() == client.get_training(run).metrics


def test_a_cancelled_training_goes_on_for_the_async_client(server, client, model, gate):
    run = client.train(model, rows(steps=3, gate=str(gate)))
    gate.open(1)
    read_to_step(run, 1)
    run.cancel()
    with pytest.raises(errors.TrainingCancelled):
        run.result()
    gate.open_all()

    async def main() -> list[unslothd.TrainingEvent]:
        async with asyncio.timeout(60), unslothd.AsyncClient(server.target) as later:
            return [event async for event in await later.resume(run.training_id)]

    assert steps(asyncio.run(main())) == [2, 3]


def test_a_training_that_succeeded_is_neither_paused_nor_resumed(client, model):
    run = client.train(model, rows(steps=1))
    run.result()
    for call in (client.pause, client.resume):
        with pytest.raises(errors.FailedPrecondition) as refused:
            call(run)
        assert refused.value.reason == "TRAINING_STATE"


def test_a_plan_takes_the_rows_that_train_takes(client, model):
    plan = client.plan(model, rows() * 5, measure=True, preview_rows=2, max_steps=7)
    assert (plan.num_rows, len(plan.preview), plan.memory_measured, plan.config.max_steps) == (5, 2, True, 7)


def test_the_commands_plan_pause_resume_and_list_checkpoints(server, client, model, gate, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(fake_row(steps=3, gate=str(gate)))
    planned = command(server, "plan", "--model-id", model.model_id, "--dataset", str(data))
    assert planned.exit_code == 0, planned.output
    run = client.train(model, data)
    gate.open(1)
    read_to_step(run, 1)
    assert command(server, "pause", run.training_id).exit_code == 0
    read_to_state(run, Training.STATE_PAUSED)
    shown = json.loads(command(server, "trainings", "checkpoints", run.training_id, "--json").stdout)
    assert shown["step"] == 1
    assert f"{run.training_id} is paused" in command(server, "pause", run.training_id).stdout
    gate.open_all()
    resumed = command(server, "resume", run.training_id)
    assert resumed.exit_code == 0
    assert "goes on at step 2" in resumed.stdout
    assert "succeeded" in resumed.stdout


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_is_downloaded_byte_for_byte_and_gone_on_with(client, model, tmp_path):
    phases: list[str] = []
    artifact = client.export(model, "merged_16bit", on_progress=lambda progress: phases.append(progress.phase))
    assert "merging" in phases
    for number, source in enumerate((artifact, artifact.artifact_id)):
        client.download(source, tmp_path / f"{number}")
        assert content(tmp_path / f"{number}") == content(Path(artifact.path))
    weights = tmp_path / "0/model.safetensors"
    weights.rename(weights.with_name("model.safetensors.part"))
    os.truncate(weights.with_name("model.safetensors.part"), 1_500_000)
    seen: list[unslothd.DownloadProgress] = []
    client.download(artifact, tmp_path / "0", on_progress=seen.append)
    assert content(tmp_path / "0") == content(Path(artifact.path))
    assert [each.done for each in seen if each.name == "model.safetensors"] == [1_500_000, 2_548_576, 2_700_000]


def test_the_result_and_a_checkpoint_of_a_training_are_downloaded(client, model, tmp_path):
    run = client.train(model, rows(steps=2), save_steps=1)
    run.result()
    training = client.get_training(run)
    client.download(run, tmp_path / "final")
    client.download((run, 1), tmp_path / "one")
    assert content(tmp_path / "final") == content(Path(training.output_dir))
    assert content(tmp_path / "one") == content(Path(training.checkpoints[0].path))


def test_what_is_not_there_is_not_downloaded(client, model, tmp_path):
    artifact = client.export(model, "adapter")
    for source, names, reason in (
        ("artifact-unknown", (), "ARTIFACT_NOT_FOUND"),
        (artifact, ("none.bin",), "ARTIFACT_NOT_FOUND"),
        (("training-20200101-000000-abcdef", 0), (), "TRAINING_NOT_FOUND"),
    ):
        with pytest.raises(errors.NotFound) as missing:
            client.download(source, tmp_path / "none", names=names)
        assert missing.value.reason == reason
    assert not (tmp_path / "none").exists()


def test_the_commands_export_and_download(server, client, model, tmp_path):
    run = client.train(model, rows(steps=1))
    run.result()
    exported = command(server, "export", run.training_id, "--format", "adapter", "--json")
    assert exported.exit_code == 0, exported.output
    artifact = json.loads(exported.stdout)
    fetched = command(server, "download", artifact["artifact_id"], "--to", str(tmp_path / "here"))
    assert fetched.exit_code == 0, fetched.output
    assert content(tmp_path / "here") == content(Path(artifact["path"]))


def test_a_receipt_is_verified_on_the_server_and_after_a_download(server, client, model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(fake_row(steps=1))
    run = client.train(model, data)
    run.result()
    final = Path(client.get_training(run).output_dir)
    files = {
        name: {"num_bytes": len(each), "sha256": hashlib.sha256(each).hexdigest()}
        for name, each in content(final).items()
    }
    train = {"file": {"num_bytes": data.stat().st_size, "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}}
    receipt = {"receipt_version": 1, "training_id": run.training_id, "files": files, "datasets": {"train": train}}
    (final / "receipt.json").write_text(json.dumps(receipt))
    client.download(run, tmp_path / "here")
    for source in (run.training_id, str(tmp_path / "here")):
        verified = command(server, "receipt", "verify", source, "--data", str(data))
        assert verified.exit_code == 0, verified.output
    name = next(iter(files))
    (final / name).write_bytes(b"x" * files[name]["num_bytes"])
    assert [(each.kind, each.subject) for each in client.verify_receipt(run)] == [("content", name)]
