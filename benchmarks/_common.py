"""What every benchmark needs: the repository's packages, the machine in words, percentiles, a table, the entry."""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
# Before everything installed: the code that stands here is what is measured. Servers and workers inherit it.
sys.path[:0] = [str(ROOT / part) for part in ("tests", "server", "clients/python")]

PACKAGES = ("grpcio", "protobuf", "unsloth", "torch", "transformers", "trl", "peft", "bitsandbytes")

Figures = dict[str, Any]


def run(
    measure: Callable[[argparse.Namespace], Figures], table: Callable[[Figures], str], parser: argparse.ArgumentParser
) -> None:
    """Is the program of one benchmark: measures, prints a table, or with --json one JSON object.

    Args:
        measure: Takes the options, returns the figures.
        table: Makes the figures readable.
        parser: The benchmark's own options.
    """
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args()
    about = machine()
    figures = measure(options)
    if options.json:
        print(json.dumps({"machine": about, "figures": figures}, indent=1))
    else:
        print(f"{machine_line(about)}\n\n{table(figures)}")


def options_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows defaults and the first line of a module's docstring."""
    return argparse.ArgumentParser(
        description=(doc or "").strip().splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def say(text: str) -> None:
    """Tells a person how far it is; the output proper stays clean."""
    print(f"… {text}", file=sys.stderr, flush=True)


def machine() -> Figures:
    """Device, cores, load and versions, as of now."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _gpu() or f"cpu ({_cpu()})",
        "cpu_count": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def machine_line(about: Figures) -> str:
    """The machine in one line."""
    return (
        f"{about['device']}, {about['cpu_count']} cores, load {about['load_average'][0]}, "
        f"Python {about['python']}, grpcio {about['versions'].get('grpcio', '?')}, {about['time']}"
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _gpu() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))
    except pynvml.NVMLError:
        return ""


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(percent / 100 * len(ordered)) - 1))]


def spread(values: Sequence[float], digits: int = 2) -> Figures:
    """Median, p95, p99 and the largest."""
    figures = {"median": statistics.median(values), "max": max(values)}
    figures |= {f"p{percent}": percentile(values, percent) for percent in (95, 99)}
    return {name: round(value, digits) for name, value in figures.items()}


def longer(ones: Sequence[float], others: Sequence[float]) -> Figures:
    """By what share the ones are longer than the others, pair by pair: the mean, and where 95 % of such means lie.

    Args:
        ones: Seconds.
        others: Seconds, as many.
    """
    ratios = [math.log(one / other) for one, other in zip(ones, others, strict=True)]
    mean = statistics.mean(ratios)
    around = 1.96 * statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.inf
    ends = {"mean": mean, "low": mean - around, "high": mean + around}
    return {name: round(math.expm1(value), 4) for name, value in ends.items()}


def longer_line(what: str, found: Figures) -> str:
    """Such a share for people."""
    low, mean, high = (100 * found[end] for end in ("low", "mean", "high"))
    return f"{what}: {mean:+.2f} % (95 %: {low:+.2f} to {high:+.2f})"


def columns(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in plain text: the first column to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(line[index]) for line in lines) for index in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def environment(**more: str) -> dict[str, str]:
    """Environment for a program of ours in another process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


def bare_arm(script: str, job: Figures, folder: Path, timeout_seconds: float) -> Figures:
    """Runs a script that does the job without a service, in a worker's environment where that matters for speed.

    Args:
        script: Its name in this folder; its last line of output is its figures, as JSON.
        job: What it is to do.
        folder: Where it runs.
        timeout_seconds: For all of it.
    """
    more = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "1000",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(HERE / script), json.dumps(job)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(**more),
        timeout=timeout_seconds,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the bare script failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
