"""What is installed against what is asked for, by metadata; and whether it can be imported, in another process."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from unslothd._version import __version__
from unslothd_server.checks.finding import Finding, ok, problem
from unslothd_server.workers.environment import worker_environment

_SELF_TEST = (sys.executable, "-m", "unslothd_server.engine.self_test")


def pin_findings(requirements: list[str] | None = None) -> Iterator[Finding]:
    """Compares the installed packages with what the server asks for. Nothing is imported.

    Args:
        requirements: Default: those of `unslothd[server]`.
    """
    asked = [Requirement(text) for text in requirements or metadata.requires("unslothd") or []]
    wanted = [each for each in asked if each.marker is None or each.marker.evaluate({"extra": "server"})]
    wrong = [finding for each in wanted if (finding := _mismatch(each))]
    yield from wrong
    if not wrong:
        yield ok("packages", f"unslothd {__version__} and the {len(wanted)} packages that it asks for fit")


def _mismatch(wanted: Requirement) -> Finding | None:
    mend = f"pip install '{wanted.name}{wanted.specifier}'"
    try:
        installed = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return problem("packages", f"{wanted.name} is not installed", mend)
    if wanted.specifier.contains(installed, prereleases=True):
        return None
    return problem("packages", f"{wanted.name} {installed} is not {wanted.specifier}", mend)


def engine_findings(gpus: int, timeout_seconds: float, command: tuple[str, ...] = _SELF_TEST) -> Iterator[Finding]:
    """Imports Unsloth in a process of its own, as a worker does, and compares what torch sees with what is there.

    Args:
        gpus: How many NVML tells.
        timeout_seconds: Bound of the import; it takes 10 to 45 seconds.
        command: What imports and tells; tests give another.
    """
    with tempfile.TemporaryDirectory(prefix="unslothd-doctor-") as folder:  # Unsloth leaves a cache where it runs
        try:
            done = subprocess.run(  # noqa: S603 - ours
                command,
                cwd=folder,
                env={**worker_environment(os.environ), "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            mend = "Give it longer with --timeout; look at the load of host and disk, or skip it with --quick."
            yield problem("engine", f"`import unsloth` took longer than {timeout_seconds:g} s", mend)
            return
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no word"]
        mend = f"Run it yourself for the whole story: {' '.join(command)}. Often an install of all packages anew helps."
        yield problem("engine", f"`import unsloth` fails: {last[0]}", mend)
        return
    yield from _engine(json.loads(done.stdout.strip().splitlines()[-1]), gpus)


def _engine(told: dict[str, Any], gpus: int) -> Iterator[Finding]:
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items() if version)
    yield ok("engine", f"imported in {told['seconds']:.0f} s: {versions}")
    if gpus and told["gpus"] < gpus:
        mend = "Install a torch for a CUDA that the driver supports, or a newer driver (the CUDA versions are above)."
        yield problem("torch", f"sees {told['gpus']} of {gpus} GPUs; it was built for CUDA {told['cuda']}", mend)
    elif gpus:
        yield ok("torch", f"built for CUDA {told['cuda']}, sees all {gpus} GPUs")
