"""Settings of a server, one declaration each: its flag, its variable, its key in a file and its documentation.

`config_sources` reads the values; `flags` makes the flags; `scripts/configuration_page.py` the page. A check over
several settings is a field validator of the last of them, which finds the others in `info.data`: so it is told
together with all other problems.
"""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
)

MIB = 1024 * 1024
GIB = 1024 * MIB


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def split_paths(value: object) -> object:
    """Splits several folders that are one text, as in PATH; leaves everything else."""
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Folders = Annotated[tuple[AbsolutePath, ...], BeforeValidator(split_paths)]


class Settings(BaseModel):
    """What an operator can set. Sizes are bytes ("20MiB" is understood), times are seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    # Name → where the value came from, for settings that are not at their defaults.
    _sources: dict[str, str] = PrivateAttr(default_factory=dict[str, str])

    home: AbsolutePath = Field(
        default=Path("~/.unslothd"), description="Folder for the server's state: workers, trainings, datasets."
    )
    output_root: AbsolutePath = Field(
        default=Path("unslothd-output"), description="Folder for adapters, checkpoints and logs of trainings."
    )
    model_roots: Folders = Field(
        default=(), description="Folders that models and datasets may be read from; repeat the flag for several."
    )
    allow_insecure_listen: bool = Field(
        default=False, description="Serve without TLS and tokens on an address that other hosts can reach."
    )
    listen: str = Field(default="127.0.0.1:50051", description="HOST:PORT to serve on; port 0 takes a free one.")
    on_shutdown: Literal["pause", "continue"] = Field(
        default="pause",
        description="What trainings do when the server stops: pause with a checkpoint, or go on without it. Either way "
        "the next server on this home goes on with them.",
    )
    trust_remote_code: bool = Field(default=False, description="Run code that model repositories bring along.")
    max_message_bytes: ByteSize = Field(
        default=ByteSize(10 * MIB), ge=MIB, le=64 * MIB, description="Largest request; larger rows are uploaded."
    )
    max_dataset_bytes: ByteSize = Field(default=ByteSize(50 * GIB), ge=MIB, description="Largest uploaded dataset.")
    max_loaded_models: int = Field(default=8, ge=1, le=1000, description="Most models at a time.")
    max_queued_trainings: int = Field(
        default=100, ge=1, le=100_000, description="Most trainings that wait for their turn on one model."
    )
    stall_seconds: float = Field(
        default=1800.0, ge=1, description="A training that does nothing for so long has hung, and gets another worker."
    )
    heartbeat_seconds: float = Field(
        default=5.0, gt=0, le=60, description="How often a watcher hears of a training in which nothing happens."
    )

    @field_validator("listen")
    @classmethod
    def _loopback_or_consent(cls, listen: str, info: ValidationInfo) -> str:
        host, _ = split_address(listen)
        if not info.data.get("allow_insecure_listen", True) and not is_loopback(host):
            raise ValueError(
                f"{host} can be reached by other hosts, and this version serves without TLS and tokens. "
                "Listen on 127.0.0.1 and use an SSH tunnel, or add --allow-insecure-listen if the network is yours."
            )
        return listen

    def source_of(self, name: str) -> str:
        """Says where a setting's value came from, for people: its flag, variable or file, or "default"."""
        return self._sources.get(name, "default")


def split_address(listen: str) -> tuple[str, int]:
    """Splits HOST:PORT ("[::1]:50051" for IPv6). Raises ValueError with what is wrong."""
    host, separator, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:  # noqa: PLR2004 - the largest port
        raise ValueError(f'"{listen}" is not HOST:PORT; for example 127.0.0.1:50051')
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Says whether only this host reaches an address; a name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
