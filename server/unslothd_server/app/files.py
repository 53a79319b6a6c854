"""Files: of state, replaced in one step and set aside when damaged; of results, opened only where they belong."""

import contextlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import structlog
from google.protobuf.json_format import ParseError

log = structlog.get_logger()

T = TypeVar("T")


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Replaces a file by JSON, whole or not at all, mode 0600. Raises OSError; the file is as it was then."""
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def read_or_set_aside(path: Path, parse: Callable[[dict[str, Any]], T]) -> T | None:
    """Returns what a file of state holds; None when that cannot be told, so that the server starts all the same.

    A damaged file gets another name, for people to look at; the log has both.

    Args:
        path: The file.
        parse: Makes something of its JSON object; raises KeyError, TypeError, ValueError or ParseError.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:  # it may be whole: the next start looks again
        log.warning("a file cannot be read and is passed over", file=str(path), error=str(error))
    except (ValueError, KeyError, TypeError, AttributeError, ParseError) as error:
        aside = path.with_name(f"{path.name}.unreadable")
        with contextlib.suppress(OSError):  # on a read-only disk it is passed over at every start
            path.replace(aside)
        log.warning("a file is damaged and set aside", file=str(path), now=str(aside), error=str(error))
    return None


def open_inside(path: Path, folder: Path) -> BufferedReader:
    """Opens a regular file for reading, and looks at what was opened: nothing can be swapped in between.

    Args:
        path: The file; its last part is no link.
        folder: Where it must really lie, links of the parts before followed.

    Raises:
        OSError: It is not there, is a link, a pipe or a device, or lies elsewhere.
    """
    # A pipe that nobody writes to would be waited for, without O_NONBLOCK.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    if regular and Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(folder.resolve()):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError("it lies in another place" if regular else "it is no regular file")
