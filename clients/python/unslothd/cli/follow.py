"""Shows a training as it happens, until it ends or Ctrl-C detaches."""

import signal
from collections import deque
from types import TracebackType
from typing import Protocol, Self

import typer
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

import unslothd
from unslothd.cli import texts
from unslothd.cli.session import DETACHED, FAILED, Output
from unslothd.v1.training_event_pb2 import StepProgress

_SPARK_WIDTH = 60
_STYLES = {"warning": "yellow", "recovery": "yellow", "failed": "red", "cancelled": "yellow", "succeeded": "green"}
_FINAL = {"succeeded", "failed", "cancelled"}


class _View(Protocol):
    """Shows events one by one."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def show(self, event: unslothd.TrainingEvent) -> None:
        """Shows one event."""
        ...


class _Lines:
    """A line, or with --json an object, for each event."""

    def __init__(self, out: Output) -> None:
        self._out = out

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def show(self, event: unslothd.TrainingEvent) -> None:
        if self._out.as_json:
            self._out.json(event)
        elif text := _text(event):
            self._out.line(text, _STYLES.get(event.WhichOneof("kind") or "", ""))


class _Bar:
    """A bar over the steps with the figures of the last one and the course of the loss; other events above it."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._losses: deque[float] = deque(maxlen=_SPARK_WIDTH)
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.fields[eta]}")
        )
        self._task = self._progress.add_task("", total=None, eta="")
        self._live = Live(self._progress, console=out.console, refresh_per_second=8)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, traceback)

    def show(self, event: unslothd.TrainingEvent) -> None:
        kind = event.WhichOneof("kind") or ""
        if kind in _FINAL:
            self._live.stop()  # so that the end stands below the bar
        else:
            self._live.start()  # a failed or cancelled training that was resumed
        if kind == "step":
            self._step(event.step)
        elif text := _text(event):
            self._out.line(text, _STYLES.get(kind, ""))
        if kind == "started":
            self._progress.update(self._task, total=event.started.plan.total_steps)

    def _step(self, step: StepProgress) -> None:
        self._losses.append(step.loss)
        self._progress.update(
            self._task, completed=step.step, total=step.total_steps, eta=f"ETA {texts.duration(step.eta_seconds)}"
        )
        figures = Text.assemble(
            ("loss ", "dim"),
            (f"{step.loss:.4f}", "bold"),
            ("  lr ", "dim"),
            f"{step.learning_rate:.2e}",
            ("  grad ", "dim"),
            f"{step.grad_norm:.3g}",
            ("  epoch ", "dim"),
            f"{step.epoch:.2f}",
            "  ",
            (f"{texts.number(step.tokens_per_second)}", "bold"),
            (" tok/s", "dim"),
            ("  memory ", "dim"),
            f"{texts.size(step.memory_bytes)} (peak {texts.size(step.peak_memory_bytes)})",
        )
        course = Text.assemble(("loss ", "dim"), (texts.sparkline(list(self._losses)), "cyan"))
        self._live.update(Group(self._progress, figures, course))


def _text(event: unslothd.TrainingEvent) -> str:
    """Returns the lines for an event: what happened, and what can be done where it waits for somebody."""
    text = texts.event(event)
    if event.HasField("state_changed") and event.state_changed.state == unslothd.Training.STATE_PAUSED:
        text += f"; its device memory is free. Go on: unslothd resume {event.training_id}"
    return text


def show(run: unslothd.TrainingRun, out: Output) -> unslothd.TrainingMetrics:
    """Shows the events of a training to its end and returns its final figures.

    Args:
        run: What `train`, `watch` or `resume` returned.
        out: Where to.

    Raises:
        TrainingFailed, TrainingCancelled: It ended so.
    """
    view: _View = _Bar(out) if out.live else _Lines(out)
    with view:
        for event in run:
            view.show(event)
    return run.result()


def follow(run: unslothd.TrainingRun, out: Output, *, cancels_when_left: bool = False) -> None:
    """As `show`, for a command: Ctrl-C detaches, and what the training came to is the exit code.

    Args:
        run: What `train`, `watch` or `resume` returned.
        out: Where to.
        cancels_when_left: The server cancels the training when this client goes.

    Raises:
        typer.Exit: 1 when it failed or was cancelled, 130 when Ctrl-C detached.
    """
    try:
        show(run, out)
    except KeyboardInterrupt:
        # Whatever hangs from here on, the next Ctrl-C ends the process.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        run.close()
        _say_detached(run, out, cancels_when_left)
        raise typer.Exit(DETACHED) from None
    except (unslothd.TrainingFailed, unslothd.TrainingCancelled) as error:
        # Its event has been shown; only what that did not show is left to say.
        if out.as_json:
            out.error(error)
        elif isinstance(error, unslothd.TrainingFailed):
            out.note(f"{error.code.name} {error.reason}".rstrip(), style="red")
        raise typer.Exit(FAILED) from None


def _say_detached(run: unslothd.TrainingRun, out: Output, cancels_when_left: bool) -> None:
    if cancels_when_left:
        out.note(f"Detached; the server cancels training {run.training_id}, as --on-disconnect cancel asked.")
        return
    out.note(
        f"Detached; training {run.training_id} goes on.\n"
        f"  unslothd watch {run.training_id} --after {run.last_sequence}\n"
        f"  unslothd pause {run.training_id}\n"
        f"  unslothd cancel {run.training_id}"
    )
