"""`unslothd pause`, `resume` and `trainings checkpoints`, and what a watcher sees of them."""

import json

import grpc
import pytest

from support.terminal import Terminal
from unslothd.v1 import service_pb2, training_event_pb2, training_pb2

State = training_pb2.Training
CHECKPOINTS = [
    training_pb2.Checkpoint(step=20, path="/out/checkpoint-20", eval_loss=1.5),
    training_pb2.Checkpoint(step=40, path="/out/checkpoint-40"),
]


def a_training(say, state: int = State.STATE_PAUSED, **fields: object) -> training_pb2.Training:
    return training_pb2.Training(training_id=say.TRAINING, state=state, last_sequence=6, **fields)


def changed(say, sequence: int, state: int) -> training_event_pb2.TrainingEvent:
    return say.event(sequence, state_changed=training_event_pb2.TrainingStateChanged(state=state))


def test_a_pause_says_how_to_go_on(server, say, cli):
    paused = service_pb2.PauseTrainingResponse(training=a_training(say, State.STATE_PAUSING))
    server.script.on("PauseTraining", say.answer(paused), say.answer(paused))
    shown = cli("pause", say.TRAINING)
    assert shown.stdout == f"{say.TRAINING} is pausing\n"
    assert f"unslothd resume {say.TRAINING}" in shown.stderr
    assert json.loads(cli("pause", say.TRAINING, "--json").stdout)["state"] == "STATE_PAUSING"


@pytest.fixture
def resuming(server, say):
    server.script.on("GetTraining", say.answer(service_pb2.GetTrainingResponse(training=a_training(say))))
    server.script.on("ResumeTraining", say.answer(service_pb2.ResumeTrainingResponse()))
    return server


def test_a_resumed_training_is_followed_to_its_end(resuming, say, cli):
    resuming.script.on("WatchTraining", say.events(changed(say, 7, State.STATE_QUEUED), 8, say.succeeded(9)))
    shown = cli("resume", say.TRAINING, "--checkpoint", "4")
    assert shown.exit_code == 0
    assert "queued" in shown.stdout
    assert "succeeded" in shown.stdout
    assert resuming.script.calls("ResumeTraining")[0].checkpoint_step == 4
    assert resuming.script.calls("WatchTraining")[0].after_sequence == 6


def test_a_resumed_training_that_is_not_watched_says_how_to(resuming, say, cli):
    queued = a_training(say, State.STATE_QUEUED)
    resuming.script.on("GetTraining", say.answer(service_pb2.GetTrainingResponse(training=queued)))
    shown = cli("resume", say.TRAINING, "--detach")
    assert shown.stdout == f"{say.TRAINING} is queued\n"
    assert f"unslothd watch {say.TRAINING} --after 6" in shown.stderr
    assert resuming.script.calls("WatchTraining") == []


def test_a_watcher_of_a_paused_training_is_told_how_to_go_on(server, say, cli):
    server.script.on("WatchTraining", say.events(changed(say, 1, State.STATE_PAUSED), 2, say.succeeded(3)))
    shown = cli("watch", say.TRAINING)
    assert f"paused; its device memory is free. Go on: unslothd resume {say.TRAINING}" in shown.stdout
    assert "succeeded" in shown.stdout


def test_a_bar_comes_back_when_a_failed_training_is_resumed(server, say):
    failed = say.event(2, failed=training_event_pb2.TrainingFailed(error=say.status(grpc.StatusCode.ABORTED, "X", "x")))
    server.script.on("WatchTraining", say.events(1, failed, changed(say, 3, State.STATE_QUEUED), 4, say.succeeded(5)))
    code, shown = Terminal("watch", say.TRAINING, "--target", server.target).wait()
    assert code == 0
    assert shown.index("failed") < shown.index("queued") < shown.rindex("4/5") < shown.rindex("succeeded")


def test_checkpoints_are_listed_with_the_best_one_marked(server, say, cli):
    training = a_training(say, checkpoints=CHECKPOINTS, best_checkpoint=CHECKPOINTS[0])
    server.script.on("GetTraining", *[say.answer(service_pb2.GetTrainingResponse(training=training))] * 3)
    table = cli("trainings", "checkpoints", say.TRAINING).stdout
    best, last = (line for line in table.splitlines() if "/out/checkpoint" in line)
    assert "20" in best
    assert "1.5000" in best
    assert "best" in best
    assert "best" not in last
    lines = cli("trainings", "checkpoints", say.TRAINING, "--json").stdout.splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20, 40]
    assert "checkpoint at step 20, eval loss 1.5000" in cli("trainings", "get", say.TRAINING).stdout


def test_a_training_without_checkpoints_says_where_they_come_from(server, say, cli):
    server.script.on("GetTraining", say.answer(service_pb2.GetTrainingResponse(training=a_training(say))))
    assert "--save-steps" in cli("trainings", "checkpoints", say.TRAINING).stderr
