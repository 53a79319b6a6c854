"""`unslothd datasets` against a real server, and the commands of docs/datasets.md."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from doubles.fake_worker import fake_row
from support.running_server import RunningServer
from unslothd.cli.app import app


@pytest.fixture
def cli(server: RunningServer) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--target", server.target], catch_exceptions=False)

    return run


def a_file(folder: Path, word: str) -> Path:
    file = folder / f"{word}.jsonl"
    file.write_text("".join(json.dumps({"text": f"{word} {number}"}) + "\n" for number in range(3)))
    return file


def test_a_file_is_uploaded_shown_listed_and_deleted(cli: Callable[..., Result], tmp_path: Path):
    uploaded = cli("datasets", "upload", str(a_file(tmp_path, "shown")), "--name", "for show")
    assert uploaded.exit_code == 0
    assert "rows        3" in uploaded.stdout
    assert "columns     text" in uploaded.stdout
    dataset_id = uploaded.stdout.split()[1]
    assert f"--dataset {dataset_id}" in uploaded.stderr.replace("\n", " ")
    assert cli("datasets", "get", dataset_id).stdout == uploaded.stdout
    assert "for show" in cli("datasets", "list").stdout
    assert cli("datasets", "delete", dataset_id).exit_code == 0
    gone = cli("datasets", "get", dataset_id)
    assert gone.exit_code == 1
    assert "DATASET_NOT_FOUND" in gone.stderr


def test_json_has_the_names_of_the_contract(cli: Callable[..., Result], tmp_path: Path):
    shown = json.loads(cli("datasets", "upload", str(a_file(tmp_path, "json")), "--json").stdout)
    assert shown["format"] == "DATA_FORMAT_JSONL"
    assert (shown["name"], shown["num_rows"], shown["columns"]) == ("json.jsonl", "3", ["text"])
    assert shown in [json.loads(line) for line in cli("datasets", "list", "--json").stdout.splitlines()]


def test_bad_rows_are_listed(cli: Callable[..., Result], tmp_path: Path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "a"}\nno\n3\n')
    result = cli("datasets", "upload", str(file))
    assert result.exit_code == 1
    assert "DATASET_ROW: 2 rows cannot be used" in result.stderr
    assert "rows[2]: line 2 is not JSON" in result.stderr
    assert "rows[3]: it is of type int" in result.stderr


def test_a_file_that_is_not_there_is_told(cli: Callable[..., Result]):
    result = cli("datasets", "upload", "nowhere.jsonl")
    assert result.exit_code == 1
    assert "is no file here" in result.stderr


def test_a_training_runs_on_an_uploaded_dataset_by_its_id(cli: Callable[..., Result], tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text(fake_row(steps=2))
    dataset_id = json.loads(cli("datasets", "upload", str(file), "--json").stdout)["dataset_id"]
    result = cli("train", "--model", "tiny", "--dataset", dataset_id)
    assert result.exit_code == 0, result.stderr
    assert "succeeded" in result.output
    cli("models", "unload", "tiny", "--force")
