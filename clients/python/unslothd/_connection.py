"""Which server a client talks to, how it is trusted, and as whom: from arguments, environment and a profile.

Each setting is taken from the first place that has it: the argument (on the command line: the flag), the environment
variable, the profile, the default. A profile's token goes to the profile's own target and nowhere else, and no token
goes over a plain connection to another host, be it this service's or the Hub's.
"""

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

import grpc

from unslothd import _profiles

DEFAULT_TARGET = "127.0.0.1:50051"
VARIABLES = {
    "target": "UNSLOTHD_TARGET",
    "token": "UNSLOTHD_TOKEN",
    "token_file": "UNSLOTHD_TOKEN_FILE",
    "ca": "UNSLOTHD_CA",
    "client_cert": "UNSLOTHD_CLIENT_CERT",
    "client_key": "UNSLOTHD_CLIENT_KEY",
    "tls": "UNSLOTHD_TLS",
    "profile": "UNSLOTHD_PROFILE",
}
# A file in PEM, or what it holds.
Pem = str | PathLike[str] | bytes

_SWITCH = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}
# What a header can carry; anything else would end in gRPC's own error, which quotes the token.
_TOKEN = re.compile(r"[\x21-\x7e]+")


class ConnectionOptions(TypedDict, total=False):
    """What says where a server is and how to reach it; None = not given."""

    target: str | None
    token: str | None
    token_file: str | PathLike[str] | None
    ca: Pem | None
    client_certificate: Pem | None
    client_key: Pem | None
    tls: bool | None
    profile: str | None


@dataclass(frozen=True)
class Connection:
    """A way to a server.

    Args:
        target: HOST:PORT.
        credentials: For TLS; None = plain text.
        headers: Sent with every call.
        options: gRPC channel options that belong to this way.
    """

    target: str
    credentials: grpc.ChannelCredentials | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def exposed(self) -> bool:
        """Others could read what is sent: it goes to another host without TLS."""
        return self.credentials is None and not is_this_host(self.target)


def resolve(
    given: ConnectionOptions,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    metadata: Mapping[str, str] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Connection:
    """Returns the way to the server that these settings describe.

    Args:
        given: Arguments; they win over everything else.
        credentials: gRPC's own, in place of ca, client_certificate and client_key.
        metadata: Headers of the user's own.
        environment: Variables, see VARIABLES.

    Raises:
        ValueError: They cannot be used; the text has a line for each problem and never a token.
    """
    values = _layered(given, environment)
    problems: list[str] = []
    target = values.text("target") or DEFAULT_TARGET
    token = _token(values, problems)
    secure = credentials if credentials is not None else _credentials(values, problems)
    headers = {name.lower(): value for name, value in (metadata or {}).items()}
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    # What stays on this host needs no proxy, which would see it in plain text.
    options = {"grpc.enable_http_proxy": 0} if is_this_host(target) else {}
    connection = Connection(target, secure, headers, options)
    if "authorization" in headers and connection.exposed and not problems:
        problems.append(in_plain_text("token", target))
    if problems:
        raise ValueError("\n".join(problems))
    return connection


def in_plain_text(what: str, target: str) -> str:
    """Returns why something secret is not sent to a target, and what to do instead."""
    return (
        f"a {what} for {target} would travel in plain text: use TLS (--ca, UNSLOTHD_CA or ca=… if the server's "
        "certificate is of an authority of your own, --tls, UNSLOTHD_TLS=1 or tls=True if it is of a public one), "
        "or an SSH tunnel to 127.0.0.1"
    )


def is_this_host(target: str) -> bool:
    """True when what is sent to a target never leaves this machine; False where that is not sure."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    address = re.sub(r"^(dns:(///)?|ipv4:|ipv6:)", "", target)
    host = address.rpartition(":")[0] if re.search(r":\d+$", address) else address
    host = host.removeprefix("[").removesuffix("]").lower()
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Values:
    """Settings of all places, each with the place that it was first found in."""

    def __init__(self) -> None:
        self._values: dict[str, object] = {}

    def add(self, values: Mapping[str, object]) -> None:
        """Takes what is not there yet. A token and the file of one are two ways to say the same thing."""
        new = {key: value for key, value in values.items() if value not in (None, "") and key not in self._values}
        if {"token", "token_file"} & set(self._values):
            new = {key: value for key, value in new.items() if key not in {"token", "token_file"}}
        # A certificate and its key come from one place.
        if {"client_cert", "client_key"} & set(self._values):
            new = {key: value for key, value in new.items() if key not in {"client_cert", "client_key"}}
        self._values |= new

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def text(self, name: str) -> str:
        return str(self._values.get(name) or "")


def _layered(given: ConnectionOptions, environment: Mapping[str, str]) -> _Values:
    values = _Values()
    arguments: dict[str, object] = {**given, "client_cert": given.get("client_certificate")}
    variables: dict[str, object] = {name: environment.get(variable) for name, variable in VARIABLES.items()}
    values.add(arguments)
    if values.get("tls") is None and variables["tls"]:
        variables["tls"] = _switch(str(variables["tls"]))
    values.add(variables)
    values.add(_profile(arguments, variables, values, _profiles.config_file(environment)))
    return values


def _profile(
    arguments: Mapping[str, object], variables: Mapping[str, object], values: _Values, file: Path
) -> Mapping[str, object]:
    """Returns the profile that is asked for, if it is about the target that is asked for."""
    name, target = values.text("profile") or None, values.text("target")
    if name is None:
        # Somebody who names a server does not mean the default one, least of all its token.
        return {} if target else _profiles.read(file, None)
    profile = _profiles.read(file, name)
    own = profile.get("target")
    if not target or own in (None, target):
        return profile
    if arguments.get("target") and not arguments.get("profile"):
        return {}
    where = "the target given" if arguments.get("target") else VARIABLES["target"]
    raise ValueError(f"profile {name!r} is for {own}, but {where} is {target}: leave one of them out")


def _switch(text: str) -> bool:
    if text.lower() not in _SWITCH:
        raise ValueError(f"UNSLOTHD_TLS is {text!r}: write 1 or 0")
    return _SWITCH[text.lower()]


def _token(values: _Values, problems: list[str]) -> str | None:
    token, file = values.get("token"), values.get("token_file")
    if token is not None and file is not None:
        problems.append("a token and the file of a token are given: leave one of them out")
        return None
    if file is not None:
        token = token_in(Path(file).expanduser(), problems)
    if token is None:
        return None
    token = token.strip()
    if not is_token(token):
        what = f"{file} is no token" if file is not None else "the token is none"
        problems.append(f"{what}: it must be one word of ASCII characters, as `unslothd tokens create` printed it")
        return None
    return token


def token_in(file: Path, problems: list[str]) -> str | None:
    """Returns what the file of a token holds; None, and a problem more, when it cannot be read."""
    content = _content("token file", file, problems)
    if content is None:
        return None
    _profiles.warn_if_readable_by_others(file)
    return content.decode(errors="replace")


def is_token(text: str) -> bool:
    """True when a text has the form of a token: one word of ASCII characters."""
    return _TOKEN.fullmatch(text) is not None


def _credentials(values: _Values, problems: list[str]) -> grpc.ChannelCredentials | None:
    ca = _pem("ca", values.get("ca"), problems)
    certificate = _pem("client certificate", values.get("client_cert"), problems)
    key = _pem("client key", values.get("client_key"), problems)
    named = [values.get(name) is not None for name in ("ca", "client_cert", "client_key")]
    if named[1] != named[2]:
        problems.append("a client certificate and its key belong together: give both, or neither")
    tls = values.get("tls")
    if tls is False and any(named):
        problems.append("TLS is switched off, but a CA or a client certificate is given: leave one of them out")
    if problems or not (tls or any(named)):
        return None
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _pem(what: str, value: Pem | None, problems: list[str]) -> bytes | None:
    if value is None:
        return None
    content = value if isinstance(value, bytes) else _content(what, Path(value).expanduser(), problems)
    if content is not None and b"-----BEGIN " not in content:
        shown = "it" if isinstance(value, bytes) else str(value)
        problems.append(f"{what}: {shown} is not PEM (a text with -----BEGIN …)")
        return None
    return content


def _content(what: str, file: Path, problems: list[str]) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError as error:
        problems.append(f"{what}: {file} cannot be read: {error.strerror}")
        return None
