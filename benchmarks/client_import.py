"""Time of `import unslothd` in fresh interpreters, beside `import grpc` alone, and the size of the base install.

It is measured where a user has it: an environment with the wheel and what the wheel asks for, nothing else.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import ROOT, Figures, columns, options_parser, run, say, spread

INSTALL_SECONDS = 300
STATEMENTS = ("import grpc", "import unslothd", "from unslothd import Client")
GOAL_SECONDS = 0.4
GOAL_MB = 60.0


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--repeat", type=int, default=15, help="interpreters a statement, taken in turn")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Installs, then imports again and again."""
    with tempfile.TemporaryDirectory() as folder:
        say("client import: building the wheel and installing it")
        environment = _install(Path(folder))
        (packages,) = environment.glob("lib/python*/site-packages")
        size = sum(path.lstat().st_size for path in packages.rglob("*") if path.is_file())
        say(f"client import: {options.repeat} interpreters a statement")
        seconds: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
        for _ in range(options.repeat + 1):
            for statement, found in seconds.items():
                found.append(_import_seconds(environment, statement))
    return {
        "installed_mb": round(size / 1e6, 1),
        "goal_mb": GOAL_MB,
        "goal_seconds": GOAL_SECONDS,
        # The first of each fills the page cache.
        "seconds": {
            statement: spread(found[1:], 3) | {"min": round(min(found[1:]), 3)} for statement, found in seconds.items()
        },
        "first_seconds": {statement: round(found[0], 3) for statement, found in seconds.items()},
        "client_over_grpc_seconds": round(
            statistics.median(seconds["from unslothd import Client"][1:])
            - statistics.median(seconds["import grpc"][1:]),
            3,
        ),
    }


def _install(folder: Path) -> Path:
    """A new environment with the base install."""
    environment = folder / "venv"
    _uv("build", "--wheel", "--out-dir", folder, ROOT)
    _uv("venv", "--python", sys.executable, environment)
    (wheel,) = folder.glob("*.whl")
    _uv("pip", "install", "--python", environment / "bin" / "python", "--compile-bytecode", wheel)
    return environment


def _uv(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "uv", *map(str, arguments), "--quiet"]
    subprocess.run(command, check=True, timeout=INSTALL_SECONDS)


def _import_seconds(environment: Path, statement: str) -> float:
    code = f"import time; begin = time.perf_counter(); {statement}; print(time.perf_counter() - begin)"
    command = [str(environment / "bin" / "python"), "-I", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, cwd=environment)
    return float(done.stdout)


def table(figures: Figures) -> str:
    """For people."""
    rows = [[statement, s["median"], s["min"], s["p95"]] for statement, s in figures["seconds"].items()]
    return (
        f"Client: base install {figures['installed_mb']} MB (goal: below {figures['goal_mb']:.0f} MB); "
        f"import (goal: below {figures['goal_seconds']} s)\n" + columns(["", "median s", "min", "p95"], rows)
    )


if __name__ == "__main__":
    run(measure, table, parser())
