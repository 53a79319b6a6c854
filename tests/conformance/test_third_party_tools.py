"""Tools that nobody here wrote work with the server as they are."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from conformance.languages import ROOT
from doubles.fake_worker import fake_row
from support.running_server import RunningServer

SERVICE = "unslothd.v1.UnslothService"
TOOLS = ROOT / ".tools" / "bin"
BUF = ROOT / ".venv-generate" / "bin" / "buf"
SECONDS = 60


def tool(name: str) -> str:
    """The path of a tool that scripts/toolchain.sh builds, or one of the machine's."""
    found = TOOLS / name
    path = str(found) if found.exists() else shutil.which(name)
    assert path, f"{name} is not here: `make toolchain` builds it"
    return path


def said(*command: str, code: int = 0) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT)
    assert done.returncode == code, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def grpcurl(*arguments: str, code: int = 0) -> str:
    return said(tool("grpcurl"), "-plaintext", *arguments, code=code)


@pytest.fixture(scope="module")
def prepared_model(server: RunningServer) -> str:
    """A model that is ready to be trained, loaded by grpcurl."""
    loaded = grpcurl("-d", '{"model_name": "tiny"}', server.target, f"{SERVICE}/LoadModel")
    model_id = loaded.partition('"modelId": "')[2].partition('"')[0]
    grpcurl("-d", json.dumps({"model_id": model_id}), server.target, f"{SERVICE}/PrepareForTraining")
    return model_id


def test_grpcurl_lists_and_describes_the_service(server: RunningServer) -> None:
    assert SERVICE in grpcurl(server.target, "list").split()
    assert f"{SERVICE}.Train" in grpcurl(server.target, "list", SERVICE).split()
    assert "rpc Train ( .unslothd.v1.TrainRequest ) returns ( stream .unslothd.v1.TrainResponse );" in grpcurl(
        server.target, "describe", SERVICE
    )
    assert "learning_rate" in grpcurl(server.target, "describe", "unslothd.v1.TrainingConfig")


def test_grpcurl_trains_and_sees_every_event(server: RunningServer, prepared_model: str) -> None:
    (server.model_root / "grpcurl.jsonl").write_text(fake_row(steps=2))
    request = {"model_id": prepared_model, "train_dataset": {"path": "grpcurl.jsonl"}}
    output = grpcurl("-d", json.dumps(request), server.target, f"{SERVICE}/Train")
    sequences = [line.split('"')[3] for line in output.splitlines() if '"sequence"' in line]
    assert sequences == [str(number) for number in range(1, 8)]
    assert '"succeeded"' in output


def test_grpcurl_shows_the_details_of_an_error(server: RunningServer) -> None:
    output = grpcurl("-d", '{"model_id": "nobody"}', server.target, f"{SERVICE}/GetModel", code=64 + 5)
    assert "MODEL_NOT_FOUND" in output


def test_buf_curl_calls_by_reflection(server: RunningServer) -> None:
    url = f"http://{server.target}/{SERVICE}/GetServerInfo"
    output = said(str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", url)
    assert "maxMessageBytes" in json.loads(output)["limits"]


@pytest.mark.parametrize("call", ["GetServerInfo", "WatchTraining"], ids=["unary", "streaming"])
def test_ghz_puts_load_on_a_call(server: RunningServer, prepared_model: str, call: str, tmp_path: Path) -> None:
    data = {"training_id": _finished_training(server, prepared_model)} if call == "WatchTraining" else {}
    report, protoset = tmp_path / "report.json", tmp_path / "unslothd.binpb"
    # ghz asks for the descriptor of the method, which the reflection of grpcio finds for services and messages only.
    said(str(BUF), "build", "--path", "protos/unslothd/v1", "-o", str(protoset))
    command = [
        tool("ghz"),
        "--insecure",
        "--protoset",
        str(protoset),
        "--call",
        f"{SERVICE}.{call}",
        "-d",
        json.dumps(data),
    ]
    said(*command, "-n", "200", "-c", "10", "-O", "json", "-o", str(report), server.target)
    assert json.loads(report.read_text())["statusCodeDistribution"] == {"OK": 200}


def _finished_training(server: RunningServer, model_id: str) -> str:
    (server.model_root / "ghz.jsonl").write_text(fake_row(steps=20))
    request = {"model_id": model_id, "train_dataset": {"path": "ghz.jsonl"}}
    output = grpcurl("-d", json.dumps(request), server.target, f"{SERVICE}/Train")
    return output.partition('"trainingId": "')[2].partition('"')[0]
