"""What a training has done so far, as a fold over its events: it goes on counting across restarts of the server."""

from dataclasses import dataclass

from unslothd.v1.training_event_pb2 import TrainingEvent


@dataclass
class TrainingFigures:
    """Counts work; what was done twice counts twice.

    Args:
        steps: Optimizer steps done.
        tokens: Tokens trained on, padding not counted; those of the first logged step after a resume are not known.
        recoveries: Repairs.
        tokens_per_second: Speed of the last logged step.
    """

    steps: int = 0
    tokens: int = 0
    recoveries: int = 0
    tokens_per_second: float = 0.0
    _last_step: int = 0
    _last_tokens: int = 0

    def see(self, event: TrainingEvent) -> None:
        """Takes the next event of the log."""
        match event.WhichOneof("kind"):
            case "started":
                self._last_step = event.started.first_step - 1
            case "step":
                step = event.step
                self.steps += max(0, step.step - self._last_step)
                self.tokens += max(0, step.tokens - self._last_tokens)  # a resume goes back to those of a checkpoint
                self._last_step, self._last_tokens = step.step, step.tokens
                self.tokens_per_second = step.tokens_per_second
            case "recovery":
                self.recoveries += 1
            case _:
                pass
