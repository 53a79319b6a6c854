"""`unslothd serve`: reads the settings, serves until a signal, ends cleanly."""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer

from unslothd._version import __version__
from unslothd_server import access_setup, disk, logs
from unslothd_server.checks.start import report_start
from unslothd_server.command_line import run_command
from unslothd_server.config import Settings
from unslothd_server.config_sources import ConfigError, load_settings
from unslothd_server.errors import ExhaustedError
from unslothd_server.flags import with_setting_flags
from unslothd_server.hardening import close_to_debuggers, harden_process
from unslothd_server.home_lock import HomeLock, HomeTakenError
from unslothd_server.monitoring import Monitoring
from unslothd_server.rpc.server import RpcServer
from unslothd_server.service_setup import build_service
from unslothd_server.state_versions import NewerStateError, refuse_newer
from unslothd_server.workers.launcher import WORKER_COMMAND

_GRACE_SECONDS = 5.0

log = structlog.get_logger()


def run(argv: list[str]) -> int:
    """Runs `unslothd serve` with its arguments; returns the exit code: 0 ended by a signal, 1 could not, 2 usage."""
    return run_command(serve_command, "unslothd serve", argv)


@with_setting_flags
def serve_command(
    flags: dict[str, object],
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML file with settings. (default ~/.config/unslothd/server.toml, else /etc/unslothd/server.toml)",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what a start would refuse, and the settings in force; start nothing.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every call.")] = False,
) -> None:
    """Serves fine-tuning over gRPC until Ctrl-C.

    Every setting can be a flag, an environment variable (--home is UNSLOTHD_HOME) or a key of the file (home); a flag
    wins over the environment, and that over the file.

    Example: unslothd serve --listen 127.0.0.1:50051 --home ~/.unslothd --output-root ~/adapters --model-root ~/models
    """
    try:
        settings = load_settings(flags, config=config)
    except ConfigError as error:
        typer.echo(f"unslothd serve cannot start with these settings:\n{error}", err=True)
        raise typer.Exit(2) from None
    if check:
        raise typer.Exit(report_start(settings))
    logs.set_up(settings.log_format, verbose=verbose)
    try:
        asyncio.run(serve(settings))
    except (OSError, HomeTakenError, NewerStateError, ExhaustedError) as error:
        known = disk.unwritable(error, settings.home, "start again") if isinstance(error, OSError) else None
        typer.echo(f"unslothd serve: {error if known is None else known}", err=True)
        raise typer.Exit(1) from None


async def serve(settings: Settings, *, worker_command: tuple[str, ...] = WORKER_COMMAND) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        settings: Checked settings.
        worker_command: How a worker is started, without its folder; tests start doubles.
    """
    harden_process()
    if not settings.allow_debuggers:
        close_to_debuggers()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    for folder in (settings.home, settings.output_root):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = HomeLock(settings.home)  # before anything that an earlier server left is touched
    refuse_newer(settings.home)
    service = await build_service(settings, worker_command=worker_command)
    audit = access_setup.audit_log(settings)
    monitoring = Monitoring(settings, service)
    server = RpcServer(
        service,
        access_setup.gate(settings),
        access_setup.call_limits(settings),
        audit,
        keepalive_seconds=settings.keepalive_seconds,
        observers=monitoring.observers,
    )
    port = await server.start(settings.listen, access_setup.certificate(settings))
    host = settings.listen.rpartition(":")[0]
    # Scripts and tests wait for this line, on stdout.
    print(f"unslothd {__version__} is serving on {host}:{port}", flush=True)  # noqa: T201
    roots = [str(root) for root in settings.model_roots]
    service.warm_workers.keep()
    log.info("ready", home=str(settings.home), output_root=str(settings.output_root), model_roots=roots)
    await stop.wait()
    hints = {
        "pause": "trainings pause at their next step and go on at the next start; this takes at most a few minutes",
        "continue": "workers go on; the next start takes them over",
    }
    log.info("stopping", hint=hints[settings.on_shutdown])
    await server.announce_stop()
    await service.close(leave_running=settings.on_shutdown == "continue")
    await server.stop(_GRACE_SECONDS)
    await monitoring.close()
    audit.close()
    lock.release()
    log.info("stopped")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
