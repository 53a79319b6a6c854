"""The commands of docs/export.md run as they stand there, on a model, a training and an artifact of this server."""

from pathlib import Path

import pytest

from doubles.fake_worker import fake_row
from support.calls import inline, prepared_model, train
from support.exports import export
from support.page_commands import cli_commands, run_command
from support.running_server import RunningServer
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import TrainingConfig

EXAMPLES = {
    "model": "llama-3.2-1b-instruct-unsloth",
    "training": "training-20261124-120000-abcdef",
    "artifact": "artifact-20261124-121500-0a1b2c",
}


def test_every_command_of_the_page_runs(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    commands = list(cli_commands("docs/export.md"))
    assert len(commands) > 5
    with prepared_model(stub, "tiny") as model:
        config = TrainingConfig(save_steps=40, output_dir="page")
        first, *_ = train(stub, model.model_id, inline([fake_row(steps=41)]), training_config=config)
        for folder in ("final", "checkpoint-40"):
            (server.output_root / "page" / folder / "adapter_config.json").write_text("{}")
            (server.output_root / "page" / folder / "adapter_model.safetensors").write_bytes(b"weights")
        real = {
            EXAMPLES["model"]: model.model_id,
            EXAMPLES["training"]: first.training_id,
            EXAMPLES["artifact"]: export(stub, model_id=model.model_id).artifact_id,
        }
        for command in commands:
            run_command(server, command, real)
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "early").iterdir()] == ["adapter_model.safetensors"]
