"""Is it training? Signs that nothing is learnt, told as warnings."""

import math
from typing import Any

from unslothd.v1.training_event_pb2 import StepProgress, TrainingWarning

# Logged steps without a finite figure until it is said that this will not mend itself.
LASTING_STEPS = 20


class StepWatch:
    """Looks at every logged step: figures that are not finite, gradients that are zero."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._not_finite = 0

    def look(self, progress: StepProgress) -> list[TrainingWarning]:
        """The warnings that a step deserves; each is given once in a run."""
        if not (math.isfinite(progress.loss) and math.isfinite(progress.grad_norm)):
            self._not_finite += 1
            return self._once("NOT_FINITE", _not_finite(progress)) + self._lasting(progress)
        self._not_finite = 0
        if progress.grad_norm == 0.0:
            return self._once("ZERO_GRADIENTS", _zero_gradients(progress))
        return []

    def _lasting(self, progress: StepProgress) -> list[TrainingWarning]:
        if self._not_finite < LASTING_STEPS:
            return []
        text = (
            f"Step {progress.step}: no loss and grad_norm of the last {LASTING_STEPS} logged steps were both finite. "
            "The weights are spoilt and will not recover: cancel, and go on from a checkpoint before step "
            f"{progress.step} or train anew with a lower learning_rate or another precision."
        )
        return self._once("NOT_FINITE", text, key="lasting")

    def _once(self, reason: str, message: str, *, key: str = "") -> list[TrainingWarning]:
        if reason + key in self._told:
            return []
        self._told.add(reason + key)
        return [TrainingWarning(reason=reason, message=message)]


def _not_finite(progress: StepProgress) -> str:
    return (
        f"Step {progress.step}: loss {progress.loss} and grad_norm {progress.grad_norm} are not both finite, so the "
        "weights may be spoilt. Cancel, and train with a lower learning_rate or another precision."
    )


def _zero_gradients(progress: StepProgress) -> str:
    return (
        f"Step {progress.step}: the gradients are zero, so nothing was learnt. Look at the preview in the started "
        "event: do the right tokens carry loss?"
    )


def learning_rate_warnings(trainer: Any) -> list[TrainingWarning]:
    """A warning when the schedule gives a rate of zero at every step that will run.

    Args:
        trainer: From on_train_begin on.
    """
    state = trainer.state
    schedule = getattr(trainer.lr_scheduler, "lr_lambdas", None)
    if schedule is None or state.global_step >= state.max_steps:
        return []
    # The first rate above zero ends the search, so this is short unless there is none.
    if any(rate(step) > 0 for step in range(state.global_step, state.max_steps) for rate in schedule):
        return []
    text = (
        f"The learning rate is 0 at every step up to {state.max_steps}, so nothing will be learnt: it rises from 0 "
        f"over warmup_steps = {trainer.args.get_warmup_steps(state.max_steps)}. Use fewer warmup_steps or more steps."
    )
    return [TrainingWarning(reason="LEARNING_RATE_ZERO", message=text)]


def weights_checksum(model: Any) -> dict[str, int]:
    """A number for each trainable tensor that changes when any of its bits do, computed where the tensor is."""
    import torch

    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {
        name: parameter.detach().contiguous().view(kinds[parameter.element_size()]).sum(dtype=torch.int64)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    # One wait for the device instead of one for each tensor.
    values = torch.stack(list(sums.values())).tolist() if sums else []
    return dict(zip(sums, values, strict=True))


def unchanged_warnings(before: dict[str, int], model: Any, steps: int) -> list[TrainingWarning]:
    """A warning when no trainable weight is another than before the first step.

    Args:
        before: By `weights_checksum`.
        model: After the last step.
        steps: That were run in between.
    """
    if not steps or weights_checksum(model) != before:
        return []
    text = (
        f"After {steps} steps every trainable weight is bit for bit what it was before: the updates were zero, or too "
        "small for the precision of the weights. Train with a higher learning_rate, or keep the weights in float32."
    )
    return [TrainingWarning(reason="ADAPTER_UNCHANGED", message=text)]
