"""The adapters: how each language's is built and started. To add one: README.md."""

import fcntl
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD_SECONDS = 600
_TOOLS = ROOT / ".tools"
# This run of the tests: the same for all processes that pytest-xdist shares it among.
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"process {os.getpid()}")


@dataclass(frozen=True)
class Language:
    """An adapter program.

    Args:
        build: Command that builds it; empty = nothing to build.
        run: Command that starts it.
        folder: Where both run.
    """

    build: tuple[str, ...]
    run: tuple[str, ...]
    folder: Path

    def built(self) -> None:
        """Builds it once in a run of the tests; other processes of the run wait. Raises what the compiler says."""
        if not self.build:
            return
        _TOOLS.mkdir(exist_ok=True)
        with (_TOOLS / f"conformance-{self.folder.name}.built").open("a+") as built:
            fcntl.flock(built, fcntl.LOCK_EX)
            built.seek(0)
            if built.read() == _RUN:
                return
            done = subprocess.run(
                self.build, check=False, cwd=self.folder, capture_output=True, text=True, timeout=BUILD_SECONDS
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(self.build)} failed:\n{done.stdout}{done.stderr}")
            built.truncate(0)
            built.write(_RUN)


GO_ADAPTER = _TOOLS / "conformance-go"
LANGUAGES = {
    "python": Language((), (sys.executable, "tests/conformance/adapter.py"), ROOT),
    "go": Language(
        ("go", "build", "-o", str(GO_ADAPTER), "./internal/conformance"), (str(GO_ADAPTER),), ROOT / "clients" / "go"
    ),
    "typescript": Language(
        ("npx", "--no-install", "tsc"), ("node", "dist/conformance/adapter.js"), ROOT / "clients" / "typescript"
    ),
}
