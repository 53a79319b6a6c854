"""Settings of a server: from flags, then UNSLOTHD_* variables, then defaults; every problem is told at once."""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIB = 1024 * 1024
GIB = 1024 * MIB


class ConfigError(Exception):
    """The settings cannot be used; the text has a line for each problem."""


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _split_paths(value: object) -> object:
    """In the environment several folders are one text, as in PATH."""
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class Settings(BaseSettings):
    """What an operator can set. Sizes are bytes, times are seconds."""

    model_config = SettingsConfigDict(env_prefix="UNSLOTHD_", extra="forbid")

    listen: str = Field(default="127.0.0.1:50051", description="HOST:PORT to serve on; port 0 takes a free one.")
    home: AbsolutePath = Field(default=Path("~/.unslothd"), validate_default=True, description="State of the server.")
    output_root: AbsolutePath = Field(
        default=Path("unslothd-output"), validate_default=True, description="Folder for results of trainings."
    )
    model_roots: Annotated[tuple[AbsolutePath, ...], NoDecode, BeforeValidator(_split_paths)] = Field(
        default=(), description="Folders that models and datasets may be read from."
    )
    allow_insecure_listen: bool = Field(
        default=False, description="Serve without TLS and tokens on an address that other hosts can reach."
    )
    on_shutdown: Literal["pause", "continue"] = Field(
        default="pause",
        description="What trainings do when the server stops: pause with a checkpoint until it is back, or go on.",
    )
    trust_remote_code: bool = Field(default=False, description="Run code that model repositories bring along.")
    max_message_bytes: int = Field(default=10 * MIB, ge=MIB, le=64 * MIB)
    max_dataset_bytes: int = Field(default=50 * GIB, ge=MIB)
    max_loaded_models: int = Field(default=8, ge=1, le=1000)
    max_queued_trainings: int = Field(default=100, ge=1, le=100_000)
    stall_seconds: float = Field(
        default=1800.0, ge=1, description="A training that does nothing for so long has hung, and gets another worker."
    )
    heartbeat_seconds: float = Field(default=5.0, gt=0, le=60)

    @model_validator(mode="after")
    def _loopback_or_consent(self) -> Self:
        host, _ = split_address(self.listen)
        if not self.allow_insecure_listen and not _is_loopback(host):
            raise ValueError(
                f"listen: {host} can be reached by other hosts, and this version serves without TLS and tokens. "
                "Listen on 127.0.0.1 and use an SSH tunnel, or add --allow-insecure-listen if the network is yours."
            )
        return self


def split_address(listen: str) -> tuple[str, int]:
    """Splits HOST:PORT ("[::1]:50051" for IPv6). Raises ValueError with what is wrong."""
    host, separator, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:  # noqa: PLR2004 - the largest port
        raise ValueError(f'listen: "{listen}" is not HOST:PORT; for example 127.0.0.1:50051')
    return host, int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_settings(**flags: object) -> Settings:
    """Builds the settings from flags that were given (None = not given) and the environment.

    Raises:
        ConfigError: With every problem, a line each.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type] - pydantic checks the values
    except ValidationError as error:
        raise ConfigError("\n".join(_problem(each) for each in error.errors())) from None


def _problem(error: ErrorDetails) -> str:
    where = ".".join(str(part) for part in error["loc"])
    text = error["msg"].removeprefix("Value error, ")
    return f"{where}: {text} (got {error['input']!r})" if where else text
