"""`unslothd top` against a real server: what it shows, how it ends, and that it outlives the server."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, inline, prepared_model, train
from support.running_server import RunningServer
from support.terminal import Terminal, environment
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub


@contextmanager
def held_training(stub: UnslothServiceStub, gate: StepGate, *, steps: int = 4) -> Iterator[tuple[str, str]]:
    """A training that waits in front of its third step, and one behind it, until the block ends; their ids."""
    gate.open(1, 2)
    with prepared_model(stub, "tiny") as model:
        running = train(stub, model.model_id, inline([fake_row(steps=steps, gate=str(gate))]))
        training_id = next(running).training_id
        for event in running:
            if event.step.step == 2:
                break
        waiting = next(train(stub, model.model_id, inline([fake_row(steps=1)]))).training_id
        yield training_id, waiting
        gate.open_all()


def output_of(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unslothd.cli", "top", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=CALL_SECONDS, check=False, env=environment())


def test_where_no_terminal_is_it_shows_models_trainings_devices_and_the_queue_once(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path
):
    with held_training(stub, StepGate(tmp_path / "gate")) as (running, waiting):
        done = output_of("--target", server.target)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert "models: 1  trainings: 1 begun, 1 queued  1 000 tok/s" in lines[0]
    assert done.stdout.index(running) < done.stdout.index(waiting)
    (row,) = [line for line in lines if line.startswith(running)]
    assert row.split()[1:] == ["running", "2/4", "1.0000", "1", "000", "0.2", "s"]
    assert any(line.startswith(waiting) and "queued" in line for line in lines)
    assert any(line.startswith("cpu") and "GiB of" in line for line in lines)
    assert "\x1b" not in done.stdout


def test_json_has_the_same_with_the_names_of_the_contract(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path
):
    with held_training(stub, StepGate(tmp_path / "gate")) as (running, waiting):
        shown = json.loads(output_of("--json", "--target", server.target).stdout)
    assert [each["device"] for each in shown["server"]["devices"]] == ["cpu"]
    assert [each["state"] for each in shown["models"]] == ["STATE_TRAINING"]
    by_id = {each["training_id"]: each for each in shown["trainings"]}
    assert by_id.keys() == {running, waiting}
    assert by_id[running]["latest_step"]["loss"] == 1.0
    assert "latest_step" not in by_id[waiting]


def test_a_terminal_sees_steps_as_they_happen_until_ctrl_c_which_says_nothing_more(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path
):
    gate = StepGate(tmp_path / "gate")
    command = ("top", "--interval", "0.1", "--target", server.target)
    with held_training(stub, gate) as (running, _), Terminal(*command) as terminal:
        terminal.wait_for(running)
        terminal.wait_for("2/4")
        gate.open(3)
        terminal.wait_for("3/4")
        terminal.wait_for("0.6667")
        terminal.interrupt()
        code, shown = terminal.wait()
    assert code == 130
    assert "Traceback" not in shown
    assert shown.endswith("\x1b[?25h\x1b[?1049l")  # the cursor and the screen before are back


def test_it_says_that_the_server_is_gone_and_goes_on_once_it_is_back(tmp_path: Path):
    with RunningServer(tmp_path, fake_workers=True) as server:
        command = ("top", "--interval", "0.1", "--target", server.target)
        with Terminal(*command) as terminal:
            terminal.wait_for("no training waits or runs")
            server.kill()
            terminal.wait_for("no answer since")
            with RunningServer(tmp_path, fake_workers=True, arguments=("--listen", server.target)):
                terminal.wait_for("is back since")
                terminal.interrupt()
                code, shown = terminal.wait()
    assert code == 130
    assert "Traceback" not in shown


def test_a_server_that_never_answered_ends_it(tmp_path: Path):
    with RunningServer(tmp_path, fake_workers=True) as server:
        target = server.target
    done = output_of("--target", target)
    assert done.returncode == 1
    assert target in done.stderr


@pytest.fixture(autouse=True)
def nothing_is_left(stub: UnslothServiceStub) -> Iterator[None]:
    """Each test begins with a server that holds no model."""
    yield
    wait_until(lambda: not stub.ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS).models)
