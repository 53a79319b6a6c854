"""A Hugging Face token for a gated model comes from a file or from stdin: a command line can be seen by everybody."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.scripted_server import ScriptedServer
from support.terminal import Terminal
from unslothd.cli.app import app
from unslothd.v1 import model_pb2, service_pb2

TOKEN = "hf_PlantedForTheCommandLine"
LOADERS = (("models", "load"), ("train",), ("plan",))


@pytest.fixture
def loads(server: ScriptedServer, say) -> ScriptedServer:
    ready = model_pb2.Model(model_id="gated-unsloth", model_name="org/gated", state=model_pb2.Model.STATE_READY)
    server.script.on("LoadModel", say.messages(service_pb2.LoadModelResponse(model=ready)))
    return server


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text(f"{TOKEN}\n")
    return file


def test_it_is_read_from_a_file(loads, cli, token_file):
    done = cli("models", "load", "org/gated", "--hf-token-file", str(token_file))
    assert done.exit_code == 0, done.output
    assert loads.script.calls("LoadModel")[0].token == TOKEN
    assert TOKEN not in done.output


def test_it_is_read_from_stdin(loads, cli):
    done = cli("models", "load", "org/gated", "--hf-token-file", "-", input=f"{TOKEN}\n")
    assert done.exit_code == 0, done.output
    assert loads.script.calls("LoadModel")[0].token == TOKEN


@pytest.mark.parametrize("command", LOADERS, ids=" ".join)
def test_no_option_takes_the_token_itself(command):
    help_text = CliRunner(env={"COLUMNS": "160"}).invoke(app, [*command, "--help"]).output
    assert "--hf-token-file" in help_text
    assert "--token " not in help_text
    refused = CliRunner().invoke(app, [*command, "--token", TOKEN])
    assert refused.exit_code == 2


@pytest.mark.parametrize("content", ["", "two words", "<html>\n<p>\n", "hf_ünïcode"])
def test_what_is_no_token_is_wrong_usage_and_not_shown(loads, cli, token_file, content):
    token_file.write_text(content)
    done = cli("models", "load", "org/gated", "--hf-token-file", str(token_file))
    assert done.exit_code == 2
    assert "one word of ASCII characters" in " ".join(done.output.replace("│", "").split())
    assert not content or content.strip() not in done.output
    assert loads.script.calls("LoadModel") == []


def test_a_file_that_is_not_there_is_wrong_usage(loads, cli, tmp_path):
    done = cli("models", "load", "org/gated", "--hf-token-file", str(tmp_path / "absent"))
    assert done.exit_code == 2
    assert "cannot be read" in " ".join(done.output.replace("│", "").split())


def test_the_option_is_named_when_it_has_no_model_to_load(cli, token_file, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "hello"}\n')
    done = cli("train", "--model-id", "tiny", "--dataset", str(rows), "--hf-token-file", str(token_file))
    assert done.exit_code == 2
    assert "--hf-token-file need --model NAME" in " ".join(done.output.replace("│", "").split())


def test_a_person_is_asked_for_it_and_it_is_not_shown(loads):
    with Terminal("models", "load", "org/gated", "--hf-token-file", "-", "--target", loads.target) as terminal:
        terminal.wait_for("Hugging Face token:")
        terminal.enter(TOKEN)
        code, shown = terminal.wait()
    assert code == 0
    assert loads.script.calls("LoadModel")[0].token == TOKEN
    assert TOKEN not in shown


@pytest.mark.parametrize("command", LOADERS, ids=" ".join)
def test_it_does_not_go_to_another_host_in_plain_text(loads, token_file, tmp_path, command):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "hello"}\n')
    model = ["org/gated"] if command == ("models", "load") else ["--model", "org/gated", "--dataset", str(rows)]
    elsewhere = f"0.0.0.0:{loads.target.rpartition(':')[2]}"  # leads here, but not surely
    arguments = [*command, *model, "--hf-token-file", str(token_file), "--target", elsewhere]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 1
    assert "HUB_TOKEN_IN_PLAIN_TEXT" in done.output
    assert "use TLS (--ca" in " ".join(done.output.split())
    assert loads.script.calls("LoadModel") == []
