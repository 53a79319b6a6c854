"""Exports and downloads as tests make them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from support.calls import CALL_SECONDS
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.artifact_pb2 import Artifact, ArtifactFile, ExportProgress
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

LARGEST_CHUNK = 1 << 20


def exporting(stub: UnslothServiceStub, form: str = "MERGED_16BIT", **fields: Any) -> Iterator[pb.ExportModelResponse]:
    """Begins an export; yields its messages."""
    request = pb.ExportModelRequest(format=f"EXPORT_FORMAT_{form}", **fields)
    return stub.ExportModel(request, timeout=CALL_SECONDS)


def export(stub: UnslothServiceStub, form: str = "MERGED_16BIT", **fields: Any) -> Artifact:
    """Exports to the end and returns the artifact."""
    *_, last = exporting(stub, form, **fields)
    assert last.WhichOneof("result") == "artifact"
    return last.artifact


def phases(responses: Iterator[pb.ExportModelResponse]) -> tuple[list[ExportProgress], Artifact]:
    """The progress of an export, and its artifact."""
    *progress, last = responses
    return [each.progress for each in progress], last.artifact


@dataclass
class Downloaded:
    """Files that came, in the order of their coming; each is checked against its header when it is whole.

    Args:
        headers: As sent.
        contents: Bytes by name, from the offset on.
    """

    headers: list[ArtifactFile] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)


def download(stub: UnslothServiceStub, **fields: Any) -> Downloaded:
    """Downloads to the end."""
    result = Downloaded()
    for response in stub.DownloadArtifact(pb.DownloadArtifactRequest(**fields), timeout=CALL_SECONDS):
        if response.HasField("file"):
            result.headers.append(response.file)
            result.contents[response.file.name] = b""
        else:
            assert 0 < len(response.chunk) <= LARGEST_CHUNK
            result.contents[result.headers[-1].name] += response.chunk
    for header in result.headers:
        content = result.contents[header.name]
        if len(content) == header.num_bytes:
            assert hashlib.sha256(content).hexdigest() == header.sha256
    return result
