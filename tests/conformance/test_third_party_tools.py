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


@pytest.mark.parametrize(
    ("symbol", "kind"),
    [
        (f"{SERVICE}.Train", "a method"),
        ("unslothd.v1.TrainingConfig.learning_rate", "a field"),
        ("unslothd.v1.TrainingEvent.kind", "a one-of"),
        ("unslothd.v1.ErrorReason", "an enum"),
        ("grpc.health.v1.Health.Check", "a method"),
    ],
)
def test_grpcurl_describes_a_part_by_its_full_name(server: RunningServer, symbol: str, kind: str) -> None:
    assert grpcurl(server.target, "describe", symbol).startswith(f"{symbol} is {kind}:")


def test_grpcurl_is_told_that_a_method_does_not_exist(server: RunningServer) -> None:
    assert "not found" in grpcurl(server.target, "describe", f"{SERVICE}.Fly", code=1).lower()


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


def test_ghz_loads_a_unary_call_by_reflection(server: RunningServer, tmp_path: Path) -> None:
    assert ghz_statuses(server, "GetServerInfo", {}, tmp_path) == {"OK": 200}


def test_ghz_loads_a_streaming_call_by_reflection(server: RunningServer, prepared_model: str, tmp_path: Path) -> None:
    (server.model_root / "ghz.jsonl").write_text(fake_row(steps=20))
    request = {"model_id": prepared_model, "train_dataset": {"path": "ghz.jsonl"}}
    trained = grpcurl("-d", json.dumps(request), server.target, f"{SERVICE}/Train")
    training_id = trained.partition('"trainingId": "')[2].partition('"')[0]
    assert ghz_statuses(server, "WatchTraining", {"training_id": training_id}, tmp_path) == {"OK": 200}


def ghz_statuses(server: RunningServer, call: str, request: dict[str, str], folder: Path) -> dict[str, int]:
    """How 200 calls ended, ten at a time: name of the code → calls."""
    report = folder / "report.json"
    command = [tool("ghz"), "--insecure", "--call", f"{SERVICE}.{call}", "-d", json.dumps(request)]
    said(*command, "-n", "200", "-c", "10", "-O", "json", "-o", str(report), server.target)
    return json.loads(report.read_text())["statusCodeDistribution"]
