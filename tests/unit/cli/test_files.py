"""`unslothd export`, `download` and `receipt`: files on the server, here, and as their receipt says."""

import hashlib
import json
import threading

import grpc
import pytest

from support.terminal import Terminal
from unslothd.v1 import artifact_pb2, service_pb2

CONTENT = b"weights"
FILE = artifact_pb2.ArtifactFile(name="model.bin", num_bytes=7, sha256=hashlib.sha256(CONTENT).hexdigest())
ARTIFACT = artifact_pb2.Artifact(
    artifact_id="a1", path="/out/export", files=[FILE], format=artifact_pb2.EXPORT_FORMAT_MERGED_16BIT
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exporting(say):
    progress = artifact_pb2.ExportProgress(phase="merging", done=1, total=2)
    return say.messages(
        service_pb2.ExportModelResponse(progress=progress), service_pb2.ExportModelResponse(artifact=ARTIFACT)
    )


def sending(say, content: bytes = CONTENT):
    return say.messages(
        service_pb2.DownloadArtifactResponse(file=FILE), service_pb2.DownloadArtifactResponse(chunk=content)
    )


def test_an_export_shows_what_was_written_and_how_to_fetch_it(server, say, cli):
    server.script.on("ExportModel", exporting(say), exporting(say))
    shown = cli("export", say.TRAINING, "--step", "40", "--format", "merged_16bit", "--output-dir", "out")
    assert shown.exit_code == 0
    assert "a1: merged_16bit, on the server in /out/export" in shown.stdout
    assert "7 B  model.bin" in shown.stdout
    assert "merging" in shown.stderr
    assert "unslothd download a1" in shown.stderr
    assert server.script.calls("ExportModel") == [
        service_pb2.ExportModelRequest(
            checkpoint=artifact_pb2.TrainingCheckpoint(training_id=say.TRAINING, step=40),
            format=artifact_pb2.EXPORT_FORMAT_MERGED_16BIT,
            output_dir="out",
        )
    ]
    alone = cli("export", "tiny-unsloth", "--format", "merged_16bit", "--json")
    assert json.loads(alone.stdout)["artifact_id"] == "a1"
    assert alone.stderr == ""


def test_an_unknown_form_is_wrong_usage(cli):
    assert cli("export", "tiny-unsloth", "--format", "zip").exit_code == 2


def test_a_download_goes_into_a_folder_named_by_the_id(server, say, cli, here):
    server.script.on("DownloadArtifact", *[sending(say) for _ in range(5)])
    assert cli("download", "a1").stdout == "a1/model.bin\n"
    assert (here / "a1/model.bin").read_bytes() == CONTENT
    assert cli("download", say.TRAINING, "--step", "40").stdout == f"{say.TRAINING}-checkpoint-40/model.bin\n"
    shown = cli("download", "a1", "model.bin", "--to", "there", "--json")
    assert json.loads(shown.stdout) == {"path": "there/model.bin", "num_bytes": 7}
    assert server.script.calls("DownloadArtifact")[-1].names == ["model.bin"]


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(server, say):
    server.script.on("DownloadArtifact", sending(say), sending(say))
    code, shown = Terminal("download", "a1", "--target", server.target).wait()
    assert code == 0
    assert "7/7 bytes" in shown
    assert shown.rstrip().endswith("a1/model.bin")


@pytest.mark.parametrize(
    ("method", "arguments", "text"),
    [
        ("DownloadArtifact", ["download", "a1"], "What has come is kept in a1; the same command again goes on with it"),
        ("ExportModel", ["export", "m", "--format", "adapter"], "The export goes on on the server; the same command"),
    ],
)
def test_ctrl_c_says_that_the_same_command_goes_on(server, say, method, arguments, text):
    reached, left = threading.Event(), threading.Event()

    def hold(_request: object, context: grpc.ServicerContext) -> None:
        context.add_callback(left.set)
        reached.set()
        left.wait(20)

    server.script.on(method, say.messages(then=hold))
    with Terminal(*arguments, "--target", server.target) as terminal:
        assert reached.wait(20)
        terminal.interrupt()
        code, shown = terminal.wait()
    assert code == 130
    assert text in " ".join(shown.split())
    assert left.wait(20)


def test_another_file_of_the_same_name_is_said_and_kept(server, say, cli, here):
    (here / "a1").mkdir()
    (here / "a1/model.bin").write_bytes(b"mine")
    server.script.on("DownloadArtifact", *[sending(say) for _ in range(4)])
    shown = cli("download", "a1")
    assert shown.exit_code == 1
    assert "a1/model.bin: another file of this name is here" in shown.stderr
    assert cli("download", "a1", "--overwrite").exit_code == 0
    assert (here / "a1/model.bin").read_bytes() == CONTENT


def test_damaged_bytes_exit_with_1(server, say, cli):
    server.script.on("DownloadArtifact", sending(say, b"WEIGHTS"), sending(say, b"WEIGHTS"))
    shown = cli("download", "a1")
    assert shown.exit_code == 1
    assert "DATA_LOSS: model.bin arrived with another sha256" in shown.stderr


@pytest.fixture
def receipt(here):
    folder = here / "final"
    folder.mkdir()
    (folder / "model.bin").write_bytes(CONTENT)
    files = {"model.bin": {"num_bytes": 7, "sha256": FILE.sha256}}
    content = {"receipt_version": 1, "training_id": "t", "files": files, "datasets": {}}
    (folder / "receipt.json").write_text(json.dumps(content))
    return folder


def test_a_receipt_that_fits_exits_with_0(receipt, cli):
    shown = cli("receipt", "verify", "final")
    assert (shown.exit_code, shown.stdout) == (0, "final is as its receipt says\n")
    assert json.loads(cli("receipt", "verify", "final", "--json").stdout) == {"verified": True, "findings": []}


def test_a_receipt_that_does_not_fit_exits_with_1_and_says_why(receipt, cli):
    (receipt / "model.bin").write_bytes(b"WEIGHTS")
    shown = cli("receipt", "verify", "final/receipt.json")
    assert shown.exit_code == 1
    assert "model.bin has other content than the training wrote" in shown.stdout
    (finding,) = json.loads(cli("receipt", "verify", "final", "--json").stdout)["findings"]
    assert (finding["kind"], finding["subject"]) == ("content", "model.bin")


def test_a_receipt_is_shown(receipt, cli):
    assert json.loads(cli("receipt", "show", "final").stdout)["training_id"] == "t"
    assert json.loads(cli("receipt", "show", "final", "--json").stdout)["training_id"] == "t"


def test_a_missing_receipt_exits_with_1(here, cli):
    shown = cli("receipt", "show", "nowhere")
    assert shown.exit_code == 1
    assert "nowhere cannot be read" in shown.stderr


def test_a_receipt_on_the_server_is_shown_and_verified(server, say, cli, receipt):
    content = (receipt / "receipt.json").read_bytes()
    file = artifact_pb2.ArtifactFile(
        name="receipt.json", num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )
    sent = [service_pb2.DownloadArtifactResponse(file=file), service_pb2.DownloadArtifactResponse(chunk=content)]
    model = [service_pb2.DownloadArtifactResponse(file=FILE), service_pb2.DownloadArtifactResponse(chunk=CONTENT)]
    server.script.on("DownloadArtifact", *[say.messages(*each) for each in (sent, [*model, *sent], sent)])
    assert json.loads(cli("receipt", "show", say.TRAINING).stdout)["training_id"] == "t"
    assert cli("receipt", "verify", say.TRAINING).exit_code == 0
    shown = cli("receipt", "verify", say.TRAINING)
    assert shown.exit_code == 1
    assert "model.bin is missing" in shown.stdout
