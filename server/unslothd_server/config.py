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

from unslothd_server.access.certificates import TlsFiles, check_certificate, check_key, read_content
from unslothd_server.logs import LogFormat

MIB = 1024 * 1024
GIB = 1024 * MIB


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def split_paths(value: object) -> object:
    """Splits several folders that are one text, as in PATH; leaves everything else."""
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


# Without links: workers refuse rows that a link leads to.
RealPath = Annotated[Path, AfterValidator(lambda path: _absolute(path).resolve())]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Folders = Annotated[tuple[AbsolutePath, ...], BeforeValidator(split_paths)]


class Settings(BaseModel):
    """What an operator can set. Sizes are bytes ("20MiB" is understood), times are seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    # Name → where the value came from, for settings that are not at their defaults.
    _sources: dict[str, str] = PrivateAttr(default_factory=dict[str, str])

    home: RealPath = Field(
        default=Path("~/.unslothd"), description="Folder for the server's state: workers, trainings, datasets."
    )
    output_root: AbsolutePath = Field(
        default=Path("unslothd-output"), description="Folder for adapters, checkpoints and logs of trainings."
    )
    model_roots: Folders = Field(
        default=(), description="Folders that models and datasets may be read from; repeat the flag for several."
    )
    allow_insecure_listen: bool = Field(
        default=False, description="Serve without TLS on an address that other hosts can reach."
    )
    allow_debuggers: bool = Field(
        default=False,
        description="Let debuggers and profilers of the server's own user in. Without it only root can read the "
        "server's memory and environment.",
    )
    tls_cert: AbsolutePath | None = Field(
        default=None, description="PEM file with the server's certificate and those between it and its authority."
    )
    tls_key: AbsolutePath | None = Field(
        default=None, description="PEM file with the private key of tls_cert, readable by the server's user only."
    )
    tls_client_ca: AbsolutePath | None = Field(
        default=None, description="PEM file with authorities; every caller then needs a client certificate of theirs."
    )
    tls_client_scope: Literal["read", "train", "admin", "none"] = Field(
        default="train", description="What a client certificate allows without a token; none: a token is needed too."
    )
    require_identity: Literal["auto", "yes", "no"] = Field(
        default="auto",
        description="Refuse callers without a token or client certificate. auto: with TLS on an address that other "
        "hosts can reach, and wherever client certificates are asked for.",
    )
    listen: str = Field(default="127.0.0.1:50051", description="HOST:PORT to serve on; port 0 takes a free one.")
    log_format: LogFormat = Field(
        default="auto", description="Lines of the log on stderr, for people or as JSON; auto: people on a terminal."
    )
    metrics_listen: str = Field(
        default="",
        description="PORT or HOST:PORT to serve Prometheus metrics on, http://HOST:PORT/metrics, without TLS or "
        "tokens; a PORT alone is of 127.0.0.1. Empty: none.",
    )
    on_shutdown: Literal["pause", "continue"] = Field(
        default="pause",
        description="What trainings do when the server stops: pause with a checkpoint, or go on without it. Either way "
        "the next server on this home goes on with them.",
    )
    trust_remote_code: bool = Field(default=False, description="Run code that model repositories bring along.")
    max_message_bytes: ByteSize = Field(
        default=ByteSize(10 * MIB), ge=MIB, le=64 * MIB, description="Largest request; larger rows are uploaded."
    )
    max_inline_bytes: ByteSize = Field(
        default=ByteSize(4 * MIB), ge=1, le=4 * MIB, description="Most inline rows of a dataset in a request."
    )
    max_dataset_bytes: ByteSize = Field(default=ByteSize(50 * GIB), ge=MIB, description="Largest uploaded dataset.")
    max_loaded_models: int = Field(default=8, ge=1, le=1000, description="Most models at a time.")
    warm_workers: int = Field(
        default=1,
        ge=0,
        le=16,
        description="Spare workers that have Unsloth imported before a model is loaded; each holds about 1 GB of RAM "
        "and 0.7 GiB of the first GPU. 0 = none.",
    )
    max_queued_trainings: int = Field(
        default=100, ge=1, le=100_000, description="Most trainings that wait for their turn on one model."
    )
    max_requests_per_second: float = Field(
        default=100.0, gt=0, description="Most calls a second of one caller, over some time."
    )
    max_request_burst: int = Field(
        default=200, ge=1, description="Calls of one caller that may come at once after a time without any."
    )
    max_streams: int = Field(default=100, ge=1, description="Most streams that one caller has open at a time.")
    max_deadline_seconds: float = Field(
        default=604_800.0, gt=0, description="Longest deadline that a call may have; one without a deadline is taken."
    )
    upload_idle_seconds: float = Field(
        default=60.0, gt=0, description="A call whose sender is silent for so long in its middle is ended."
    )
    min_upload_bytes_per_second: float = Field(
        default=10_240.0,
        ge=0,
        description="An upload that is slower, over more than upload_idle_seconds of waiting for its sender, is ended; "
        "0 = none is.",
    )
    keepalive_seconds: float = Field(
        default=20.0,
        ge=1,
        description="A connection that is silent for so long is dropped unless its end answers within half of it.",
    )
    audit_log_bytes: ByteSize = Field(
        default=ByteSize(16 * MIB), ge=1024, description="Size at which audit.jsonl in the home is turned over."
    )
    audit_log_files: int = Field(default=8, ge=1, le=1000, description="Older files of the audit log that are kept.")
    stall_seconds: float = Field(
        default=1800.0, ge=1, description="A training that does nothing for so long has hung, and gets another worker."
    )
    heartbeat_seconds: float = Field(
        default=5.0, gt=0, le=60, description="How often a watcher hears of a training in which nothing happens."
    )

    @field_validator("tls_cert")
    @classmethod
    def _good_certificate(cls, cert: Path | None) -> Path | None:
        if cert is not None:
            check_certificate(cert)
        return cert

    @field_validator("tls_key")
    @classmethod
    def _good_key_of_the_certificate(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        if key is not None:
            check_key(key)
        if "tls_cert" in info.data:
            cert = info.data["tls_cert"]
            if (key is None) != (cert is None):
                raise ValueError("a certificate and its key go together: set both --tls-cert and --tls-key, or neither")
            if key is not None and cert is not None:
                read_content(TlsFiles(cert, key))
        return key

    @field_validator("tls_client_ca")
    @classmethod
    def _good_authorities(cls, client_ca: Path | None, info: ValidationInfo) -> Path | None:
        if client_ca is not None:
            check_certificate(client_ca)
            if not info.data.get("tls_cert", True):
                raise ValueError("client certificates need TLS: set --tls-cert and --tls-key too")
        return client_ca

    @field_validator("listen")
    @classmethod
    def _loopback_or_consent(cls, listen: str, info: ValidationInfo) -> str:
        host, _ = split_address(listen)
        # A setting that is wrong by itself is missing in data; it is told already.
        secure = info.data.get("allow_insecure_listen", True) or info.data.get("tls_cert", True)
        if not secure and not is_loopback(host):
            raise ValueError(
                f"{host} can be reached by other hosts. Name a certificate with --tls-cert and --tls-key; or listen on "
                "127.0.0.1 and use an SSH tunnel; or add --allow-insecure-listen if the network is yours"
            )
        return listen

    @field_validator("metrics_listen")
    @classmethod
    def _address_of_metrics(cls, listen: str) -> str:
        if not listen:
            return ""
        address = f"127.0.0.1:{listen}" if listen.isdecimal() else listen
        split_address(address)
        return address

    @property
    def asks_who_calls(self) -> bool:
        """Callers need a token or a client certificate."""
        if self.require_identity != "auto":
            return self.require_identity == "yes"
        exposed = self.tls_cert is not None and not is_loopback(split_address(self.listen)[0])
        return exposed or self.tls_client_ca is not None

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
