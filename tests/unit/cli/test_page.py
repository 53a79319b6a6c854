"""docs/cli.md is what the commands are."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_page_of_commands_is_fresh():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/cli_page.py")], capture_output=True, text=True, timeout=60, check=True
    )
    assert (ROOT / "docs/cli.md").read_text() == done.stdout, "run: .venv/bin/python scripts/cli_page.py > docs/cli.md"
