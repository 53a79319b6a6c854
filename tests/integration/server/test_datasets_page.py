"""The commands of docs/datasets.md run as they stand there, on files and a model of this server."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from doubles.fake_worker import fake_row
from support.calls import prepared_model
from support.running_server import RunningServer
from support.uploads import as_parquet, id_of
from unslothd.cli.app import app
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

PAGE = Path(__file__).parents[3] / "docs" / "datasets.md"
EXAMPLE_MODEL = "llama-3.2-1b-instruct-unsloth"


def test_every_command_of_the_page_runs(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("unslothd ")]
    assert len(commands) > 5
    rows = fake_row(steps=2).encode()
    Path("rows.jsonl").write_bytes(rows)
    Path("export.data").write_bytes(as_parquet([json.loads(rows)]))
    with prepared_model(stub, "tiny") as model:
        for command in commands:
            line = re.sub(r"sha256:[0-9a-f]{64}", id_of(rows), command).replace(EXAMPLE_MODEL, model.model_id)
            words = shlex.split(line, comments=True)[1:]
            done = CliRunner().invoke(app, [*words, "--target", server.target], catch_exceptions=False)
            assert done.exit_code == 0, f"{command}\n{done.output}"
