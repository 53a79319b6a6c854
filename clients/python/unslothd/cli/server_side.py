"""Commands of the server's side: their arguments go to the server, a package with requirements of its own."""

import importlib

import typer

_PASS_ON: dict[str, object] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(
        "serve",
        add_help_option=False,
        context_settings=_PASS_ON,
        epilog="Example: unslothd serve --listen 127.0.0.1:50051 --home ~/.unslothd --model-root /models",
    )(serve)
    app.command(
        "doctor",
        add_help_option=False,
        context_settings=_PASS_ON,
        epilog="Example: unslothd doctor --config /etc/unslothd/server.toml",
    )(doctor)


def serve(context: typer.Context) -> None:
    """Start a server. `unslothd serve --help` shows its options (--listen, --home, --output-root, --model-root)."""
    raise typer.Exit(_run("unslothd_server.__main__", context))


def doctor(context: typer.Context) -> None:
    """Check driver, packages, disks, port, folders, Hub, clock and limits of this host, and say what to mend."""
    raise typer.Exit(_run("unslothd_server.doctor", context))


def _run(module: str, context: typer.Context) -> int:
    try:
        server = importlib.import_module(module)
    except ModuleNotFoundError as error:
        typer.echo(f"The server needs {error.name}, which is not installed: pip install 'unslothd[server]'", err=True)
        raise typer.Exit(1) from error
    return server.run(list(context.args))
