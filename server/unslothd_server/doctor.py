"""`unslothd doctor`: looks at host, packages, folders and network, and says what to mend."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from unslothd_server.checks import host, network, packages
from unslothd_server.checks.access import access_findings, unused_token_findings
from unslothd_server.checks.finding import Finding, Level, count, lines, ok, problem
from unslothd_server.checks.monitoring import monitoring_findings
from unslothd_server.checks.start import folder_findings, model_root_findings, port_findings, state_finding
from unslothd_server.command_line import run_command
from unslothd_server.config import Settings
from unslothd_server.config_sources import ConfigError, load_settings
from unslothd_server.flags import with_setting_flags
from unslothd_server.home_lock import holder_of
from unslothd_server.workers.devices import HostDevices


def run(argv: list[str]) -> int:
    """Runs `unslothd doctor` with its arguments; returns the exit code: 0 all can work, 1 something cannot, 2 usage."""
    return run_command(doctor, "unslothd doctor", argv)


@with_setting_flags
def doctor(
    flags: dict[str, object],
    *,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML file with settings, as of serve.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out the import of Unsloth, which takes longest.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that the import of Unsloth may take.")] = 180,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Checks driver, packages, disks, port, folders, access, monitoring, Hub, clock and limits, and says what to mend.

    Give it the settings of the server, by the same flags, variables or file; run it as the server's user.

    Exit codes: 0 everything can work (there may be warnings); 1 something cannot; 2 wrong usage.
    """
    found: list[Finding] = []
    for finding in _findings(flags, config, None if quick else timeout):
        found.append(finding)
        if not as_json:
            print(*lines([finding]), sep="\n", flush=True)  # noqa: T201 - the report is what the command is for
    problems, warnings = count(found, Level.PROBLEM), count(found, Level.WARNING)
    if as_json:
        report = {"findings": [each.to_json() for each in found], "problems": problems, "warnings": warnings}
        print(json.dumps(report))  # noqa: T201
    else:
        print(f"problems: {problems}, warnings: {warnings}")  # noqa: T201
    raise typer.Exit(1 if problems else 0)


def _findings(flags: dict[str, object], config: Path | None, import_seconds: float | None) -> Iterator[Finding]:
    gpus = sum(device.device != "cpu" for device in HostDevices().list())
    try:
        settings = load_settings(flags, config=config)
    except ConfigError as error:
        yield from (
            problem("settings", line, "docs/configuration.md has all settings; what depends on them was not checked.")
            for line in str(error).splitlines()
        )
        settings = None
    yield from host.driver_findings()
    yield from packages.pin_findings()
    if import_seconds is not None:
        yield from packages.engine_findings(gpus, import_seconds)
    if settings is not None:
        yield from _findings_of_settings(settings)
    yield from host.limit_findings(gpus)
    yield host.llama_cpp_finding()


def _findings_of_settings(settings: Settings) -> Iterator[Finding]:
    holder = holder_of(settings.home)
    yield ok("server", "no server uses this home" if holder is None else f"process {holder} serves this home")
    yield state_finding(settings.home)
    yield from folder_findings(settings)
    yield host.mode_finding(settings.home)
    yield host.file_system_finding(settings.home)
    yield from access_findings(settings)
    yield from unused_token_findings(settings)
    yield from monitoring_findings(settings, os.environ)
    yield from model_root_findings(settings)
    yield from host.disk_findings(settings)
    if holder is None:
        yield from port_findings(settings)
    yield from network.hub_and_clock_findings(settings.home)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
