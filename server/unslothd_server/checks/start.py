"""What a start needs: its home for itself, folders that take writes, a free port, roots that are there."""

import os
import socket
from pathlib import Path
from typing import cast

from unslothd_server.checks.access import access_findings
from unslothd_server.checks.finding import Finding, Level, count, lines, ok, problem, warning
from unslothd_server.checks.monitoring import monitoring_findings
from unslothd_server.config import Settings, split_address
from unslothd_server.home_lock import holder_of
from unslothd_server.state_versions import NewerStateError, refuse_newer


def report_start(settings: Settings) -> int:
    """Prints the settings in force with their places, and what a start would find; 2 when it would be refused."""
    print("settings")  # noqa: T201 - the report is what the command is for
    for name in Settings.model_fields:
        value: object = getattr(settings, name)
        shown = ":".join(map(str, cast("tuple[object, ...]", value))) if isinstance(value, tuple) else value
        print(f"  {name:<24} {shown!s:<40} {settings.source_of(name)}")  # noqa: T201
    found = start_findings(settings)
    problems = count(found, Level.PROBLEM)
    print("checks", *lines(found), sep="\n")  # noqa: T201
    print(f"a start would be refused: problems: {problems}" if problems else "a start would be accepted")  # noqa: T201
    return 2 if problems else 0


def start_findings(settings: Settings) -> list[Finding]:
    """Returns what a start with these settings would find. A problem is what it would refuse."""
    return [
        _home_lock(settings.home),
        state_finding(settings.home),
        *folder_findings(settings),
        *port_findings(settings),
        *access_findings(settings),
        *monitoring_findings(settings, os.environ),
        *model_root_findings(settings),
    ]


def state_finding(home: Path) -> Finding:
    """Whether this server can read what is in the home."""
    try:
        refuse_newer(home)
    except NewerStateError as error:
        text, _, mend = str(error).partition(". Nothing was changed. ")
        return problem("state", text, mend)
    return ok("state", "this server reads all that is in the home")


def folder_findings(settings: Settings) -> list[Finding]:
    """Whether home and output root take writes, or can be made."""
    return [_writable("home", settings.home, "--home"), _writable("output root", settings.output_root, "--output-root")]


def model_root_findings(settings: Settings) -> list[Finding]:
    """Whether the folders of models and datasets can be read."""
    return [_model_root(root) for root in settings.model_roots]


def port_findings(settings: Settings) -> list[Finding]:
    """Whether the addresses can be listened on: each is taken for a moment, and nobody can connect meanwhile."""
    addresses = {"listen": settings.listen, "metrics listen": settings.metrics_listen}
    return [_port(name, address) for name, address in addresses.items() if address]


def _port(name: str, listen: str) -> Finding:
    host, port = split_address(listen)
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in places:
            with socket.socket(family, kind, protocol) as probe:
                # As gRPC does: what a server just left may be taken again.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        mend = f"Stop what listens there (ss -ltnp), or choose another address with --{name.replace(' ', '-')}."
        return problem(name, f"{listen} cannot be listened on ({error.strerror})", mend)
    return ok(name, f"{listen} is free")


def _home_lock(home: Path) -> Finding:
    try:
        holder = holder_of(home)
    except OSError as error:
        return problem("home lock", f"{home} cannot be read ({error.strerror})", "Let the server's user read it.")
    if holder is None:
        return ok("home lock", "no other server uses the home")
    return problem(
        "home lock",
        f"another server (process {holder}) uses the home {home}",
        "Stop it first, or give this one a folder of its own with --home.",
    )


def _writable(name: str, folder: Path, flag: str) -> Finding:
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir():
        return problem(name, f"{existing} is no folder", f"Move it away, or choose another folder with {flag}.")
    if not os.access(existing, os.W_OK | os.X_OK):
        return problem(
            name, f"{existing} cannot be written to", f"Make it writable for the server's user, or choose {flag}."
        )
    return ok(name, f"{folder} can be written to" if existing == folder else f"{folder} will be made")


def _model_root(root: Path) -> Finding:
    if not root.is_dir():
        return warning(
            "model root", f"{root} is no folder", "Make it or mount it; until then nothing is found below it."
        )
    if not os.access(root, os.R_OK | os.X_OK):
        return warning("model root", f"{root} cannot be read", "Let the server's user read it.")
    return ok("model root", f"{root} can be read")
