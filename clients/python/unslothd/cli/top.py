"""`unslothd top`: models, trainings and devices of a server as they are now, again and again."""

import time
from typing import Annotated

import grpc
import typer
from rich.live import Live

import unslothd
from unslothd._requests import TrainingState
from unslothd.cli import options, top_view
from unslothd.cli.session import DETACHED, Output, as_dict, session
from unslothd.cli.top_view import Snapshot
from unslothd.v1.training_event_pb2 import StepProgress

_NOT_OVER: tuple[TrainingState, ...] = ("running", "recovering", "pausing", "cancelling", "queued", "paused")
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
# A training that took more steps than this since the last look is caught up with from its newest events.
_EVENTS_TO_READ = 50


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("top", epilog="Example: unslothd top --interval 5")(top)


@options.connects
def top(
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Time between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once; so it is anyway where no terminal is.")] = False,
    as_json: options.Json = False,
    *,
    server: options.Server,
) -> None:
    """Show models, trainings that are not over, and devices, live until Ctrl-C; it stays through server restarts."""
    with session(server, as_json) as (client, out):
        client.reconnect_timeout = 0.0  # the view itself says that the server is gone, and looks again
        reader = _Reader(client)
        first = reader.read()
        if as_json:
            out.json(_as_json(first))
        elif once or not out.live:
            out.console.print(top_view.shown(first))
        else:
            _keep_showing(reader, first, interval, out)


def _keep_showing(reader: "_Reader", snapshot: Snapshot, interval: float, out: Output) -> None:
    gone, note = False, ""
    try:
        with Live(top_view.shown(snapshot), console=out.console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                try:
                    snapshot = reader.read()
                    if gone:
                        gone, note = False, f"the server was gone and is back since {_clock()}"
                except unslothd.UnslothdError as error:
                    if error.code not in _GONE:
                        raise
                    if not gone:
                        gone, note = True, f"no answer since {_clock()}; what stands here is older. Trying again"
                live.update(top_view.shown(snapshot, note), refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit(DETACHED) from None


class _Reader:
    """Looks at a server, and remembers the last step of each training: a training itself does not say its loss."""

    def __init__(self, client: unslothd.Client) -> None:
        self._client = client
        self._seen: dict[str, int] = {}
        self._steps: dict[str, StepProgress] = {}

    def read(self) -> Snapshot:
        """Looks once. Raises UnslothdError."""
        info = self._client.server_info()
        models = self._client.list_models()
        trainings = self._client.list_trainings(states=_NOT_OVER)
        for training in trainings:
            if training.step:
                self._catch_up(training)
        known = {training.training_id for training in trainings}
        self._seen = {key: value for key, value in self._seen.items() if key in known}
        self._steps = {key: value for key, value in self._steps.items() if key in known}
        return Snapshot(self._client.target, info, models, trainings, dict(self._steps))

    def _catch_up(self, training: unslothd.Training) -> None:
        last = training.last_sequence
        after = max(self._seen.get(training.training_id, 0), last - _EVENTS_TO_READ)
        if after >= last:
            return
        with self._client.watch(training.training_id, after_sequence=after) as run:
            for event in run:
                if event.HasField("step"):
                    self._steps[training.training_id] = event.step
                if event.sequence >= last:
                    break
        self._seen[training.training_id] = last


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _as_json(snapshot: Snapshot) -> dict[str, object]:
    trainings = [as_dict(training) for training in snapshot.trainings]
    for training, shown in zip(snapshot.trainings, trainings, strict=True):
        if training.training_id in snapshot.steps:
            shown["latest_step"] = as_dict(snapshot.steps[training.training_id])
    return {
        "server": as_dict(snapshot.info),
        "models": [as_dict(model) for model in snapshot.models],
        "trainings": trainings,
    }
