"""Evaluations that leave the training's numbers alone, survive a lack of memory, and end what gets no better."""

import gc
import traceback
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_event_pb2 import TrainingWarning
from unslothd_server.engine.oom import exhausted
from unslothd_server.engine.run_figures import Evaluations

Metrics = dict[str, float]


def within_memory(
    evaluate: Callable[[], Metrics], args: Any, step: int, warn: Callable[[TrainingWarning], None]
) -> Metrics:
    """Evaluates; where memory runs out, again with half the sequences a pass, which later evaluations keep.

    Args:
        evaluate: Runs one evaluation with args.per_device_eval_batch_size.
        args: The trainer's arguments.
        step: Optimizer step, for the warning.
        warn: Takes one warning when the memory did not suffice at first.

    Returns:
        The metrics; empty when not even one sequence a pass fits.
    """
    first_size = args.per_device_eval_batch_size
    while True:
        metrics = _unless_out_of_memory(evaluate)
        size = args.per_device_eval_batch_size
        if metrics is not None:
            if size != first_size:
                warn(_warning(_made_smaller(step, first_size, size)))
            return metrics
        if size == 1:
            warn(_warning(_skipped(step, first_size)))
            return {}
        args.per_device_eval_batch_size = size // 2


def _unless_out_of_memory(evaluate: Callable[[], Metrics]) -> Metrics | None:
    import torch

    try:
        return evaluate()
    except Exception as error:
        known = exhausted(error, "")
        if known is None or known.reason != ErrorReason.ERROR_REASON_OUT_OF_MEMORY:
            raise
        # The traceback's frames hold the tensors that did not fit.
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def _warning(message: str) -> TrainingWarning:
    return TrainingWarning(reason="EVAL_OUT_OF_MEMORY", message=message)


def _made_smaller(step: int, first_size: int, size: int) -> str:
    return (
        f"The evaluation after step {step} ran out of memory with {first_size} sequences a pass and was done again "
        f"with {size}, which later evaluations keep. Its figures do not depend on that; the training was not touched."
    )


def _skipped(step: int, first_size: int) -> str:
    tried = "1 sequence a pass" if first_size == 1 else f"{first_size} sequences a pass, and with fewer down to 1"
    return (
        f"The evaluation after step {step} was left out: memory ran out with {tried}. Training goes on. Give shorter "
        "eval rows, or train with use_gradient_checkpointing or a smaller batch_size, which leaves more memory free."
    )


class EarlyStopping(TrainerCallback):
    """Ends a training whose eval loss has not got lower for a number of evaluations. Skipped ones do not count.

    Transformers' own forgets its count in a checkpoint and leaves the evaluation before the first step out.

    Args:
        evaluations: Kept up to date by a callback that is called before this one.
        patience: Evaluations, at least 1.
    """

    def __init__(self, evaluations: Evaluations, patience: int) -> None:
        self._evaluations = evaluations
        self._patience = patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A training that was ended early and goes on from its last checkpoint has only to finish."""
        return self.on_evaluate(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Looks at the count; the steps since the last event are then logged."""
        if self._evaluations.without_gain >= self._patience:
            control.should_training_stop = control.should_log = True
        return control
