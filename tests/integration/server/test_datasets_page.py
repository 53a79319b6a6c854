"""The commands of docs/datasets.md run as they stand there, on files and a model of this server."""

import json
import re
from pathlib import Path

import pytest

from doubles.fake_worker import fake_row
from support.calls import prepared_model
from support.page_commands import cli_commands, run_command
from support.running_server import RunningServer
from support.uploads import as_parquet, id_of
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

EXAMPLE_MODEL = "llama-3.2-1b-instruct-unsloth"


def test_every_command_of_the_page_runs(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    commands = list(cli_commands("docs/datasets.md"))
    assert len(commands) > 5
    rows = fake_row(steps=2).encode()
    Path("rows.jsonl").write_bytes(rows)
    Path("export.data").write_bytes(as_parquet([json.loads(rows)]))
    with prepared_model(stub, "tiny") as model:
        for command in commands:
            with_dataset = re.sub(r"sha256:[0-9a-f]{64}", id_of(rows), command)
            run_command(server, with_dataset, {EXAMPLE_MODEL: model.model_id})
