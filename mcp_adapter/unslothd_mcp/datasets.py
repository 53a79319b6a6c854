"""Datasets as agents name them: rows, a Hub name, a path on the server, a dataset id, or an object that says which."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias, cast

from pydantic import WithJsonSchema

import unslothd
from unslothd.errors import FieldViolation
from unslothd_mcp.errors import ToolFailure, invalid

_ID = re.compile(r"sha256:[0-9a-f]{64}")
_HUB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
_ROWS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "object"}, "description": "The rows themselves."}
_FORMS = (
    'rows [{"text": "…"}, …]; "org/name" of the Hub; "/path/on/the/server.jsonl"; "sha256:…" of a stored dataset; or '
    'one of {"rows": […]}, {"hub": "org/name", "split": "train"}, {"path": "…"}, {"dataset_id": "sha256:…"}, '
    '{"file": "/path/on/the adapter\'s machine"}'
)
# Which keys an object may have, by the one that says what it is.
_KEYS: dict[str, frozenset[str]] = {
    "rows": frozenset(),
    "hub": frozenset({"config", "split", "revision"}),
    "path": frozenset(),
    "dataset_id": frozenset(),
    "file": frozenset(),
}

DatasetArgument: TypeAlias = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                _ROWS_SCHEMA,
                {"type": "string", "description": "Hub name, path on the server, or dataset id."},
                {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "rows": _ROWS_SCHEMA,
                        "hub": {"type": "string", "description": "Dataset of the Hub, org/name."},
                        "config": {"type": "string", "description": "Subset, with hub. Default: the dataset's own."},
                        "split": {"type": "string", "description": 'With hub. Default "train".'},
                        "revision": {
                            "type": "string",
                            "description": 'Branch, tag or commit, with hub. Default "main".',
                        },
                        "path": {"type": "string", "description": "File or folder on the server."},
                        "dataset_id": {"type": "string", "description": '"sha256:…", from unsloth_upload_dataset.'},
                        "file": {"type": "string", "description": "File of the adapter's machine, if it allows any."},
                    },
                    "description": "Exactly one of rows, hub, path, dataset_id and file.",
                },
            ],
            "description": f"Rows to train on: {_FORMS}.",
        }
    ),
]


def dataset(value: object, argument: str, roots: Sequence[Path]) -> unslothd.DatasetLike:
    """Returns what the client takes for a dataset argument.

    Args:
        value: As the agent gave it.
        argument: Its name, for error texts.
        roots: Folders whose files may be read.

    Raises:
        ToolFailure: INVALID_FIELD: none of the forms. FILE_NOT_ALLOWED: a file outside of the roots.
    """
    match value:
        case str():
            return _named(value, argument)
        case list():
            return _rows(cast(list[object], value), argument)
        case Mapping():
            return _object(cast(Mapping[str, object], value), argument, roots)
        case _:
            raise _wrong(argument, f"a {type(value).__name__} is no dataset")


def local_file(path: str, roots: Sequence[Path]) -> Path:
    """Returns a file of this machine that may be read, symbolic links followed.

    Raises:
        ToolFailure: FILE_NOT_ALLOWED: it is outside of the roots, or no file.
    """
    real = Path(path).expanduser().resolve()
    if any(real.is_relative_to(root.resolve()) for root in roots):
        if real.is_file():
            return real
        text = f"{path} is no file."
    else:
        allowed = ", ".join(map(str, roots)) or "none: the adapter was started without --allowed-root"
        text = f"{path} is outside of the folders that may be read ({allowed})."
    raise ToolFailure("FILE_NOT_ALLOWED", text, code="PERMISSION_DENIED")


def _named(text: str, argument: str) -> unslothd.DatasetLike:
    if _ID.fullmatch(text):
        return unslothd.UploadedDataset(text)
    if text.startswith(("/", "./")) or text.lower().endswith(_SUFFIXES):
        return unslothd.ServerPath(text)
    if _HUB.fullmatch(text):
        return unslothd.HubDataset(text)
    raise _wrong(argument, f"{text!r} can be a Hub name, a path or an id")


def _rows(rows: Sequence[object], argument: str) -> unslothd.DatasetLike:
    wrong = [number for number, row in enumerate(rows, start=1) if not isinstance(row, Mapping)]
    if wrong:
        raise _wrong(argument, f'row {wrong[0]} is no object of columns; plain texts are [{{"text": "…"}}, …]')
    return cast(list[Mapping[str, Any]], list(rows))


def _object(value: Mapping[str, object], argument: str, roots: Sequence[Path]) -> unslothd.DatasetLike:
    kinds = [key for key in value if key in _KEYS]
    if len(kinds) != 1:
        raise _wrong(argument, f"exactly one of {', '.join(_KEYS)} is needed, here {', '.join(kinds) or 'none'}")
    (kind,) = kinds
    unknown = set(value) - {kind} - _KEYS[kind]
    if unknown:
        raise _wrong(argument, f"{', '.join(sorted(unknown))} cannot go with {kind}")
    if kind == "rows":
        rows = value["rows"]
        if not isinstance(rows, list):
            raise _wrong(argument, "rows is no list")
        return _rows(cast(list[object], rows), argument)
    texts = {key: each for key, each in value.items() if isinstance(each, str)}
    if len(texts) != len(value):
        raise _wrong(argument, f"{', '.join(sorted(set(value) - set(texts)))} is no text")
    main = texts.pop(kind)
    if kind == "file":
        return local_file(main, roots)
    if kind == "hub":
        return unslothd.HubDataset(main, **texts)
    return unslothd.ServerPath(main) if kind == "path" else unslothd.UploadedDataset(main)


def _wrong(argument: str, what: str) -> ToolFailure:
    return invalid(FieldViolation(argument, f"{what}. Pass {_FORMS}"))
