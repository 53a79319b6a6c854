"""The adapters: how each language's is built and started. To add one: README.md."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD_SECONDS = 600


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
        """Builds it; raises what the compiler says."""
        if self.build:
            done = subprocess.run(
                self.build, check=False, cwd=self.folder, capture_output=True, text=True, timeout=BUILD_SECONDS
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(self.build)} failed:\n{done.stdout}{done.stderr}")


GO_ADAPTER = ROOT / ".tools" / "conformance-go"
LANGUAGES = {
    "python": Language((), (sys.executable, "tests/conformance/adapter.py"), ROOT),
    "go": Language(
        ("go", "build", "-o", str(GO_ADAPTER), "./internal/conformance"), (str(GO_ADAPTER),), ROOT / "clients" / "go"
    ),
    "typescript": Language(
        ("npx", "--no-install", "tsc"), ("node", "dist/conformance/adapter.js"), ROOT / "clients" / "typescript"
    ),
}
# For tests in several processes: those of one language run in the same one, which builds its adapter once.
EACH_LANGUAGE = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in LANGUAGES]
