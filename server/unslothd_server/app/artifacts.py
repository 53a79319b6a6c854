"""The registry of exported artifacts: one file each below `<home>/artifacts`, known again after a restart."""

import json
import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path

import structlog
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from unslothd.v1.artifact_pb2 import Artifact, ExportFormat
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.app.files import write_json
from unslothd_server.errors import NotFoundError
from unslothd_server.export_folder import remove_partial

log = structlog.get_logger()

STATE_VERSION = 1


class Artifacts:
    """Artifacts that were exported, and the ones that are being written.

    Args:
        folder: Where their files of state are; made when missing. What an earlier server left half-written is removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._artifacts: dict[str, Artifact] = {}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in sorted(folder.glob("*.json")):
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            artifact, is_whole = _parsed(path)
        except (OSError, ValueError, KeyError, TypeError, ParseError) as error:
            log.warning("an artifact cannot be read", file=str(path), error=str(error))
            return
        if is_whole:
            self._artifacts[artifact.artifact_id] = artifact
        else:
            remove_partial(Path(artifact.path))
            path.unlink(missing_ok=True)

    def get(self, artifact_id: str) -> Artifact:
        """Returns an artifact whose folder is there. Raises NotFoundError (ARTIFACT_NOT_FOUND)."""
        artifact = self._artifacts.get(artifact_id)
        if artifact is None:
            raise NotFoundError(
                ErrorReason.ERROR_REASON_ARTIFACT_NOT_FOUND,
                f'No artifact "{artifact_id}" is known. The last message of ExportModel names the one that it wrote.',
            )
        if not Path(artifact.path).is_dir():
            raise NotFoundError(
                ErrorReason.ERROR_REASON_ARTIFACT_NOT_FOUND,
                f'The files of artifact "{artifact_id}" were deleted from {artifact.path}. Export it again.',
            )
        return artifact

    def begin(self, folder: Path, form: "ExportFormat.ValueType") -> Artifact:
        """Notes that a folder is about to be written, so that the next server can clear up. Raises OSError."""
        artifact_id = f"artifact-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        artifact = Artifact(artifact_id=artifact_id, path=str(folder), format=form)
        self._save(artifact, is_whole=False)
        return artifact

    def finish(self, artifact: Artifact) -> None:
        """Keeps an artifact whose folder is whole. Raises OSError."""
        self._save(artifact, is_whole=True)
        self._artifacts[artifact.artifact_id] = artifact

    def discard(self, artifact: Artifact, *, folder_is_ours: bool) -> None:
        """Removes what there is of an artifact that was begun.

        Args:
            artifact: As `begin` returned it.
            folder_is_ours: The folder has its name already, but could not be kept.
        """
        remove_partial(Path(artifact.path))
        if folder_is_ours:
            shutil.rmtree(artifact.path, ignore_errors=True)
        self._path(artifact).unlink(missing_ok=True)

    def _save(self, artifact: Artifact, *, is_whole: bool) -> None:
        content = MessageToDict(artifact, preserving_proto_field_name=True)
        write_json(self._path(artifact), {"version": STATE_VERSION, "whole": is_whole, "artifact": content})

    def _path(self, artifact: Artifact) -> Path:
        return self._folder / f"{artifact.artifact_id}.json"


def _parsed(path: Path) -> tuple[Artifact, bool]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["version"] != STATE_VERSION:
        raise ValueError(f"version {content['version']} is not known")
    return ParseDict(content["artifact"], Artifact(), ignore_unknown_fields=True), bool(content["whole"])
