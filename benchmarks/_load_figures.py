"""Figures of benchmarks/load.py: the steps of each period, and what the load changed."""

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from _common import Figures, columns, spread

from unslothd.v1.training_event_pb2 import TrainingEvent

SETTLE_SECONDS = 2.0  # the first of a period, which do not count
LIKE_PERCENT = 5.0  # periods alone that differ by more were not alone on the machine
WORKER_CPU = "worker_cpu_ms_a_step"
CALL_HEAD = ("round", "calls", "a second", "p50 ms", "p95", "p99", "ends")


@dataclass
class Period:
    """A stretch of time, and what CPU it took.

    Args:
        loaded: Calls came as fast as they could.
        begin: Seconds of the epoch.
        end: Seconds of the epoch.
        counted_seconds: From the begin on; calls that are still under way then are only waited for.
        cpu: Seconds of CPU time of the processes "worker" and "server".
        calls: How the calls went.
    """

    loaded: bool
    begin: float
    end: float
    counted_seconds: float
    cpu: dict[str, float]
    calls: dict[str, Figures]


def compared(events: Sequence[TrainingEvent], periods: Sequence[Period]) -> Figures:
    """The steps of the training under load beside those alone.

    Args:
        events: The log of the training.
        periods: In turn alone and under load.
    """
    at = [event.event_time.ToNanoseconds() / 1e9 for event in events if event.HasField("step")]
    steps = [_durations(at, period) for period in periods]
    by_load = {
        name: [each for each, period in zip(steps, periods, strict=True) if period.loaded == (name == "under load")]
        for name in ("alone", "under load")
    }
    draws = random.Random(0)

    def draw(name: str) -> float:
        """Periods first, then steps of these: what differs between periods counts as much as it should."""
        drawn = draws.choices(by_load[name], k=len(by_load[name]))
        return statistics.median(chain(*(draws.choices(durations, k=len(durations)) for durations in drawn)))

    ratios = sorted(100 * (draw("under load") / draw("alone") - 1) for _ in range(2000))
    medians = {name: statistics.median(chain(*each)) for name, each in by_load.items()}
    alone = [statistics.median(each) for each in by_load["alone"]]
    told = [_told(period, each, at) for period, each in zip(periods, steps, strict=True)]
    worker_cpu = {name: [each[WORKER_CPU] for each in told if each["period"] == name] for name in by_load}
    return {
        "periods": told,
        "median_step_ms": {name: round(1000 * value, 2) for name, value in medians.items()},
        "change_percent": round(100 * (medians["under load"] / medians["alone"] - 1), 2),
        "change_percent_95": [round(ratios[50], 2), round(ratios[-50], 2)],
        "worker_cpu_change_percent": round(
            100 * (statistics.mean(worker_cpu["under load"]) / statistics.mean(worker_cpu["alone"]) - 1), 2
        ),
        "alone_differ_percent": round(100 * (max(alone) / min(alone) - 1), 1),
        "errors": sum(each["errors"] for period in periods for each in period.calls.values()),
    }


def _durations(at: list[float], period: Period) -> list[float]:
    first, last = period.begin + SETTLE_SECONDS, period.begin + period.counted_seconds
    inside = [moment for moment in at if first <= moment <= last]
    return [after - before for before, after in pairwise(inside)]


def _told(period: Period, durations: list[float], at: list[float]) -> Figures:
    seconds = period.end - period.begin
    steps = sum(period.begin <= moment <= period.end for moment in at)
    return {
        "period": "under load" if period.loaded else "alone",
        "seconds": round(seconds, 1),
        "steps": len(durations),
        "step_ms": spread([1000 * each for each in durations]),
        WORKER_CPU: round(1000 * period.cpu["worker"] / steps, 2),
        "server_cpu_percent": round(100 * period.cpu["server"] / seconds, 1),
        "calls": period.calls,
    }


def table(figures: Figures) -> str:
    """For people."""
    head = ["", "seconds", "steps", "median ms", "p95", "p99", "worker's CPU ms a step", "server's CPU"]
    rows = [
        [
            each["period"],
            each["seconds"],
            each["steps"],
            *(each["step_ms"][name] for name in ("median", "p95", "p99")),
            each[WORKER_CPU],
            f"{each['server_cpu_percent']} %",
        ]
        for each in figures["periods"]
    ]
    low, high = figures["change_percent_95"]
    text = "\n\n".join([columns(head, rows), columns(CALL_HEAD, _call_rows(figures))])
    text += f"\n\nunder load, a step takes {figures['change_percent']} % more (95 %: {low} to {high}) and "
    text += f"{figures['worker_cpu_change_percent']} % more of the worker's CPU; {figures['errors']} calls failed"
    if figures["alone_differ_percent"] > LIKE_PERCENT:
        text += f"\nperiods alone differ by {figures['alone_differ_percent']} %: something else kept the machine busy, "
        text += "so the change of the step says little. Run it again on an idle one."
    return text


def _call_rows(figures: Figures) -> Iterator[list[object]]:
    loaded = [period["calls"] for period in figures["periods"] if period["calls"]]
    for number, calls in enumerate(loaded, 1):
        for name, call in calls.items():
            ends = ", ".join(f"{count} {code}" for code, count in call["ends"].items())
            yield [f"{number}: {name}", call["calls"], call["calls_per_second"], *call["ms"].values(), ends]
