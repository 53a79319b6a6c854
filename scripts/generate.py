"""Generates the stubs of every language: `generate.py` writes them, `generate.py --check` says what is out of date.

Both generate into a new folder first. So nothing stale stays, and a failed run changes nothing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tidy_python_stubs

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ("buf.gen.yaml", "clients/go/buf.gen.yaml", "clients/typescript/buf.gen.yaml")
# Folders that hold nothing but stubs.
STUBS = (
    "clients/python/unslothd/v1",
    "clients/python/unslothd/worker",
    "clients/python/unslothd/_vendor",
    "clients/go/gen",
    "clients/typescript/gen",
)
NOT_STUBS = {"__pycache__"}


def main() -> int:
    """Runs one of the two."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        try:
            generate(out)
        except subprocess.CalledProcessError as failure:
            print(f"`{' '.join(failure.cmd)}` failed; what it said is above. Nothing was changed.")
            return 1
        stale = differences(out)
        if sys.argv[1:] == ["--check"]:
            return report(stale, uncommitted())
        write(out, stale)
    print(f"{len(stale)} stubs changed" if stale else "all stubs were up to date")
    return 0


def generate(out: Path) -> None:
    """Writes the stubs of all languages below `out`, at the paths that they have in the repository."""
    # The plugins of this environment and no others; buf finds them by PATH.
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for template in TEMPLATES:
        subprocess.run(["buf", "generate", "--template", template, "-o", str(out)], cwd=ROOT, env=env, check=True)
    tidy_python_stubs.main(out / "clients" / "python")


def files_of(root: Path) -> set[str]:
    """Paths of all stubs below `root`, relative to it."""
    found = (path for stubs in STUBS for path in (root / stubs).rglob("*") if path.is_file())
    return {str(path.relative_to(root)) for path in found if not NOT_STUBS & set(path.parts)}


def differences(out: Path) -> dict[str, str]:
    """What differs between the new stubs and the repository's: path → how."""
    new, old = files_of(out), files_of(ROOT)
    changed = {path for path in new & old if (out / path).read_bytes() != (ROOT / path).read_bytes()}
    return (
        dict.fromkeys(sorted(changed), "out of date")
        | dict.fromkeys(sorted(new - old), "missing")
        | dict.fromkeys(sorted(old - new), "not made from any proto")
    )


def uncommitted() -> dict[str, str]:
    """Stubs that git does not know: path → how."""
    command = ["git", "ls-files", "--others", "--exclude-standard", "--", *STUBS]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return dict.fromkeys(listed.splitlines(), "not known to git")


def report(stale: dict[str, str], unknown: dict[str, str]) -> int:
    """Says what is wrong and what to do. Returns the exit status."""
    for path, how in (unknown | stale).items():
        print(f"{path}: {how}")
    if stale:
        print("\nThe stubs do not fit the protos or the generators: run `make generate` and commit what it writes.")
    elif unknown:
        print("\nThe stubs are right but not all in git: `git add` the ones above and commit them.")
    else:
        print("all stubs are up to date")
    return 1 if stale or unknown else 0


def write(out: Path, stale: dict[str, str]) -> None:
    """Makes the repository's stubs equal to the new ones."""
    for path in stale:
        source, target = out / path, ROOT / path
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        else:
            target.unlink()


if __name__ == "__main__":
    sys.exit(main())
