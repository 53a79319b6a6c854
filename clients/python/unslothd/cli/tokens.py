"""`unslothd tokens`: makes, lists and revokes what callers identify themselves with to a server on this host."""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from unslothd.cli import options
from unslothd.cli.session import FAILED, Output

if TYPE_CHECKING:
    from unslothd_server.access.tokens import Token, TokenFile

_UNITS = {"h": "hours", "d": "days", "w": "weeks"}
_LONGEST = timedelta(days=3650)

Home = Annotated[
    Path,
    typer.Option(envvar="UNSLOTHD_HOME", help="The server's --home. Run this as the user that the server runs as."),
]
DEFAULT_HOME = Path("~/.unslothd")


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    tokens = typer.Typer(no_args_is_help=True)
    tokens.command("create", epilog="Example: unslothd tokens create alice --scope train --expires-in 90d")(create)
    tokens.command("list", epilog="Example: unslothd tokens list")(list_tokens)
    tokens.command("revoke", epilog="Example: unslothd tokens revoke alice")(revoke)
    app.add_typer(tokens, name="tokens", help="Make, list and revoke tokens of a server on this host.")


def create(
    name: Annotated[str, typer.Argument(help="Whom or what it is for; the audit log names its calls so.")],
    scope: Annotated[
        Literal["read", "train", "admin"],
        typer.Option(
            help="read sees everything; train loads, trains, uploads, generates and exports too; admin also removes "
            "stored datasets."
        ),
    ] = "train",
    expires_in: Annotated[
        str | None, typer.Option(metavar="TIME", help="12h, 90d or 4w. (default never)", show_default=False)
    ] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Make a token and print it, this once: only its hash is kept. A running server takes it at once."""
    expire_time = None if expires_in is None else datetime.now(UTC) + _duration(expires_in)
    with _tokens_of(home) as file:
        from unslothd_server.access.scopes import scope_of

        secret = file.create(name, scope_of(scope), expire_time)
    until = "never expires" if expire_time is None else f"expires on {_minute(expire_time)}"
    typer.echo(f'Token "{name}", scope {scope}, {until}. Keep it now: it cannot be shown again.', err=True)
    typer.echo(secret)


def list_tokens(home: Home = DEFAULT_HOME, as_json: options.Json = False) -> None:
    """List tokens, oldest first: names, scopes and times. The tokens themselves are kept nowhere."""
    out = Output(as_json)
    with _tokens_of(home) as file:
        found = file.read()
        if as_json:
            from unslothd_server.access.tokens import told

            for token in found:
                out.json(told(token))
        elif found:
            out.console.print(_table(found))
        else:
            out.note("There is no token yet; `unslothd tokens create NAME` makes one.")


def revoke(
    name: Annotated[str, typer.Argument(help="As `unslothd tokens list` shows it.")], home: Home = DEFAULT_HOME
) -> None:
    """Revoke a token: a running server refuses it from the next call on, and ends its open streams."""
    with _tokens_of(home) as file:
        file.revoke(name)
    typer.echo(f'Token "{name}" is revoked.', err=True)


@contextmanager
def _tokens_of(home: Path) -> Generator["TokenFile"]:
    try:
        from unslothd_server.access.tokens import TokenFile, TokensError
    except ModuleNotFoundError as error:
        typer.echo(f"Tokens need {error.name}, which is not installed: pip install 'unslothd[server]'", err=True)
        raise typer.Exit(FAILED) from error
    try:
        yield TokenFile.of(home.expanduser())
    except TokensError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from error
    except OSError as error:
        typer.echo(f"{error.filename}: {error.strerror}. Run this as the user that the server runs as.", err=True)
        raise typer.Exit(FAILED) from error


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", text)
    length = timedelta(**{_UNITS[found[2]]: int(found[1])}) if found else timedelta()
    if not timedelta() < length <= _LONGEST:
        raise typer.BadParameter(
            f'"{text}" is not a time such as 12h, 90d or 4w, of at most 10 years', param_hint="--expires-in"
        )
    return length


def _table(tokens: Sequence["Token"]) -> Table:
    from unslothd_server.access.scopes import scope_name

    table = Table("NAME", "SCOPE", "MADE", "EXPIRES", box=None)
    for token in tokens:
        ends = "never" if token.expire_time is None else _minute(token.expire_time)
        table.add_row(
            token.name, scope_name(token.scope), _minute(token.create_time), f"{ends} (over)" if token.expired else ends
        )
    return table


def _minute(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"
