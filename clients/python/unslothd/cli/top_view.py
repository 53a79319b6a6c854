"""What `unslothd top` shows of one look at a server."""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

import unslothd
from unslothd.cli import texts
from unslothd.v1.server_info_pb2 import Device
from unslothd.v1.service_pb2 import GetServerInfoResponse
from unslothd.v1.training_event_pb2 import StepProgress


@dataclass(frozen=True)
class Snapshot:
    """A server as it was at one moment.

    Args:
        target: HOST:PORT.
        info: Versions, devices.
        models: All models.
        trainings: Those that are not over, newest first.
        steps: Training id → its last logged step; missing before the first.
    """

    target: str
    info: GetServerInfoResponse
    models: list[unslothd.Model]
    trainings: list[unslothd.Training]
    steps: dict[str, StepProgress]


def shown(snapshot: Snapshot, note: str = "") -> RenderableType:
    """Returns a page for a terminal of 80 columns or more; the note stands in its second line."""
    queued = sum(each.state == unslothd.Training.STATE_QUEUED for each in snapshot.trainings)
    steps = [_step_now(snapshot, each) for each in snapshot.trainings]
    speed = sum(step.tokens_per_second for step in steps if step is not None)
    head = Text.assemble(
        (f"unslothd {snapshot.info.server_version}", "bold"),
        f" at {snapshot.target}  models: {len(snapshot.models)}  trainings: {len(snapshot.trainings) - queued} begun, "
        f"{queued} queued  {texts.number(speed)} tok/s",
    )
    parts: list[RenderableType] = [head, Text(note, style="yellow"), _devices(snapshot.info.devices)]
    parts.append(_models(snapshot.models) if snapshot.models else Text("no model is loaded", style="dim"))
    parts.append(_trainings(snapshot) if snapshot.trainings else Text("no training waits or runs", style="dim"))
    return Group(*parts)


def _table(*heads: str) -> Table:
    table = Table(*(Column(head, no_wrap=True) for head in heads), box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    return table


def _devices(devices: Iterable[Device]) -> Table:
    table = _table("device", "name", "memory in use", "", "busy")
    for each in devices:
        used = each.total_memory_bytes - each.free_memory_bytes
        share = used / each.total_memory_bytes if each.total_memory_bytes else 0.0
        busy = f"{each.utilization:.0%}" if each.HasField("utilization") else ""
        memory = f"{texts.size(used)} of {texts.size(each.total_memory_bytes)}"
        table.add_row(each.device, escape(each.name), memory, f"{share:.0%}", busy)
    return table


def _models(models: list[unslothd.Model]) -> Table:
    table = _table("model", "state", "device", "memory")
    for model in models:
        table.add_row(escape(model.model_id), texts.model_state(model), model.device, texts.size(model.memory_bytes))
    return table


def _trainings(snapshot: Snapshot) -> Table:
    """Two lines a training, so that on 80 columns ids and numbers stay whole."""
    table = _table("training\nmodel", "state", "step", "loss", "tok/s", "ETA")
    for training in sorted(snapshot.trainings, key=_place):
        step = snapshot.steps.get(training.training_id)
        now = _step_now(snapshot, training)
        table.add_row(
            f"{escape(training.training_id)}\n[dim]{escape(training.model_id)}[/]",
            _state(training),
            f"{training.step}/{training.total_steps}" if training.total_steps else "",
            f"{step.loss:.4f}" if step is not None else "",
            texts.number(now.tokens_per_second) if now is not None else "",
            texts.duration(now.eta_seconds) if now is not None else "",
        )
    return table


def _step_now(snapshot: Snapshot, training: unslothd.Training) -> StepProgress | None:
    """The last step of a training that moves: its speed is that of now."""
    running = training.state == unslothd.Training.STATE_RUNNING
    return snapshot.steps.get(training.training_id) if running else None


def _place(training: unslothd.Training) -> tuple[bool, int]:
    """Those that have begun come first, then the queue in its order."""
    return training.state == unslothd.Training.STATE_QUEUED, training.queue_position


def _state(training: unslothd.Training) -> str:
    state = texts.training_state(training.state)
    if training.state == unslothd.Training.STATE_QUEUED and training.queue_position:
        return f"{state}\n[dim]{training.queue_position} before it[/]"
    return state
