"""Fails when the public contract breaks clients of the last release: `buf breaking` against that release's protos.

The last release is the newest tag vX.Y.Z before this commit. Until there is one, and in a clone without tags, it is the
contract of the first commit, `tests/conformance/first_contract.binpb`, whose stubs test_older_client.py runs.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUF = ROOT / ".venv-generate" / "bin" / "buf"
FIRST = ROOT / "tests" / "conformance" / "first_contract.binpb"
PUBLIC = "protos/unslothd/v1"


def main() -> int:
    """Compares the contract below the working folder; returns the exit code."""
    release = last_release()
    with tempfile.TemporaryDirectory() as folder:
        before = image(f".git#tag={release}", Path(folder) / "before.binpb") if release else FIRST
        now = image(".", Path(folder) / "now.binpb")
        print(f"against {release or 'the contract of the first commit'}", flush=True)
        return subprocess.run([BUF, "breaking", now, "--against", before], check=False).returncode


def last_release() -> str:
    """Returns the newest release that this commit comes after; empty when there is none."""
    known = ["git", "tag", "--merged", "HEAD", "--no-contains", "HEAD", "--sort=-v:refname"]
    tags = subprocess.run(known, check=True, capture_output=True, text=True).stdout.splitlines()
    return next((tag for tag in tags if re.fullmatch(r"v\d+\.\d+\.\d+", tag)), "")


def image(source: str, file: Path) -> Path:
    """Builds the public contract of a source into one file, without comments."""
    subprocess.run([BUF, "build", source, "--path", PUBLIC, "--exclude-source-info", "-o", file], check=True)
    return file


if __name__ == "__main__":
    sys.exit(main())
