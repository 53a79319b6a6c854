"""The commands over real Unsloth: what a plan shows, what a training leaves, and that its receipt holds."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from support.running_server import RunningServer
from unslothd.cli.app import app
from unslothd.v1.model_pb2 import Model

pytestmark = pytest.mark.timeout(600)

CHAT = [
    {"messages": [{"role": "user", "content": f"What is {n} plus {n}?"}, {"role": "assistant", "content": f"{2 * n}."}]}
    for n in range(12)
]


def command(server: RunningServer, *arguments: str, **more: str) -> Result:
    result = CliRunner().invoke(app, [*arguments, "--target", server.target], catch_exceptions=False, **more)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in CHAT))
    return file


@pytest.fixture(scope="module")
def training_id(server: RunningServer, loaded: Model, data: Path) -> str:
    arguments = ["--model-id", loaded.model_id, "--dataset", str(data), "--eval-dataset", str(data)]
    arguments += ["--max-steps", "4", "--save-steps", "2", "--eval-steps", "2", "--json"]
    lines = command(server, "train", *arguments).stdout.splitlines()
    return json.loads(lines[-1])["training_id"]


def test_a_plan_shows_the_answers_as_what_is_learnt(server: RunningServer, loaded: Model, data: Path):
    shown = command(server, "plan", "--model-id", loaded.model_id, "--dataset", str(data), "--max-steps", "4").stdout
    assert "chat, loss on the answers only" in shown
    row = shown.partition("row 1:")[2].partition("row 2:")[0]
    learnt = row.partition("⟦")[2].partition("⟧")[0]
    assert learnt.startswith("0.")
    assert "What is" not in learnt


def test_a_receipt_holds_on_the_server_and_after_a_download(
    server: RunningServer, training_id: str, data: Path, tmp_path: Path
):
    command(server, "receipt", "verify", training_id, "--data", str(data))
    here = tmp_path / "adapter"
    command(server, "download", training_id, "--to", str(here))
    assert {"adapter_config.json", "adapter_model.safetensors", "receipt.json"} <= {
        file.name for file in here.iterdir()
    }
    command(server, "receipt", "verify", str(here))
    weights = bytearray((here / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (here / "adapter_model.safetensors").write_bytes(weights)
    arguments = ["receipt", "verify", str(here), "--json", "--target", server.target]
    changed = CliRunner().invoke(app, arguments)
    assert changed.exit_code == 1
    (finding,) = json.loads(changed.stdout)["findings"]
    assert (finding["kind"], finding["subject"]) == ("content", "adapter_model.safetensors")


def test_the_best_checkpoint_is_marked_and_downloaded_by_its_step(
    server: RunningServer, training_id: str, tmp_path: Path
):
    table = command(server, "trainings", "checkpoints", training_id).stdout
    assert table.count("best") == 1
    assert "best" in command(server, "trainings", "get", training_id).stdout
    command(server, "download", training_id, "--step", "2", "--to", str(tmp_path / "two"))
    assert (tmp_path / "two/manifest.json").is_file()


def test_a_chat_compares_the_base_with_the_adapter(server: RunningServer, loaded: Model, training_id: str):
    arguments = ["chat", loaded.model_id, "--compare", "--max-new-tokens", "4", "--json"]
    answers = [json.loads(line) for line in command(server, *arguments, input="Hi\nAgain\n").stdout.splitlines()]
    assert [each["without_adapter"] for each in answers] == [True, False, True, False]
    assert all(each["summary"]["completion_tokens"] <= 4 for each in answers)
