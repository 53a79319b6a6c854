"""Load by ghz, a gRPC load generator that nobody here wrote: one process a call, all of them at once."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from _common import ROOT, Figures

from unslothd.v1 import service_pb2

SERVICE = service_pb2.DESCRIPTOR.services_by_name["UnslothService"].full_name
BUILT = ROOT / ".tools" / "bin" / "ghz"
# Beyond the time of the load: ghz waits for the calls that are under way, and writes its report.
END_SECONDS = 60.0


@dataclass(frozen=True)
class Call:
    """A call that ghz repeats.

    Args:
        rpc: Its name.
        request: As JSON has it.
        stream_seconds: A stream is closed by its caller after that many; 0 = it is read to its end.
    """

    rpc: str
    request: Mapping[str, str] = field(default_factory=dict[str, str])
    stream_seconds: float = 0.0

    @property
    def good_end(self) -> str:
        """How ghz names the end of a call that went well."""
        return "Canceled" if self.stream_seconds else "OK"


def found(given: Path | None) -> str:
    """The program: the one given, that of `make toolchain`, or the machine's."""
    path = str(given or "") or (str(BUILT) if BUILT.exists() else shutil.which("ghz"))
    if not path:
        raise SystemExit("ghz is not here: `make toolchain` builds it, --ghz names another")
    return path


def load(
    ghz: str, target: str, calls: Mapping[str, Call], seconds: float, concurrency: int, folder: Path
) -> dict[str, Figures]:
    """Repeats each of the calls, `concurrency` of it at a time, as fast as they come back; returns how they went.

    Args:
        ghz: The program.
        target: HOST:PORT of the server.
        calls: By what the figures are called.
        seconds: How long; the calls that are under way then are waited for and count.
        concurrency: Calls of each kind at a time, on one connection.
        folder: For reports.
    """
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, call in calls.items():
            command = [ghz, "--insecure", "--call", f"{SERVICE}.{call.rpc}", "-d", json.dumps(dict(call.request))]
            command += ["-z", f"{seconds:g}s", "--duration-stop", "wait", "-c", str(concurrency), "--count-errors"]
            command += ["-O", "json", "-o", str(folder / f"{name}.json"), target]
            if call.stream_seconds:
                command += ["--stream-call-duration", f"{call.stream_seconds:g}s"]
            processes[name] = subprocess.Popen(command)
        for name, process in processes.items():
            if process.wait(seconds + END_SECONDS):
                raise RuntimeError(f"ghz failed on {name}; its error is above")
        return {name: _taken_apart(folder / f"{name}.json", call) for name, call in calls.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def _taken_apart(report: Path, call: Call) -> Figures:
    told = json.loads(report.read_text())
    report.unlink()
    ends: dict[str, int] = told["statusCodeDistribution"] or {}
    percentiles = {each["percentage"]: each["latency"] / 1e6 for each in told["latencyDistribution"] or ()}
    return {
        "calls": told["count"],
        "calls_per_second": round(told["rps"], 1),
        "ms": {f"p{percent}": round(percentiles.get(percent, 0.0), 1) for percent in (50, 95, 99)},
        "ends": ends,
        "errors": told["count"] - ends.get(call.good_end, 0),
        "error_texts": told.get("errorDistribution") if told["count"] > ends.get(call.good_end, 0) else {},
    }
