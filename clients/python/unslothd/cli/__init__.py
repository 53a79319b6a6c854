"""The command `unslothd`: everything that the client can do, for people and for scripts."""

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and ends the process with its exit code.

    Args:
        argv: Arguments without the program's name; None = those of the process.
    """
    # gRPC's own notes say nothing that the errors do not; it reads this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        from unslothd.cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in {"typer", "rich"}:
            raise
        sys.exit(f"The command line needs {package}, which is not installed: pip install 'unslothd[cli]'")
    app(args=None if argv is None else list(argv), prog_name="unslothd")
