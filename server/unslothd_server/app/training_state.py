"""The state of a training as a fold over its events: live and after a restart it is worked out the same way."""

from google.protobuf.timestamp_pb2 import Timestamp

from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import Training

FINAL_STATES = frozenset({Training.STATE_SUCCEEDED, Training.STATE_FAILED, Training.STATE_CANCELLED})


def is_final(training: Training) -> bool:
    """True when nothing more can happen to the training."""
    return training.state in FINAL_STATES


def now() -> Timestamp:
    """The present time as the contract carries it."""
    timestamp = Timestamp()
    timestamp.GetCurrentTime()
    return timestamp


def apply(training: Training, event: TrainingEvent) -> None:
    """Brings a training up to date with the next event of its log."""
    training.last_sequence = event.sequence
    match event.WhichOneof("kind"):
        case "state_changed":
            training.state = event.state_changed.state
            if training.state == Training.STATE_RUNNING and not training.HasField("start_time"):
                training.start_time.CopyFrom(event.event_time)
        case "started":
            plan = event.started.plan
            training.config.CopyFrom(plan.config)
            training.total_steps = plan.total_steps
        case "step":
            training.step = event.step.step
            training.total_steps = event.step.total_steps
        case "checkpoint_saved":
            training.checkpoints.append(event.checkpoint_saved)
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
        case _:  # warnings, evaluations, recoveries: in the log, not in the state
            pass


def _end(training: Training, event: TrainingEvent, state: Training.State.ValueType) -> None:
    training.state = state
    training.end_time.CopyFrom(event.event_time)
