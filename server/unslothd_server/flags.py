"""Flags of a command from the settings: one for each, with its description and default."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from unslothd_server.config import Settings
from unslothd_server.config_sources import flag_of

_METAVARS = {Path: "PATH", ByteSize: "SIZE", int: "N", float: "NUMBER", str: "TEXT"}
_UNITS = ((1024**3, "GiB"), (1024**2, "MiB"))


def with_setting_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command a flag for each setting. It gets those that were given as `flags`: setting → text or bool.

    Texts are checked with the settings of all other sources and not by the command line, so that all problems are
    told at once.
    """

    @functools.wraps(command)
    def with_flags(**values: Any) -> None:
        flags = {name: values.pop(name) or None if name in several else values.pop(name) for name in fields}
        command(flags=flags, **values)

    fields = Settings.model_fields
    several = {name for name, field in fields.items() if get_origin(field.annotation) is tuple}
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "flags"]
    with_flags.__signature__ = inspect.Signature(  # type: ignore[attr-defined] - typer reads it
        [*(_parameter(name, field) for name, field in fields.items()), *own]
    )
    return with_flags


def default_text(field: FieldInfo) -> str:
    """Returns a setting's default for people; empty where it says nothing."""
    value = field.default
    if isinstance(value, ByteSize):
        return next((f"{value // size}{unit}" for size, unit in _UNITS if value % size == 0), str(int(value)))
    if value is None or value == () or value is False:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flag, kind = flag_of(name), field.annotation
    default = default_text(field)
    text = f"{field.description} (default {default})" if default else f"{field.description}"
    several = get_origin(kind) is tuple
    if kind is bool:
        annotation: Any = Annotated[bool | None, typer.Option(f"{flag}/--no-{flag.removeprefix('--')}", help=text)]
    else:
        metavar = "|".join(get_args(kind)) if get_origin(kind) is Literal else _METAVARS.get(_base(kind), "TEXT")
        option = typer.Option(flag, metavar=metavar, help=text)
        annotation = Annotated[list[str] | None, option] if several else Annotated[str | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _base(kind: Any) -> Any:
    """The type of one value: Path of tuple[Annotated[Path, …], …] and of Path | None."""
    parts = [part for part in get_args(kind) if part not in (type(None), Ellipsis)]
    return _base(parts[0]) if parts else kind
