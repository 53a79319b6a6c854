"""What is known of a run besides Transformers' own state, and how it survives in a checkpoint."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unslothd_server.engine.memory import PeakMemory
from unslothd_server.engine.passes import PassSplit
from unslothd_server.engine.step_clock import StepClock

STATE_NAME = "unslothd_state.json"


@dataclass
class Evaluations:
    """Losses on the eval rows, so far.

    Args:
        loss: Of the last finished evaluation; None before the first.
        step: Step of that one.
        over_step: Step of the last one that is over, finished or left out.
        best_loss: Lowest so far.
        without_gain: Evaluations since the loss last got lower.
    """

    loss: float | None = None
    step: int | None = None
    over_step: int | None = None
    best_loss: float = math.inf
    without_gain: int = 0

    def take(self, step: int, loss: float) -> bool:
        """Notes a finished evaluation. Returns True when no earlier one had a lower loss."""
        best = loss <= self.best_loss
        self.without_gain = 0 if loss < self.best_loss else self.without_gain + 1
        self.best_loss = loss if best else self.best_loss
        self.loss, self.step = loss, step
        return best

    def loss_at(self, step: int) -> float | None:
        """The loss after a step; None when none was measured there."""
        return self.loss if self.step == step else None


@dataclass
class LogInterval:
    """Where the interval of the next step event begins, and what it has summed up.

    Args:
        step: Last logged step.
        tokens: Tokens seen until then.
        seconds: Seconds trained until then.
        loss_sum: Of the steps since then.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0


@dataclass
class RunFigures:
    """Everything that events and decisions are made of.

    Args:
        clock: Seconds spent in steps.
        memory: Peak so far.
        evaluations: Losses on the eval rows.
        interval: Of the next step event.
        saved_step: Step of the last whole checkpoint; of the one it went on from, before the first.
        split: How passes are cut because of a lack of memory.
    """

    clock: StepClock
    memory: PeakMemory
    evaluations: Evaluations = field(default_factory=Evaluations)
    interval: LogInterval = field(default_factory=LogInterval)
    saved_step: int | None = None
    split: PassSplit = field(default_factory=PassSplit)

    def write(self, checkpoint: Path) -> None:
        """Puts what a resume needs into a checkpoint's folder."""
        state = {
            "seconds": self.clock.elapsed(),
            "evaluations": vars(self.evaluations),
            "interval": vars(self.interval),
            "split": vars(self.split),
        }
        (checkpoint / STATE_NAME).write_text(json.dumps(state, indent=1), encoding="utf-8")

    def restore(self, checkpoint: Path, step: int) -> None:
        """Takes over what `write` put there.

        Args:
            checkpoint: A whole checkpoint.
            step: Its optimizer step.
        """
        state: dict[str, Any] = json.loads((checkpoint / STATE_NAME).read_bytes())
        self.clock.go_on_from(state["seconds"])
        self.evaluations = Evaluations(**state["evaluations"])
        self.interval = LogInterval(**state["interval"])
        self.split = PassSplit(**state.get("split", {}))  # the first checkpoints had none
        self.saved_step = step
