"""`unslothd serve`: hands all arguments to the server, which is another package with requirements of its own."""

import importlib

import typer


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        "serve",
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        epilog="Example: unslothd serve --listen 127.0.0.1:50051 --home ~/.unslothd --model-root /models",
    )(serve)


def serve(context: typer.Context) -> None:
    """Start a server. `unslothd serve --help` shows its options (--listen, --home, --output-root, --model-root)."""
    try:
        server = importlib.import_module("unslothd_server.__main__")
    except ModuleNotFoundError as error:
        typer.echo(f"The server needs {error.name}, which is not installed: pip install 'unslothd[server]'", err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(server.run(list(context.args)))
