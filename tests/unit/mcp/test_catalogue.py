"""What hosts and agents are told of the tools: names, arguments, defaults, units, effects, what comes next."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import unslothd
from unslothd._requests import LoraOptions, TrainingOptions
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_mcp import cli, next_steps, results
from unslothd_mcp.app import TOOLS, Adapter
from unslothd_mcp.arguments import Lora, TrainingConfig
from unslothd_mcp.session import Session
from unslothd_mcp.settings import Settings

ROOT = Path(__file__).parents[3]
NAMES = {tool.name for tool in TOOLS}
UNITS = r"tokens|steps?|seconds|rows|bytes|sequences|models|datasets|trainings|minutes|id\b|parameters|memory"


@pytest.fixture(scope="module")
def tools() -> dict:
    adapter = Adapter(Session(unslothd.AsyncClient("127.0.0.1:1"), Settings()))
    return {tool.name: tool for tool in asyncio.run(adapter.list_tools())}


FIVE = {
    "unsloth_load_model": (
        {"model_name": ..., "max_seq_length": 2048, "load_in_4bit": True, "token": None, "device_map": "auto"},
        {"status", "model_id", "model_name", "max_seq_length", "dtype", "device"},
    ),
    "unsloth_prepare_for_training": (
        {"model_id": ..., "training_config": None},
        {"status", "message", "trainable_params", "total_params"},
    ),
    "unsloth_train": (
        {"model_id": ..., "train_dataset": ..., "eval_dataset": None, "training_config": None},
        {"status", "metrics", "output_dir"},
    ),
    "unsloth_unload_model": ({"model_id": ...}, {"status", "message"}),
    "unsloth_list_models": ({}, set()),
}


@pytest.mark.parametrize("name", FIVE)
def test_the_five_tools_have_their_arguments_defaults_and_results(name: str, tools: dict):
    arguments, keys = FIVE[name]
    schema = tools[name].input_schema
    required = [argument for argument, default in arguments.items() if default is ...]
    assert schema.get("required", []) == required
    for argument, default in arguments.items():
        assert argument in schema["properties"]
        assert default is ... or schema["properties"][argument]["default"] == default
    assert keys <= set(tools[name].output_schema.get("required", ()))


def test_the_metrics_and_the_listed_models_have_their_keys():
    metrics = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "epoch"}
    assert metrics <= results.Metrics.__required_keys__
    listed = {"model_name", "max_seq_length", "dtype", "load_in_4bit", "device_map"}
    assert listed == results.ModelConfig.__required_keys__
    assert {"config", "device"} <= results.ListedModel.__required_keys__


def test_hyper_parameters_and_adapters_are_those_of_the_client():
    assert set(TrainingConfig.__annotations__) == set(TrainingOptions.__annotations__)
    assert set(Lora.__annotations__) == set(LoraOptions.__annotations__)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_a_description_names_units_defaults_and_what_comes_next(tool):
    text = tool.description
    assert re.search(UNITS, text)
    assert re.search(r"(?i)default", text)
    followed = text.partition("Next:")[2]
    assert followed.strip()
    assert set(re.findall(r"unsloth_[a-z]+[a-z_]*", text)) <= NAMES


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_every_argument_is_described_with_its_default(tool, tools: dict):
    schema = tools[tool.name].input_schema
    assert set(schema.get("properties", {})) == set(tool.arguments)
    for name, argument in schema.get("properties", {}).items():
        assert argument.get("description"), name
        if name not in schema.get("required", ()) and name not in {"eval_dataset"}:
            assert re.search(r"(?i)default", argument["description"]), name


@pytest.mark.parametrize("declared", [TrainingConfig, Lora])
def test_every_hyper_parameter_is_described_with_its_default(declared: type):
    for name, hint in get_type_hints(declared, include_extras=True).items():
        assert re.search(r"Default", hint.__metadata__[-1].description), name


def test_what_only_reads_destroys_nothing(tools: dict):
    for tool in tools.values():
        hints = tool.annotations
        assert None not in (hints.read_only_hint, hints.destructive_hint, hints.idempotent_hint, hints.open_world_hint)
        assert not (hints.read_only_hint and hints.destructive_hint)
    destructive = {name for name, tool in tools.items() if tool.annotations.destructive_hint}
    assert destructive == {"unsloth_unload_model", "unsloth_resume_training", "unsloth_cancel_training"}


def test_every_reason_of_the_contract_and_of_the_adapter_has_a_next_step():
    contract = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    sources = "".join(file.read_text() for file in (ROOT / "mcp_adapter").rglob("*.py"))
    own = set(re.findall(r'ToolFailure\(\s*"([A-Z_]+)"', sources))
    assert len(own) > 5
    assert contract | own <= next_steps.REASONS


def test_next_steps_name_only_tools_that_there_are():
    for reason in next_steps.REASONS:
        text = next_steps.next_step(reason, "", "unsloth_train")
        assert set(re.findall(r"unsloth_[a-z]+[a-z_]*", text)) <= NAMES
        assert "{" not in text


def test_the_page_and_the_snapshot_of_the_tools_are_fresh():
    command = [sys.executable, str(ROOT / "scripts/mcp_page.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_help_teaches_how_hosts_start_it():
    done = subprocess.run(
        [sys.executable, "-m", "unslothd_mcp", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT / "mcp_adapter",
    )
    assert '"mcpServers"' in done.stdout
    for option in (
        "--target",
        "--token-file",
        "--ca",
        "--profile",
        "--read-only",
        "--max-steps",
        "--max-gpu-minutes",
        "--allowed-root",
        "--http",
    ):
        assert option in done.stdout


def test_a_way_to_the_server_that_would_show_the_token_is_wrong_usage(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("UNSLOTHD_TOKEN", "unslothd_planted-token")
    with pytest.raises(SystemExit) as ended:
        cli.main(["--target", "gpu-host:50051"])
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert "a token for gpu-host:50051 would travel in plain text" in told
    assert "planted" not in told


def test_the_configurations_of_hosts_in_the_docs_start_it():
    blocks = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", (ROOT / "docs/mcp.md").read_text(), re.S)]
    servers = [block[key]["unslothd"] for block in blocks for key in ("mcpServers", "servers") if key in block]
    started = [server for server in servers if "command" in server]
    assert (len(servers), len(started)) == (3, 2)
    for server in started:
        assert server["command"] == "unslothd-mcp"
        cli.parser().parse_args(server["args"])


def test_the_docs_have_every_reason_of_the_adapter():
    page = (ROOT / "docs/mcp.md").read_text()
    contract = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()}  # noqa: SIM118
    assert [reason for reason in next_steps.REASONS - contract if reason not in page] == []
