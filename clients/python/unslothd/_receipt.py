"""Checks a run's receipt against the files beside it and the data it was trained on (docs/receipts.md)."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast

from unslothd import errors
from unslothd._download_folder import file_sha256, stays_inside
from unslothd._flows import connection_lost
from unslothd._operations import Flow, Next, OpenStream, Sleep
from unslothd._retry import Retry
from unslothd.v1 import artifact_pb2, service_pb2

RECEIPT = "receipt.json"
_VERSION = 1
_MAX_BYTES = 64 * 1024 * 1024
# What of a receipt is used here, and of which kind it has to be.
_NEEDED: dict[str, type] = {"training_id": str, "files": dict, "datasets": dict}


class ReceiptError(ValueError):
    """A receipt that is missing, damaged, or of a version that this client does not know."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as the receipt says.

    Args:
        kind: What is wrong: the receipt itself cannot be read; a file is missing, is not in the receipt, has another
            size or other content; the receipt does not say which data it was.
        subject: Name of the file below the folder, or path of the data.
        text: For people: what differs and what to do.
    """

    kind: Literal["receipt", "missing", "extra", "size", "content", "data_unknown"]
    subject: str
    text: str


@dataclass(frozen=True)
class _File:
    num_bytes: int
    sha256: str


def read_receipt(folder: str | PathLike[str]) -> dict[str, Any]:
    """Returns the receipt in a folder, or of its path.

    Raises:
        ReceiptError: There is none, or it cannot be read.
    """
    path = _receipt_path(folder)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ReceiptError(
            f"{path} cannot be read ({error.strerror}); pass the folder of an adapter that holds a {RECEIPT}"
        ) from error
    return parse_receipt(content)


def parse_receipt(content: bytes) -> dict[str, Any]:
    """Returns the receipt that these bytes are.

    Raises:
        ReceiptError: They are none, or of an unknown version.
    """
    try:
        document: Any = json.loads(content)
    except ValueError as error:
        raise ReceiptError(f"{RECEIPT} is not JSON ({error}); fetch it again") from error
    receipt = _object(document)
    if receipt.get("receipt_version") != _VERSION:
        raise ReceiptError(
            f"{RECEIPT} has receipt_version {receipt.get('receipt_version')!r}, this client knows {_VERSION}: update it"
        )
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(receipt.get(name), kind)]
    wrong += [f"files.{name}" for name, entry in _object(receipt.get("files")).items() if _entry(entry) is None]
    if wrong:
        raise ReceiptError(f"{RECEIPT} has no proper {', '.join(wrong)}: it is damaged, fetch it again")
    return receipt


def verify_receipt(folder: str | PathLike[str], *, data: str | PathLike[str] | None = None) -> list[Finding]:
    """Checks the files beside a receipt, and the data, against it.

    Args:
        folder: The adapter's folder, or the receipt.json in it.
        data: File that the training was trained on.

    Returns:
        What differs; empty when everything is as the receipt says.
    """
    try:
        receipt = read_receipt(folder)
    except ReceiptError as error:
        return [Finding("receipt", RECEIPT, str(error))]
    return [*_compared(receipt, _files_of(_receipt_path(folder).parent, receipt)), *verify_data(receipt, data)]


def verify_data(receipt: Mapping[str, Any], data: str | PathLike[str] | None) -> list[Finding]:
    """Checks a file of rows against the receipt; nothing is found for None."""
    if data is None:
        return []
    path = Path(data)
    train, evaluation = (_object(receipt["datasets"].get(role)) for role in ("train", "eval"))
    wanted = _entry(train.get("file"))
    if wanted is None:
        source = json.dumps(train.get("source"))
        text = (
            f"{path}: the receipt names no single file of rows that it could be checked against; its source is {source}"
        )
        return [Finding("data_unknown", str(path), text)]
    if not path.is_file():
        return [Finding("missing", str(path), f"{path} is no file here; pass the rows that were trained on")]
    found = _File(path.stat().st_size, file_sha256(path))
    if found == wanted:
        return []
    if found == _entry(evaluation.get("file")):
        return [Finding("content", str(path), f"{path} holds the rows for evaluation; pass those that were trained on")]
    text = (
        f"{path} is not what was trained on: it has {found.num_bytes} bytes and sha256 {found.sha256}, the receipt "
        f"says {wanted.num_bytes} bytes and {wanted.sha256}. A run on it will not repeat this one"
    )
    return [Finding("content", str(path), text)]


def verify_on_server(training_id: str, retry: Retry) -> Flow[Any, tuple[dict[str, Any], list[Finding]]]:
    """Reads the final folder of a training from the server, keeping nothing, and checks its bytes.

    Not the hashes in the file headers: the server may have them from the receipt itself.

    Returns:
        The receipt, and what differs.
    """
    while True:
        try:
            content, found = yield from _read_files(training_id, retry)
        except errors.UnslothdError as error:
            if not connection_lost(error):
                raise
            yield Sleep(retry.next_delay(error))
        else:
            receipt = parse_receipt(content)
            return receipt, _compared(receipt, found)


def _read_files(training_id: str, retry: Retry) -> Flow[Any, tuple[bytes, dict[str, _File]]]:
    """Returns the bytes of the receipt, and size and hash of every other file."""
    checkpoint = artifact_pb2.TrainingCheckpoint(training_id=training_id)
    yield OpenStream("DownloadArtifact", service_pb2.DownloadArtifactRequest(checkpoint=checkpoint))
    name, content, found = "", bytearray(), dict[str, _File]()
    num_bytes, digest = 0, hashlib.sha256()
    while (message := (yield Next())) is not None:
        retry.progress()
        if message.HasField("file"):
            name, num_bytes, digest = message.file.name, 0, hashlib.sha256()
        num_bytes += len(message.chunk)
        digest.update(message.chunk)
        found[name] = _File(num_bytes, digest.hexdigest())
        if name == RECEIPT:
            content += message.chunk
            if len(content) > _MAX_BYTES:
                raise ReceiptError(f"{RECEIPT} of {training_id} has more than {_MAX_BYTES} bytes: it is none")
    if found.pop(RECEIPT, None) is None:
        raise ReceiptError(f"{training_id} has no {RECEIPT}: only a training that saved its adapter in full has one")
    return bytes(content), found


def _receipt_path(folder: str | PathLike[str]) -> Path:
    path = Path(folder).expanduser()
    return path / RECEIPT if path.is_dir() else path


def _object(value: Any) -> dict[str, Any]:
    """Returns a JSON object as it is, and an empty one in place of anything else."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _entry(entry: Any) -> _File | None:
    """Returns what a receipt says about a file, or None where it does not say it properly."""
    fields = _object(entry)
    num_bytes, sha256 = fields.get("num_bytes"), fields.get("sha256")
    return _File(num_bytes, sha256) if isinstance(num_bytes, int) and isinstance(sha256, str) else None


def _files_of(folder: Path, receipt: Mapping[str, Any]) -> dict[str, _File]:
    """Returns the files of a folder; only those of the right size are hashed, the others are wrong already."""
    found: dict[str, _File] = {}
    for path in _all_files(folder):
        name = path.relative_to(folder).as_posix()
        wanted, num_bytes = _entry(receipt["files"].get(name)), path.stat().st_size
        same_size = wanted is not None and wanted.num_bytes == num_bytes
        found[name] = _File(num_bytes, file_sha256(path) if same_size else "")
    found.pop(RECEIPT, None)
    return found


def _all_files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _compared(receipt: Mapping[str, Any], found: Mapping[str, _File]) -> list[Finding]:
    findings: list[Finding] = []
    for name, entry in sorted(receipt["files"].items()):
        wanted = cast(_File, _entry(entry))
        findings += _compared_file(name, wanted, found.get(name))
    for name in sorted(set(found) - set(receipt["files"])):
        text = f"{name} is not in the receipt: nothing vouches for it; move it away if you did not put it there"
        findings.append(Finding("extra", name, text))
    return findings


def _compared_file(name: str, wanted: _File, found: _File | None) -> list[Finding]:
    if not stays_inside(name):
        return [Finding("receipt", name, f"the receipt names {name!r}, outside of the folder: it cannot be trusted")]
    if found is None:
        return [Finding("missing", name, f"{name} is missing; download it again")]
    if found.num_bytes != wanted.num_bytes:
        text = f"{name} has {found.num_bytes} bytes, the receipt says {wanted.num_bytes}; download it again"
        return [Finding("size", name, text)]
    if found.sha256 != wanted.sha256:
        text = (
            f"{name} has other content than the training wrote: sha256 {found.sha256}, the receipt says "
            f"{wanted.sha256}; download it again"
        )
        return [Finding("content", name, text)]
    return []
