"""Versions of the files of state: a home that a newer server wrote is refused before anything in it is touched.

Older files are read for good, by the code that reads the newest. Newer ones are not half understood: a server that
took only what it knows would end workers that it cannot place and write files anew without what they held.
docs/decisions/0009-state-has-versions.md says when a version is raised.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from unslothd._version import __version__
from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap
from unslothd_server.access import tokens
from unslothd_server.app import artifacts, dataset_store, model_store, training_store
from unslothd_server.worker import exit_record, layout


class NewerStateError(Exception):
    """A newer server wrote files of this home; the text names them and the next step."""


def _json_version(path: Path) -> int:
    content: object = json.loads(path.read_text(encoding="utf-8"))
    version: object = content.get("version", 0) if isinstance(content, dict) else 0  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - any JSON
    return version if isinstance(version, int) else 0


def _bootstrap_version(path: Path) -> int:
    return WorkerBootstrap.FromString(path.read_bytes()).bootstrap_version


@dataclass(frozen=True)
class StateFile:
    """A kind of file below a home.

    Args:
        pattern: Where, relative to the home.
        newest: Highest version that this server reads.
        version_of: Reads the version of one; raises OSError, ValueError or DecodeError for a damaged file.
    """

    pattern: str
    newest: int
    version_of: Callable[[Path], int] = _json_version


# The version of training.json speaks for all of its folder: events.binpb and the rows.
STATE_FILES = (
    StateFile("models/*.json", model_store.STATE_VERSION),
    StateFile("trainings/*/training.json", training_store.STATE_VERSION),
    StateFile("datasets/*/meta.json", dataset_store.META_VERSION),
    StateFile("artifacts/*.json", artifacts.STATE_VERSION),
    StateFile("tokens.json", tokens.STATE_VERSION),
    StateFile("workers/*/bootstrap.binpb", layout.BOOTSTRAP_VERSION, _bootstrap_version),
    StateFile("workers/*/exit.json", exit_record.RECORD_VERSION),
)


def refuse_newer(home: Path) -> None:
    """Raises NewerStateError when a newer server wrote files of this home. Only reads."""
    newer = list(_newer(home))
    if not newer:
        return
    path, version, newest = newer[0]
    others = f" and {len(newer) - 1} more files" if len(newer) > 1 else ""
    raise NewerStateError(
        f"{path} has version {version}, and this server (unslothd {__version__}) reads up to {newest}{others}: a newer "
        "server wrote this home. Nothing was changed. Start that version again, or give this one a backup of before "
        "the upgrade with --home."
    )


def _newer(home: Path) -> Iterator[tuple[Path, int, int]]:
    for kind in STATE_FILES:
        for path in sorted(home.glob(kind.pattern)):
            version = _version(kind, path)
            if version > kind.newest:
                yield path, version, kind.newest


def _version(kind: StateFile, path: Path) -> int:
    """The version of a file; 0 when it cannot be told: whoever reads the file has to deal with that."""
    try:
        return kind.version_of(path)
    except (OSError, ValueError, DecodeError):
        return 0
