"""The commands of docs/rows.md run as they stand there, on the rows that the page shows."""

from pathlib import Path

import pytest

from support.calls import prepared_model
from support.page_commands import cli_commands, run_command
from support.pages import ROOT, to_run
from support.running_server import RunningServer
from unslothd.v1.service_pb2_grpc import UnslothServiceStub


def test_every_command_of_the_page_runs(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(to_run(ROOT / "docs/rows.md", "json")[0])
    commands = list(cli_commands("docs/rows.md"))
    assert len(commands) > 2
    with prepared_model(stub, "tiny") as model:
        for command in commands:
            run_command(server, command, {"llama-3.2-1b-instruct-unsloth": model.model_id})
