"""Stubs for a language that has no client here: Rust, from the protos by buf and tonic, built and run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conformance.languages import BUILD_SECONDS, ROOT
from doubles.fake_worker import fake_row
from support.running_server import RunningServer

BUF = ROOT / ".venv-generate" / "bin" / "buf"
CARGO = shutil.which("cargo")


@pytest.mark.timeout(BUILD_SECONDS + 60)
@pytest.mark.skipif(CARGO is None, reason="cargo is not on this machine: install Rust (https://rustup.rs) to run this")
def test_a_rust_program_with_generated_stubs_runs_a_training(server: RunningServer, tmp_path: Path) -> None:
    protos = tmp_path / "unslothd.binpb"
    target = ROOT / ".tools" / "rust"
    said(str(BUF), "build", "--path", "protos/unslothd/v1", "-o", str(protos))
    manifest = ["--manifest-path", "tests/conformance/rust/Cargo.toml"]
    said(
        str(CARGO), "build", "--quiet", "--locked", *manifest, UNSLOTHD_PROTOS=str(protos), CARGO_TARGET_DIR=str(target)
    )
    (server.model_root / "rust.jsonl").write_text(fake_row(steps=2))
    lines = said(str(target / "debug" / "small-client"), server.target, "tiny", "rust.jsonl").splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["1", "2", "3", "4", "5", "6", "7"]
    assert "Succeeded" in lines[-1]


def said(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=BUILD_SECONDS,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout
