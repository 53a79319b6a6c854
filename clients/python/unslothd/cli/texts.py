"""One line of text for each thing that happens, and numbers as people read them."""

import datetime
import math

from google.protobuf.timestamp_pb2 import Timestamp

from unslothd.v1 import artifact_pb2, dataset_pb2, model_pb2, server_info_pb2, training_event_pb2, training_pb2

_KIBI = 1024
_BARS = "▁▂▃▄▅▆▇█"
_PHASES = {
    model_pb2.LoadProgress.PHASE_WAITING_FOR_MEMORY: "waiting for memory",
    model_pb2.LoadProgress.PHASE_STARTING_WORKER: "starting the worker",
    model_pb2.LoadProgress.PHASE_DOWNLOADING: "downloading",
    model_pb2.LoadProgress.PHASE_LOADING_WEIGHTS: "loading the weights",
}
_PREPARATIONS = {
    training_event_pb2.TrainingPreparing.PHASE_READING_ROWS: "reading rows",
    training_event_pb2.TrainingPreparing.PHASE_MEASURING_PASSES: "measuring passes",
}


def number(value: float) -> str:
    """Returns a whole number with its thousands apart: 4 194 304."""
    return f"{value:,.0f}".replace(",", " ")


def size(num_bytes: float) -> str:
    """Returns bytes in the unit that fits: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < _KIBI:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= _KIBI
    return f"{num_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """Returns seconds as h:mm:ss, or below a minute with a tenth: 8.5 s."""
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{seconds:.1f} s"
    return str(datetime.timedelta(seconds=round(seconds)))


def moment(time: Timestamp) -> str:
    """Returns a time on this machine's clock, or "" when it is not set."""
    if not time.seconds:
        return ""
    return time.ToDatetime(datetime.UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def sparkline(values: list[float]) -> str:
    """Returns one character a value, the lowest lowest."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in finite)


def model_state(model: model_pb2.Model) -> str:
    """Returns the state of a model: "ready"."""
    return model_pb2.Model.State.Name(model.state).removeprefix("STATE_").lower()


def training_state(state: "training_pb2.Training.State.ValueType") -> str:
    """Returns the state of a training: "running"."""
    return training_pb2.Training.State.Name(state).removeprefix("STATE_").lower()


def data_format(data_format: "dataset_pb2.DataFormat.ValueType") -> str:
    """Returns an encoding of rows: "jsonl"."""
    return dataset_pb2.DataFormat.Name(data_format).removeprefix("DATA_FORMAT_").lower()


def export_format(format: "artifact_pb2.ExportFormat.ValueType") -> str:
    """Returns a form of exported files as --format takes it: "merged_16bit"."""
    return artifact_pb2.ExportFormat.Name(format).removeprefix("EXPORT_FORMAT_").lower()


def caller(caller: server_info_pb2.Caller) -> str:
    """Whom the server takes the user for: "you are alice (token), scope train"."""
    kind = server_info_pb2.Caller.Kind.Name(caller.kind).removeprefix("KIND_").lower()
    scope = server_info_pb2.Scope.Name(caller.scope).removeprefix("SCOPE_").lower()
    return f"you are {caller.name} ({kind}), scope {scope}"


def load_progress(model_name: str, progress: model_pb2.LoadProgress) -> str:
    """Returns what a load is doing."""
    text = f"{model_name}: {_PHASES.get(progress.phase, 'loading')}"
    if progress.phase == model_pb2.LoadProgress.PHASE_WAITING_FOR_MEMORY and progress.total:
        text += f": {size(progress.total)} needed, {size(progress.done)} free"
    if progress.phase == model_pb2.LoadProgress.PHASE_DOWNLOADING and progress.done:
        text += f" {size(progress.done)}" + (f" of {size(progress.total)}" if progress.total else "")
    return text


def event(event: training_event_pb2.TrainingEvent) -> str:
    """Returns one line for an event; empty for a kind that this version does not know."""
    kind = event.WhichOneof("kind")
    return _LINES[kind](getattr(event, kind)) if kind in _LINES else ""


def _state_changed(changed: training_event_pb2.TrainingStateChanged) -> str:
    place = f", {changed.queue_position} before it" if changed.queue_position else ""
    return training_state(changed.state) + place


def _preparing(preparing: training_event_pb2.TrainingPreparing) -> str:
    text = _PREPARATIONS.get(preparing.phase, "preparing")
    return f"{text}: {number(preparing.done)} so far" if preparing.done else text


def _started(started: training_event_pb2.TrainingStarted) -> str:
    plan = started.plan
    how = f"goes on at step {started.first_step}" if started.resumed else "started"
    return (
        f"{how} on {started.device} with {started.engine}: {number(plan.num_rows)} rows, "
        f"{number(plan.num_tokens)} tokens, {number(plan.total_steps)} steps, "
        f"{number(plan.trainable_params)} trainable parameters"
        + (f"\npasses: {passes(plan.passes)}" if plan.HasField("passes") else "")
        + (f"\ncurves: tensorboard --logdir {started.tensorboard_dir}" if started.tensorboard_dir else "")
    )


def passes(choice: training_pb2.PassChoice) -> str:
    """Returns in words how tuned steps are split."""
    layout = "joined without padding" if choice.joined else "padded"
    kept = "recomputed" if choice.use_gradient_checkpointing else "kept"
    how = "as measured before" if choice.remembered else f"measured in {duration(choice.probe_seconds)}"
    return (
        f"up to {number(choice.max_tokens)} tokens, {layout}, activations {kept}: about {choice.step_seconds:.3g} s a "
        f"step, {number(choice.tokens_per_second)} tok/s ({how})"
    )


def step(step: training_event_pb2.StepProgress) -> str:
    """Returns one line for a logged step."""
    return (
        f"step {step.step}/{step.total_steps}  loss {step.loss:.4f}  grad {step.grad_norm:.3g}  "
        f"lr {step.learning_rate:.2e}  {number(step.tokens_per_second)} tok/s  {size(step.memory_bytes)}  "
        f"ETA {duration(step.eta_seconds)}"
    )


def _evaluation(evaluation: training_event_pb2.Evaluation) -> str:
    best = ", the best so far" if evaluation.best else ""
    return (
        f"evaluation at step {evaluation.step}: loss {evaluation.eval_loss:.4f}, "
        f"perplexity {evaluation.perplexity:.2f}{best}"
    )


def _checkpoint(checkpoint: training_pb2.Checkpoint) -> str:
    return f"checkpoint at step {checkpoint.step}: {checkpoint.path}"


def _warning(warning: training_event_pb2.TrainingWarning) -> str:
    return f"warning {warning.reason}: {warning.message}"


def _recovery(recovery: training_event_pb2.Recovery) -> str:
    return f"recovery, attempt {recovery.attempt}: {recovery.cause.message}; goes on after step {recovery.resume_step}"


def _succeeded(done: training_event_pb2.TrainingSucceeded) -> str:
    return f"succeeded: {metrics(done.metrics)}\nadapter on the server: {done.output_dir}"


def metrics(figures: training_pb2.TrainingMetrics) -> str:
    """Returns the final figures of a training."""
    eval_loss = f", eval loss {figures.eval_loss:.4f}" if figures.HasField("eval_loss") else ""
    return (
        f"train loss {figures.train_loss:.4f}{eval_loss}, {number(figures.train_tokens)} tokens in "
        f"{duration(figures.train_runtime)} ({number(figures.train_tokens_per_second)} tok/s), "
        f"peak memory {size(figures.peak_memory_bytes)}"
    )


def _failed(failed: training_event_pb2.TrainingFailed) -> str:
    return f"failed: {failed.error.message}"


def _cancelled(cancelled: training_event_pb2.TrainingCancelled) -> str:
    where = f"\nadapter so far: {cancelled.output_dir}" if cancelled.output_dir else ""
    return f"cancelled after step {cancelled.step}{where}"


_LINES = {
    "state_changed": _state_changed,
    "preparing": _preparing,
    "started": _started,
    "step": step,
    "evaluation": _evaluation,
    "checkpoint_saved": _checkpoint,
    "warning": _warning,
    "recovery": _recovery,
    "succeeded": _succeeded,
    "failed": _failed,
    "cancelled": _cancelled,
}
