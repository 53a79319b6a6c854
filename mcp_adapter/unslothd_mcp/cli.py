"""The command `unslothd-mcp`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio

import unslothd
from unslothd_mcp.settings import Settings

# What AsyncClient takes, its flag, what is to be written there, and what it does.
_SERVER_OPTIONS = {
    "target": ("--target", "HOST:PORT", "where it is; default: 127.0.0.1:50051"),
    "token_file": ("--token-file", "FILE", "your token for it"),
    "ca": ("--ca", "FILE", "use TLS, and trust the authority of this PEM file"),
    "client_certificate": ("--client-cert", "FILE", "certificate to show, in PEM"),
    "client_key": ("--client-key", "FILE", "its private key"),
    "profile": ("--profile", "NAME", "profile to take the rest from"),
}
_EXAMPLES = """\
A host starts it and talks to it over stdin and stdout. In the host's configuration:

  {"mcpServers": {"unslothd": {"command": "unslothd-mcp", "args": ["--target", "127.0.0.1:50051"]}}}

To try it by hand:       npx @modelcontextprotocol/inspector unslothd-mcp --target 127.0.0.1:50051
An agent that may look:  unslothd-mcp --read-only
One that may train:      unslothd-mcp --max-steps 500 --max-gpu-minutes 60 --allowed-root ~/data
For several hosts:       unslothd-mcp --http 127.0.0.1:8765 --http-token-file tokens.txt

docs/mcp.md has the configuration of the usual hosts and all tools.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; ends with 2 for wrong usage.

    Args:
        argv: Arguments without the program's name; None = those of the process.
    """
    command = parser()
    options = command.parse_args(argv)
    roots = tuple(root.expanduser() for root in options.allowed_root)
    missing = [str(root) for root in roots if not root.is_dir()]
    if roots and options.read_only:
        command.error("--allowed-root: an adapter that is --read-only uploads no files")
    if missing:
        command.error(f"--allowed-root: {', '.join(missing)} is no folder here")
    settings = Settings(
        read_only=options.read_only,
        max_gpu_minutes=options.max_gpu_minutes,
        max_steps=options.max_steps,
        allowed_roots=roots,
    )
    try:
        client = unslothd.AsyncClient(**{name: getattr(options, name) for name in (*_SERVER_OPTIONS, "tls")})
    except ValueError as error:
        command.error(str(error))
    try:
        if options.http is None:
            anyio.run(_stdio, client, settings)
        else:
            _http(command, options, client, settings)
    except KeyboardInterrupt:
        sys.exit(130)


def parser() -> argparse.ArgumentParser:
    """Returns what reads the arguments."""
    command = argparse.ArgumentParser(
        prog="unslothd-mcp",
        description="Lets LLM agents fine-tune models: an MCP server whose tools are calls to an unslothd server.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    _add_server_options(command)
    add("--read-only", action="store_true", help="offer only the tools that change nothing")
    add("--max-steps", type=_positive_int, metavar="N", help="most optimizer steps of a training; default: no limit")
    add(
        "--max-gpu-minutes",
        type=_positive,
        metavar="M",
        help="minutes that the trainings of this adapter may run, all together; then they are cancelled with a "
        "checkpoint; default: no limit",
    )
    add(
        "--allowed-root",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder here whose files agents may upload; repeatable; default: none",
    )
    add("--http", metavar="HOST:PORT", help="serve by streamable HTTP at /mcp in place of stdin and stdout")
    add(
        "--http-token-file",
        type=Path,
        metavar="FILE",
        help="bearer tokens that are let in, one a line; needed for an address that others can reach",
    )
    add("--version", action="version", version=f"unslothd-mcp {unslothd.__version__}")
    return command


def _add_server_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "the unslothd server",
        "Each may come from the environment (UNSLOTHD_TARGET, …) or from a profile in\n"
        "~/.config/unslothd/config.toml, too; flags win, then the environment.",
    )
    for name, (flag, metavar, text) in _SERVER_OPTIONS.items():
        group.add_argument(flag, dest=name, metavar=metavar, help=text)
    group.add_argument("--tls", action="store_true", default=None, help="use TLS, and trust the public authorities")


async def _stdio(client: unslothd.AsyncClient, settings: Settings) -> None:
    from unslothd_mcp.app import Adapter
    from unslothd_mcp.session import Session

    await Adapter(Session(client, settings)).run_stdio_async()


def _http(
    command: argparse.ArgumentParser, options: argparse.Namespace, client: unslothd.AsyncClient, settings: Settings
) -> None:
    from unslothd_mcp import http
    from unslothd_mcp.session import Session

    host, _, port = options.http.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal():
        command.error("--http: write HOST:PORT, e.g. 127.0.0.1:8765")
    tokens: tuple[str, ...] = ()
    if options.http_token_file is not None:
        try:
            tokens = http.read_tokens(options.http_token_file)
        except (OSError, ValueError) as error:
            command.error(f"--http-token-file: {error}")
    elif not http.is_loopback(host):
        command.error(f"--http: others can reach {host}; add --http-token-file, and a proxy with TLS in front")
    anyio.run(http.serve, Session(client, settings), host, int(port), tokens)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
