"""What docs/clients.md shows runs as it stands there: in Python, Go, TypeScript and the shell, against real servers.

So does the Python of the other pages; their commands are in tests/integration/server.
"""

import os
import subprocess
from pathlib import Path

import pytest

from conformance.languages import LANGUAGES, ROOT
from conformance.programs import SECONDS, run_go, run_python, run_typescript
from doubles.fake_worker import fake_row
from support.calls import prepared_model
from support.pages import blocks, to_run
from support.running_server import RunningServer
from support.secure_server import SecureServer
from unslothd.v1.training_pb2 import TrainingConfig

PAGE = ROOT / "docs" / "clients.md"
# Of a language: its fence on the page, and what runs it.
RUNNERS = {
    "python": ("python", run_python),
    "go": ("go", run_go),
    "typescript": ("ts", run_typescript),
}


@pytest.fixture
def folder(secure_server: SecureServer, tmp_path: Path) -> Path:
    """A working folder with what the page says lies there."""
    (tmp_path / "ca.pem").write_bytes(secure_server.authority.ca.read_bytes())
    (tmp_path / "token").touch(0o600)
    (tmp_path / "token").write_text(secure_server.tokens["read"])
    return tmp_path


def test_every_block_is_run_or_says_why_it_is_not():
    known = {"python", "go", "ts", "sh"}
    assert [each for each in blocks(PAGE) if each.language not in known] == []
    assert len([each for each in blocks(PAGE) if each.not_run]) == 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_blocks_of_a_language_run(language: str, server: RunningServer, secure_server: SecureServer, folder: Path):
    fence, runs = RUNNERS[language]
    if language == "typescript":
        LANGUAGES[language].built()
    (server.model_root / "rows.jsonl").write_text(fake_row(steps=2))
    names = {"127.0.0.1:50051": server.target, "gpu-host:50051": secure_server.target, "my-model": "tiny"}
    printed = runs(to_run(PAGE, fence), folder, names)
    assert "2 1" in printed  # step 2, loss 1
    assert "nobody" in printed  # the model that is not there
    assert (folder / "my-adapter" / "adapter_config.json").is_file()


def test_the_commands_of_the_page_run(server: RunningServer, secure_server: SecureServer, folder: Path):
    (folder / "protos").symlink_to(ROOT / "protos")
    (folder / "buf.yaml").symlink_to(ROOT / "buf.yaml")
    path = os.pathsep.join([str(ROOT / ".tools" / "bin"), str(ROOT / ".venv-generate" / "bin"), os.environ["PATH"]])
    with prepared_model(server.stub(), "tiny") as model:
        for block in to_run(PAGE, "sh"):
            code = block.replace("127.0.0.1:50051", server.target).replace("gpu-host:50051", secure_server.target)
            code = code.replace("tiny-unsloth", model.model_id)
            done = subprocess.run(
                ["bash", "-euc", code],
                check=False,
                cwd=folder,
                env=os.environ | {"PATH": path, "UNSLOTHD_TOKEN": secure_server.tokens["read"]},
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
    assert (folder / "unslothd.binpb").stat().st_size > 0


@pytest.mark.parametrize("page", ["README.md", "docs/datasets.md"])
def test_the_python_of_other_pages_runs(server: RunningServer, page: str, tmp_path: Path):
    names = {"127.0.0.1:50051": server.target, "unsloth/Llama-3.2-1B-Instruct": "tiny"}
    with prepared_model(server.stub(), "tiny", TrainingConfig(max_steps=2)) as model:
        given = f"model, table = {model.model_id!r}, [{{'text': 'a row'}}]"
        run_python(to_run(ROOT / page, "python"), tmp_path, names, given)
