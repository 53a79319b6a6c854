"""The commands of docs/rows.md run as they stand there, on the rows that the page shows."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.calls import prepared_model
from support.running_server import RunningServer
from unslothd.cli.app import app
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

PAGE = Path(__file__).parents[3] / "docs" / "rows.md"


def test_every_command_of_the_page_runs(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text()
    Path("rows.jsonl").write_text(re.findall(r"^```json\n(.*?)^```", page, re.M | re.S)[0])
    [commands] = re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)
    with prepared_model(stub, "tiny") as model:
        for command in commands.splitlines():
            words = shlex.split(command.replace("llama-3.2-1b-instruct-unsloth", model.model_id), comments=True)[1:]
            done = CliRunner().invoke(app, [*words, "--target", server.target], catch_exceptions=False)
            assert done.exit_code == 0, f"{command}\n{done.output}"
