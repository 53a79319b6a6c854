"""`make lint` holds the contract compatible with the last release, whatever a clone knows of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.languages import ROOT

REMOVED = "  string model_name = 2;\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the contract as its one commit."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    who = {f"GIT_{role}_{what}": "test@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["git", *arguments], cwd=folder, check=True, env=os.environ | who, capture_output=True, timeout=60)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "a commit")


def compared(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "compatible.py")]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, timeout=120)


def change(folder: Path, before: str, after: str) -> None:
    file = folder / "protos" / "unslothd" / "v1" / "model.proto"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def test_without_a_release_the_contract_of_the_first_commit_holds(repository: Path):
    assert (compared(repository).returncode, "first commit" in compared(repository).stdout) == (0, True)
    change(repository, REMOVED, "")
    done = compared(repository)
    assert done.returncode != 0
    assert "model_name" in done.stdout


def test_the_last_release_before_this_commit_is_compared_with(repository: Path):
    git(repository, "tag", "v0.9.0")
    commit(repository)
    git(repository, "tag", "v0.10.0")
    commit(repository)
    git(repository, "tag", "v0.11.0-rc.1")
    commit(repository)
    git(repository, "tag", "v0.11.0")  # this commit: compared with itself it would always be compatible
    done = compared(repository)
    assert (done.returncode, done.stdout) == (0, "against v0.10.0\n")


def test_what_a_release_brought_may_not_go_again(repository: Path):
    change(repository, REMOVED, f"{REMOVED}  // New.\n  string brought_by_the_release = 999;\n")
    commit(repository)
    git(repository, "tag", "v1.0.0")
    change(repository, "  // New.\n  string brought_by_the_release = 999;\n", "")
    commit(repository)
    done = compared(repository)
    assert done.returncode != 0
    assert "brought_by_the_release" in done.stdout
