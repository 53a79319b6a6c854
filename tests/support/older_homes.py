"""Homes that older servers left (tests/data/state), put where a test wants them."""

import zipfile
from io import BytesIO
from pathlib import Path

from google.protobuf.json_format import MessageToJson, Parse
from google.protobuf.proto import serialize_length_prefixed

from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd_server.event_log import EventLogReader

_ARCHIVES = Path(__file__).parents[1] / "data" / "state"
_WAS_AT = "/srv/unslothd"
_TEXTS = {".json", ".jsonl"}


def unpack(commit: str, folder: Path) -> None:
    """Lays out what a commit's server left, byte for byte."""
    with zipfile.ZipFile(_ARCHIVES / f"home_of_{commit}.zip") as archive:
        archive.extractall(folder)


def move_in(commit: str, folder: Path) -> None:
    """As `unpack`, with every path in the files turned to where they are now."""
    unpack(commit, folder)
    for path in (folder / "home").rglob("*"):
        if path.suffix in _TEXTS:
            path.write_text(path.read_text().replace(_WAS_AT, str(folder)))
        elif path.name == "events.binpb":
            path.write_bytes(_moved_events(path, folder))


def _moved_events(path: Path, folder: Path) -> bytes:
    out = BytesIO()
    for entry in EventLogReader(path).read():
        text = MessageToJson(entry.event).replace(_WAS_AT, str(folder))
        serialize_length_prefixed(Parse(text, TrainingEvent()), out)
    return out.getvalue()
