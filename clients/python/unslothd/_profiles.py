"""The file with profiles, `config.toml`: how to reach which server, kept under a name."""

import logging
import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

# What a profile may hold; the flags of the command line have the same names.
TEXTS = ("target", "token")
FILES = ("token_file", "ca", "client_cert", "client_key")
SWITCHES = ("tls",)

DEFAULT = "default"
_log = logging.getLogger("unslothd")


def config_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the file lies: $XDG_CONFIG_HOME/unslothd/config.toml, by default below ~/.config."""
    # As the XDG specification has it, a relative path is as good as none.
    base = environment.get("XDG_CONFIG_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".config") / "unslothd" / "config.toml"


def read(file: Path, name: str | None) -> dict[str, object]:
    """Returns a profile: names of TEXTS, FILES (as absolute paths) and SWITCHES that it has.

    Args:
        file: The file with all profiles.
        name: Which one; None = the one that is called "default", if there is one.

    Raises:
        ValueError: The file cannot be used, or does not have the profile; the text has a line for each problem.
    """
    if name is None and not file.exists():
        return {}
    profiles = _profiles(file)
    if name is None and DEFAULT not in profiles:
        return {}
    if name is not None and name not in profiles:
        there = ", ".join(sorted(profiles)) or "none"
        raise ValueError(f"profile {name!r} is not in {file}; profiles there: {there}")
    name = name or DEFAULT
    profile = profiles[name]
    problems = _problems(name, profile)
    if problems:
        raise ValueError("\n".join(f"{file}: {each}" for each in problems))
    values = cast("dict[str, object]", profile)
    if "token" in values:
        warn_if_readable_by_others(file)
    return {key: _placed(value, file) if key in FILES else value for key, value in values.items()}


def warn_if_readable_by_others(file: Path) -> None:
    """Logs a warning about a file with a token that other users of this machine can read."""
    if os.name == "posix" and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        _log.warning("%s holds a token and can be read by others; run: chmod 600 %s", file, file)


def _profiles(file: Path) -> dict[str, object]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not TOML: it is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        # Newer Pythons keep the document in the error: it may hold tokens.
        raise ValueError(f"{file} is not TOML: {error}") from None
    profiles: object = content.get("profiles", {})
    if set(content) - {"profiles"} or not isinstance(profiles, dict):
        raise ValueError(f"{file} may hold tables called [profiles.NAME] and nothing else")
    return cast("dict[str, object]", profiles)


def _problems(name: str, profile: object) -> list[str]:
    where = f"profiles.{name}"
    if not isinstance(profile, dict):
        return [f"{where} is no table; write [{where}]"]
    values = cast("dict[str, object]", profile)
    known = (*TEXTS, *FILES, *SWITCHES)
    found = [f"{where}.{key} is not known; known are {', '.join(known)}" for key in values if key not in known]
    found += [f"{where}.{key} must be a text" for key in (*TEXTS, *FILES) if not isinstance(values.get(key, ""), str)]
    found += [f"{where}.{key} must be true or false" for key in SWITCHES if not isinstance(values.get(key, True), bool)]
    return found


def _placed(value: object, file: Path) -> str:
    """Paths of a profile start from its file's folder; "~" is the user's home."""
    return str(file.parent / Path(str(value)).expanduser())
