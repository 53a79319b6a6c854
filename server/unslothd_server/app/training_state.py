"""The state of a training as a fold over its events: live and after a restart it is worked out the same way."""

from dataclasses import dataclass
from typing import Literal, get_args

from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2  # pyright: ignore[reportMissingTypeStubs]

from unslothd.v1.training_event_pb2 import TrainingEvent, TrainingStateChanged
from unslothd.v1.training_pb2 import Training

_Field = Literal[
    "state",
    "step",
    "total_steps",
    "last_sequence",
    "start_time",
    "end_time",
    "metrics",
    "error",
    "checkpoints",
    "queue_position",
]
_FROM_EVENTS: tuple[_Field, ...] = get_args(_Field)
FINAL_STATES = frozenset({Training.STATE_SUCCEEDED, Training.STATE_FAILED, Training.STATE_CANCELLED})


def is_final(training: Training) -> bool:
    """True when nothing more can happen to the training."""
    return training.state in FINAL_STATES


def state_name(training: Training) -> str:
    """The state for people, e.g. "running"."""
    return Training.State.Name(training.state).removeprefix("STATE_").lower()


def now() -> Timestamp:
    """The present time as the contract carries it."""
    timestamp = Timestamp()
    timestamp.GetCurrentTime()
    return timestamp


def state_changed(state: "Training.State.ValueType", queue_position: int = 0) -> TrainingEvent:
    """Returns the event of a new state or place."""
    return TrainingEvent(state_changed=TrainingStateChanged(state=state, queue_position=queue_position))


def reset(training: Training) -> None:
    """Makes a training what it was before its first event."""
    for name in _FROM_EVENTS:
        training.ClearField(name)


def apply(training: Training, event: TrainingEvent) -> None:
    """Brings a training up to date with the next event of its log."""
    training.last_sequence = event.sequence
    match event.WhichOneof("kind"):
        case "state_changed":
            _change_state(training, event)
        case "started":
            plan = event.started.plan
            training.config.CopyFrom(plan.config)
            training.total_steps = plan.total_steps
            _go_back_to(training, event.started.first_step - 1)
        case "step":
            training.step = event.step.step
            training.total_steps = event.step.total_steps
        case "checkpoint_saved":
            training.checkpoints.append(event.checkpoint_saved)
        case "recovery":
            training.state = Training.STATE_RECOVERING
            training.config.CopyFrom(event.recovery.config)
        case "succeeded":
            _end(training, event, Training.STATE_SUCCEEDED)
            training.metrics.CopyFrom(event.succeeded.metrics)
            training.output_dir = event.succeeded.output_dir
        case "failed":
            _end(training, event, Training.STATE_FAILED)
            training.error.CopyFrom(event.failed.error)
        case "cancelled":
            _end(training, event, Training.STATE_CANCELLED)
            training.step = event.cancelled.step
            training.output_dir = event.cancelled.output_dir
        case _:  # warnings, evaluations, preparations: in the log, not in the state
            pass


def _change_state(training: Training, event: TrainingEvent) -> None:
    if is_final(training):  # ResumeTraining brings it back
        training.ClearField("end_time")
        training.ClearField("error")
    training.state = event.state_changed.state
    training.queue_position = event.state_changed.queue_position
    if training.state == Training.STATE_RUNNING and not training.HasField("start_time"):
        training.start_time.CopyFrom(event.event_time)


def _go_back_to(training: Training, step: int) -> None:
    """The worker goes on after this step: what was saved later has been removed and is made again."""
    training.step = step
    kept = [each for each in training.checkpoints if each.step <= step]
    del training.checkpoints[:]
    training.checkpoints.extend(kept)


def _end(training: Training, event: TrainingEvent, state: Training.State.ValueType) -> None:
    training.state = state
    training.end_time.CopyFrom(event.event_time)


@dataclass
class Recoveries:
    """Counts repairs that did not help: it starts anew once a training gets further than it ever was.

    Args:
        without_progress: Repairs since the training last got further.
    """

    without_progress: int = 0
    _furthest_step: int = 0

    def see(self, event: TrainingEvent) -> None:
        """Takes the next event of the log."""
        kind = event.WhichOneof("kind")
        if kind == "recovery" and event.recovery.cause.code == code_pb2.ABORTED:  # of a worker, not of a pass
            self.without_progress = event.recovery.attempt
        elif kind == "step" and event.step.step > self._furthest_step:
            self._furthest_step = event.step.step
            self.without_progress = 0
