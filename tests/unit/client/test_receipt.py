"""A receipt is checked against the files beside it, the files on the server, and the data."""

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

import unslothd
from support.scripted_server import Handler, Say
from unslothd.v1 import artifact_pb2, service_pb2

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "sub/tokenizer.json": b"tokens"}
ROWS, EVAL_ROWS = b'{"text": "a"}\n', b'{"text": "b"}\n'


def entry(content: bytes) -> dict[str, object]:
    return {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def a_receipt(**changes: object) -> dict[str, object]:
    datasets = {
        role: {"source": {"path": f"/data/{role}.jsonl"}, "file": entry(rows)}
        for role, rows in (("train", ROWS), ("eval", EVAL_ROWS))
    }
    files = {name: entry(content) for name, content in FILES.items()}
    return {"receipt_version": 1, "training_id": "t", "files": files, "datasets": datasets, **changes}


def written(folder: Path, receipt: object) -> Path:
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "receipt.json").write_text(receipt if isinstance(receipt, str) else json.dumps(receipt))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "final", a_receipt())


def found(folder: Path, **more: object) -> list[tuple[str, str]]:
    return [(each.kind, each.subject) for each in unslothd.verify_receipt(folder, **more)]


def test_nothing_is_found_where_everything_is_as_it_was_written(folder):
    assert found(folder) == []
    assert found(folder / "receipt.json") == []


def test_every_difference_of_the_files_is_told(folder):
    (folder / "adapter_config.json").write_bytes(b"{ }")
    (folder / "adapter_model.safetensors").write_bytes(b"WEIGHTS")
    (folder / "sub/tokenizer.json").unlink()
    (folder / "sub/more.bin").write_bytes(b"")
    assert found(folder) == [
        ("size", "adapter_config.json"),
        ("content", "adapter_model.safetensors"),
        ("missing", "sub/tokenizer.json"),
        ("extra", "sub/more.bin"),
    ]
    texts = [each.text for each in unslothd.verify_receipt(folder)]
    assert "has 3 bytes, the receipt says 2; download it again" in texts[0]
    assert hashlib.sha256(b"weights").hexdigest() in texts[1]


def test_the_data_is_checked_by_its_bytes(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(ROWS)
    assert found(folder, data=rows) == []
    rows.write_bytes(EVAL_ROWS)
    assert "the rows for evaluation" in unslothd.verify_receipt(folder, data=rows)[0].text
    rows.write_bytes(b"other")
    assert found(folder, data=rows) == [("content", str(rows))]
    assert found(folder, data=tmp_path / "none") == [("missing", str(tmp_path / "none"))]


def test_data_that_the_receipt_does_not_know_as_a_file_is_said(tmp_path):
    datasets = {"train": {"source": {"hub": {"name": "org/name"}}, "fingerprint": "7"}}
    folder = written(tmp_path / "final", a_receipt(datasets=datasets))
    (finding,) = unslothd.verify_receipt(folder, data=folder / "receipt.json")
    assert finding.kind == "data_unknown"
    assert "org/name" in finding.text


@pytest.mark.parametrize(
    ("receipt", "text"),
    [
        ("{", "is not JSON"),
        ("[]", "receipt_version None"),
        (a_receipt(receipt_version=2), "receipt_version 2, this client knows 1: update it"),
        (a_receipt(files=[]), "no proper files"),
        (a_receipt(files={"a": {"num_bytes": "7"}}), r"no proper files\.a"),
        (a_receipt(datasets=None), "no proper datasets"),
    ],
)
def test_a_receipt_that_cannot_be_read_is_a_finding_of_its_own(tmp_path, receipt, text):
    folder = written(tmp_path / "final", receipt)
    assert found(folder) == [("receipt", "receipt.json")]
    with pytest.raises(unslothd.ReceiptError, match=text):
        unslothd.read_receipt(folder)


def test_a_folder_without_a_receipt_is_said(tmp_path):
    (finding,) = unslothd.verify_receipt(tmp_path)
    assert (finding.kind, finding.subject) == ("receipt", "receipt.json")
    assert "No such file" in finding.text


def test_a_receipt_that_names_a_file_outside_of_its_folder_is_not_believed(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    folder = written(tmp_path / "final", a_receipt(files={"../x": entry(b"x")}))
    assert ("receipt", "../x") in found(folder)


def verify_sync(target: str, **more: object) -> list[unslothd.Finding]:
    with unslothd.Client(target) as client:
        return client.verify_receipt("t", **more)


def verify_async(target: str, **more: object) -> list[unslothd.Finding]:
    async def main() -> list[unslothd.Finding]:
        async with asyncio.timeout(30), unslothd.AsyncClient(target) as client:
            return await client.verify_receipt("t", **more)

    return asyncio.run(main())


def serving(say: type[Say], files: dict[str, bytes]) -> Handler:
    """Sends files whose headers repeat what the receipt says, as a server may."""
    messages: list[service_pb2.DownloadArtifactResponse] = []
    for name, content in sorted(files.items()):
        header = artifact_pb2.ArtifactFile(name=name, **entry(FILES.get(name, content)))
        messages.append(service_pb2.DownloadArtifactResponse(file=header))
        messages += [service_pb2.DownloadArtifactResponse(chunk=content[i : i + 4]) for i in range(0, len(content), 4)]
    return say.messages(*messages)


@pytest.mark.parametrize("verify", [verify_sync, verify_async])
def test_the_result_of_a_training_is_checked_by_the_bytes_on_the_server(server, say, tmp_path, verify):
    files = {**FILES, "receipt.json": json.dumps(a_receipt()).encode()}
    server.script.on("DownloadArtifact", say.messages(then=say.lose()), serving(say, files))
    assert verify(server.target) == []
    del files["adapter_config.json"]
    files |= {"adapter_model.safetensors": b"WEIGHTS", "more": b""}
    server.script.on("DownloadArtifact", serving(say, files))
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"other")
    assert [(each.kind, each.subject) for each in verify(server.target, data=rows)] == [
        ("missing", "adapter_config.json"),
        ("content", "adapter_model.safetensors"),
        ("extra", "more"),
        ("content", str(rows)),
    ]


def test_a_training_without_a_receipt_is_said(server, say):
    server.script.on("DownloadArtifact", serving(say, FILES))
    with pytest.raises(unslothd.ReceiptError, match=r"t has no receipt\.json"):
        verify_sync(server.target)
