"""Where settings come from: flags, then UNSLOTHD_* variables, then a TOML file, then defaults.

Every problem of every source is told at once, with the flag, variable or key that it stands at.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from unslothd_server.config import Settings, split_paths

PREFIX = "UNSLOTHD_"
CONFIG_VARIABLE = "UNSLOTHD_CONFIG"
SYSTEM_FILE = Path("/etc/unslothd/server.toml")
# A variable that is almost a setting's is a slip of the pen; others may be a client's or a script's.
_ALMOST = 0.9


class ConfigError(Exception):
    """The settings cannot be used; the text has a line for each problem."""


def flag_of(name: str) -> str:
    """Returns the flag of a setting: --max-loaded-models; one of several values has the singular, --model-root."""
    return "--" + (name.removesuffix("s") if _holds_several(name) else name).replace("_", "-")


def variable_of(name: str) -> str:
    """Returns the environment variable of a setting."""
    return PREFIX + name.upper()


def default_files() -> tuple[Path, Path]:
    """Returns the files that are looked for when none is named; the first that is there is read, and no other."""
    user = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return user / "unslothd" / "server.toml", SYSTEM_FILE


def load_settings(flags: Mapping[str, object] | None = None, *, config: Path | None = None) -> Settings:
    """Reads the settings from all sources.

    Args:
        flags: Setting → value of the flags that were given; None = not given.
        config: The file of --config; None = that of UNSLOTHD_CONFIG (empty = none), else of the usual places.

    Raises:
        ConfigError: With every problem, a line each.
    """
    problems: list[str] = []
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    # The weakest comes first; each next one wins.
    layers = (_file_values(config, problems), _variables(problems), _given(flags or {}))
    for layer in layers:
        for name, (value, source) in layer.items():
            values[name], sources[name] = value, source
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        problems += [_problem(each, sources) for each in error.errors()]
    else:
        settings._sources.update(sources)  # pyright: ignore[reportPrivateUsage] - ours to fill
        if not problems:
            return settings
    raise ConfigError("\n".join(problems))


def _given(flags: Mapping[str, object]) -> dict[str, tuple[object, str]]:
    return {name: (value, flag_of(name)) for name, value in flags.items() if value is not None}


def _variables(problems: list[str]) -> dict[str, tuple[object, str]]:
    known = {variable_of(name): name for name in Settings.model_fields}
    found: dict[str, tuple[object, str]] = {}
    for variable, value in os.environ.items():
        if variable in known:
            found[known[variable]] = (value, variable)
        elif variable.startswith(PREFIX) and variable != CONFIG_VARIABLE and (near := _near(variable, known, _ALMOST)):
            problems.append(f"{variable}: no setting has this variable{near}")
    return found


def _file_values(config: Path | None, problems: list[str]) -> dict[str, tuple[object, str]]:
    path = _chosen_file(config)
    if path is None:
        return {}
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        problems.append(f"{path}: cannot be read: {reason}. Mend it, or name another file with --config")
        return {}
    found: dict[str, tuple[object, str]] = {}
    for name, value in content.items():
        if name in Settings.model_fields:
            found[name] = (_from_folder(path.parent, name, value), f"{name} in {path}")
        else:
            problems.append(f"{name} in {path}: there is no such setting{_near(name, Settings.model_fields)}")
    return found


def _chosen_file(config: Path | None) -> Path | None:
    named = os.environ.get(CONFIG_VARIABLE)
    if config is None and named is not None:
        config = Path(named) if named else None
        return config and config.expanduser().absolute()
    if config is not None:
        return config.expanduser().absolute()
    return next((path for path in default_files() if path.exists()), None)


def _from_folder(folder: Path, name: str, value: object) -> object:
    """Lets relative paths of a file start at the file's folder, wherever the server is started."""
    if not _holds_paths(name):
        return value
    if _holds_several(name):
        value = split_paths(value)
    if isinstance(value, list):
        return [_below(folder, each) for each in cast("list[object]", value)]
    return _below(folder, value)


def _below(folder: Path, value: object) -> object:
    return folder / Path(value).expanduser() if isinstance(value, str) else value


def _holds_several(name: str) -> bool:
    return getattr(Settings.model_fields[name].annotation, "__origin__", None) is tuple


def _holds_paths(name: str) -> bool:
    def mentions(kind: Any) -> bool:
        return kind is Path or any(mentions(part) for part in get_args(kind))

    return mentions(Settings.model_fields[name].annotation)


def _near(name: str, names: Iterable[str], least: float = 0.6) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=least)
    return f"; did you mean {near[0]}?" if near else ""


def _problem(error: ErrorDetails, sources: Mapping[str, str]) -> str:
    name = str(error["loc"][0])
    text = error["msg"].removeprefix("Value error, ")
    got = error["input"]
    return f"{sources.get(name, name)}: {text} (got {str(got) if isinstance(got, Path) else repr(got)})"
