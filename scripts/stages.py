"""Runs the checks one after the other: a headline and its seconds where all is well, the whole output where not.

`stages.py lint` runs what only reads; `stages.py test` runs everything. All stages run, whatever fails before; the
last line is the count of all tests.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
PYTHON = str(BIN / "python")
BUF = str(ROOT / ".venv-generate" / "bin" / "buf")
# Longer than any stage takes on two slow cores: a hang must end, and say where.
LIMIT_SECONDS = 900
COUNTS = {
    "passed": (r"(\d+) passed", r"^# pass (\d+)$", r"^--- (PASS)"),
    "failed": (r"(\d+) (?:failed|errors?)\b", r"^# fail (\d+)$", r"^--- (FAIL)"),
}


def main() -> int:
    """Runs the stages of one kind."""
    stages = lint() | (test() if sys.argv[1] == "test" else {})
    totals = dict.fromkeys(COUNTS, 0)
    bad = []
    started = time.monotonic()
    for name, (command, cwd) in stages.items():
        ok, output = run(name, command, cwd)
        if not ok:
            bad.append(name)
        if name.startswith("test "):
            for outcome, patterns in COUNTS.items():
                totals[outcome] += count(output, patterns)
    print(f"{len(stages)} stages in {time.monotonic() - started:.0f} s")
    if bad:
        print(f"failed: {', '.join(bad)} (the output is above, at each)")
    if sys.argv[1] == "test":
        print(f"{totals['passed']} passed, {totals['failed']} failed")
    return 1 if bad else 0


def lint() -> dict[str, tuple[list[str], Path]]:
    """Stages that only read: name → command and folder."""
    return {
        "ruff check": ([str(BIN / "ruff"), "check", "--quiet"], ROOT),
        "ruff format": ([str(BIN / "ruff"), "format", "--check", "--quiet"], ROOT),
        "pyright": ([str(BIN / "pyright")], ROOT),
        "imports": ([str(BIN / "lint-imports"), "--no-cache"], ROOT),
        "protos: style": ([BUF, "lint"], ROOT),
        "protos: compatible": ([PYTHON, "scripts/compatible.py"], ROOT),
        "go vet": (["go", "vet", "./..."], ROOT / "clients" / "go"),
        "stubs up to date": ([str(ROOT / ".venv-generate/bin/python"), "scripts/generate.py", "--check"], ROOT),
    }


def test() -> dict[str, tuple[list[str], Path]]:
    """Stages that run code: name → command and folder. Names start with "test", their outcomes are counted."""
    pytest = [PYTHON, "-m", "pytest"]
    by_file = [*pytest, "-n", "2", "--dist", "loadfile"]
    typescript = ROOT / "clients" / "typescript"
    # Real servers with scripted workers: they wait more than they compute.
    scripted = [f"tests/integration/{name}" for name in ("server", "worker", "mcp", "test_demo_pieces.py")]
    scripted.append("tests/fuzz")
    return {
        "test go": (["go", "test", "-v", "./..."], ROOT / "clients" / "go"),
        "test typescript": (["npm", "test", "--silent"], typescript),
        "test unit": ([*by_file, "tests/unit"], ROOT),
        "test server": ([*pytest, "-n", "3", "--dist", "loadfile", *scripted], ROOT),
        "test engine": ([*by_file, "tests/integration/engine"], ROOT),
        "test real": ([*by_file, "tests/integration/real"], ROOT),
        "test chaos": ([*pytest, "tests/chaos"], ROOT),
        # Without the Rust client, whose build takes a minute that CI does not have: pytest tests/conformance runs it.
        "test conformance": (
            [*pytest, "-n", "2", "tests/conformance", "--ignore=tests/conformance/test_another_language.py"],
            ROOT,
        ),
    }


def run(name: str, command: list[str], cwd: Path) -> tuple[bool, str]:
    """Runs one stage. Returns whether it passed, and its output, which is printed when it did not."""
    started = time.monotonic()
    print(f"{name:<20}", end="", flush=True)
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    # Without compiled modules each of the many processes that tests start compiles Unsloth and torch anew: 9 s each.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_SECONDS,
            text=True,
            errors="replace",
        )
        ok, output = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as timeout:
        said = timeout.output.decode(errors="replace") if isinstance(timeout.output, bytes) else timeout.output
        ok, output = False, f"{said or ''}\nstopped after {LIMIT_SECONDS} s"
    print(f"{'ok' if ok else 'FAILED'}  {time.monotonic() - started:6.1f} s", flush=True)
    if not ok:
        print(f"$ {' '.join(command)}\n{output}", flush=True)
    return ok, output


def count(output: str, patterns: tuple[str, ...]) -> int:
    """Adds up what a runner says: pytest in its last lines, Go a line a test, Node in a summary."""
    pytest, node, go = patterns
    last = "\n".join(output.splitlines()[-3:])
    total = sum(int(number) for number in re.findall(pytest, last))
    total += sum(int(number) for number in re.findall(node, output, re.MULTILINE))
    return total + len(re.findall(go, output, re.MULTILINE))


if __name__ == "__main__":
    sys.exit(main())
