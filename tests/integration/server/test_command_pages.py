"""The commands of README.md, docs/training.md and docs/checkpoints.md run as they stand there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, inline, prepared_model, train
from support.page_commands import cli_commands, run_command
from support.running_server import RunningServer
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import Training, TrainingConfig


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(fake_row(steps=2))


def state_of(stub: UnslothServiceStub, training_id: str) -> "Training.State.ValueType":
    request = pb.GetTrainingRequest(training_id=training_id)
    return stub.GetTraining(request, timeout=CALL_SECONDS).training.state


@contextmanager
def held(stub: UnslothServiceStub, model_id: str, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A training that has a checkpoint at step 40 and waits at step 41: its id, and what lets it go on."""
    gate = StepGate(folder)
    gate.open(*range(1, 41))
    rows = inline([fake_row(steps=41, gate=str(gate))])
    events = train(stub, model_id, rows, training_config=TrainingConfig(save_steps=40))
    try:
        training_id = next(event.training_id for event in events if event.HasField("checkpoint_saved"))
        wait_until(lambda: gate.is_reached(41))
        yield training_id, gate.open_all
    finally:
        gate.open_all()


def test_every_command_of_the_readme_runs(server: RunningServer, stub: UnslothServiceStub):
    names = {"unsloth/Llama-3.2-1B-Instruct": "tiny"}
    for command in cli_commands("README.md"):
        run_command(server, command, names)
        if command.startswith("train "):
            [newest] = stub.ListTrainings(pb.ListTrainingsRequest(page_size=1), timeout=CALL_SECONDS).trainings
            names["TRAINING_ID"] = newest.training_id
    assert Path("my-adapter", "adapter_config.json").is_file()


def test_every_command_of_the_page_about_training_runs(server: RunningServer, stub: UnslothServiceStub, tmp_path: Path):
    with (
        prepared_model(stub, "tiny") as model,
        prepared_model(stub, "tiny") as to_unload,
        held(stub, model.model_id, tmp_path / "gate") as (training_id, _),
    ):
        finished, *_ = train(stub, to_unload.model_id, inline([fake_row(steps=2)]))
        for command in cli_commands("docs/training.md"):
            names = {
                "unsloth/Llama-3.2-1B-Instruct": "tiny",
                "llama-3.2-1b-instruct-unsloth": to_unload.model_id,
                "training-20261124-054220-d50bcf": finished.training_id if "watch" in command else training_id,
            }
            run_command(server, command, names)
        wait_until(lambda: state_of(stub, training_id) == Training.STATE_CANCELLED)


def test_every_command_of_the_page_about_checkpoints_runs(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path
):
    with (
        prepared_model(stub, "tiny") as one,
        prepared_model(stub, "tiny") as other,
        held(stub, one.model_id, tmp_path / "one") as (training_id, go_on),
        held(stub, other.model_id, tmp_path / "other") as (other_id, other_goes_on),
    ):
        run_command(server, f"pause {other_id}", {})
        for command in cli_commands("docs/checkpoints.md"):
            named = other_id if "--checkpoint" in command else training_id
            run_command(server, command, {"training-20261124-054220-d50bcf": named})
            if command.startswith("pause "):
                for paused in (training_id, other_id):
                    wait_until(lambda paused=paused: state_of(stub, paused) == Training.STATE_PAUSED)
                go_on()
                other_goes_on()
        assert {state_of(stub, each) for each in (training_id, other_id)} == {Training.STATE_SUCCEEDED}
