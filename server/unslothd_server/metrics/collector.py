"""Reads what the server is doing at the moment of a scrape, so that nothing else has to keep count."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from unslothd._version import __version__
from unslothd.v1.model_pb2 import Model
from unslothd.v1.server_info_pb2 import Device
from unslothd.v1.training_pb2 import Training
from unslothd_server.app.service import Service
from unslothd_server.app.training_run import TrainingRun

_ANSWER_SECONDS = 5.0
_MOVING = frozenset({Training.STATE_RUNNING, Training.STATE_PAUSING, Training.STATE_CANCELLING})


class ServiceCollector(Collector):
    """Metrics of models, trainings and devices. No label names a training or a model: those come and go.

    Args:
        service: What is asked.
        loop: Where the service lives: it is asked there, while whoever scrapes waits in a thread of its own.
    """

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        self._service = service
        self._loop = loop

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering asks nothing."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Asks the service. Raises TimeoutError when its loop does not answer."""
        return asyncio.run_coroutine_threadsafe(self._read(), self._loop).result(_ANSWER_SECONDS)

    async def _read(self) -> list[Metric]:
        runs = self._service.trainings.all()
        return [
            InfoMetricFamily("unslothd_build", "Version of the server.", {"version": __version__}),
            *_trainings(runs),
            _by_state(
                "unslothd_models", "Models by state.", Model.State, [m.model.state for m in self._service.models.all()]
            ),
            *_devices(self._service.models.devices()),
        ]


def _trainings(runs: Iterable[TrainingRun]) -> Iterator[Metric]:
    runs = list(runs)
    states = [run.training.state for run in runs]
    figures = [run.figures for run in runs]
    speed = sum(run.figures.tokens_per_second for run in runs if run.training.state in _MOVING)
    yield _by_state("unslothd_trainings", "Trainings by state, all that the home holds.", Training.State, states)
    yield GaugeMetricFamily(
        "unslothd_queue_length", "Trainings that wait for their turn.", states.count(Training.STATE_QUEUED)
    )
    yield GaugeMetricFamily("unslothd_watchers", "Streams that follow a training.", sum(r.feed.watchers for r in runs))
    yield CounterMetricFamily(
        "unslothd_optimizer_steps", "Optimizer steps done, in all trainings.", sum(each.steps for each in figures)
    )
    yield CounterMetricFamily(
        "unslothd_trained_tokens", "Tokens trained on, padding not counted.", sum(each.tokens for each in figures)
    )
    yield GaugeMetricFamily(
        "unslothd_tokens_per_second", "Speed of all running trainings together, as last logged.", speed
    )
    yield CounterMetricFamily(
        "unslothd_recoveries", "Automatic repairs of trainings.", sum(each.recoveries for each in figures)
    )
    yield GaugeMetricFamily("unslothd_event_log_bytes", "Size of all event logs.", sum(run.log_bytes() for run in runs))


def _by_state(name: str, text: str, states: type[Model.State] | type[Training.State], found: Sequence[int]) -> Metric:
    """A value for every state, 0 too: a line that comes and goes makes gaps in a graph."""
    family = GaugeMetricFamily(name, text, labels=("state",))
    counted = Counter(found)
    for state, value in states.items():
        if value:
            family.add_metric((state.removeprefix("STATE_").lower(),), counted[value])
    return family


def _devices(devices: Iterable[Device]) -> Iterator[Metric]:
    total = GaugeMetricFamily("unslothd_device_memory_bytes", "Memory of a device.", labels=("device",))
    used = GaugeMetricFamily("unslothd_device_memory_used_bytes", "Memory in use, whoever uses it.", labels=("device",))
    busy = GaugeMetricFamily(
        "unslothd_device_utilization_ratio", "Share of time it was busy, 0 to 1.", labels=("device",)
    )
    for each in devices:
        total.add_metric((each.device,), each.total_memory_bytes)
        used.add_metric((each.device,), each.total_memory_bytes - each.free_memory_bytes)
        if each.HasField("utilization"):
            busy.add_metric((each.device,), each.utilization)
    yield from (total, used, busy)
