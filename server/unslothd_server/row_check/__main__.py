"""The process: limits first, then the check, then one line with the answer."""

import resource
import sys
from pathlib import Path

from unslothd_server.row_check import tables, text_rows
from unslothd_server.row_check.growing_file import GrowingFile
from unslothd_server.row_check.verdict import RowsRefusedError, Verdict, damaged

# Anonymous memory; mapped parts of the file do not count. A process that needs more gets MemoryError.
MAX_MEMORY_BYTES = 2 * 1024**3
_MAX_OPEN_FILES = 64
# What text never begins with, by what does.
_SIGNATURES = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow IPC file",
    b"\xff\xff\xff\xff": "an Arrow IPC stream",
    b"\x1f\x8b": "compressed by gzip",
    b"PK\x03\x04": "a ZIP archive",
}


def _limit() -> None:
    for what, most in (
        (resource.RLIMIT_DATA, MAX_MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
        (resource.RLIMIT_FSIZE, 0),  # it writes no file
        (resource.RLIMIT_CORE, 0),  # rows are nobody's business
    ):
        resource.setrlimit(what, (most, most))


def check(data_format: str, path: Path, file: GrowingFile) -> Verdict:
    """Reads the file to its end, or until nothing good can come."""
    if not file.wait_for(1):
        return Verdict("empty", cause="The data has no bytes. Upload at least one row.")
    try:
        match data_format:
            case "jsonl":
                _check_is_text(file)
                return text_rows.check_jsonl(file)
            case "csv":
                _check_is_text(file)
                return text_rows.check_csv(file)
            case "parquet":
                return tables.check_parquet(file, path)
            case "arrow":
                return tables.check_arrow_stream(file)
            case _:
                raise ValueError(f"no format is called {data_format}")
    except RowsRefusedError as refused:
        return refused.verdict


def _check_is_text(file: GrowingFile) -> None:
    for signature, what in _SIGNATURES.items():
        if file.peek(len(signature)) == signature:
            raise damaged(f"The data is {what}, and no text. Upload it with its own format, or write it as text.")


def main(arguments: list[str]) -> None:
    """Runs one check."""
    _limit()
    data_format, name = arguments
    path = Path(name)
    with GrowingFile(path, sys.stdin.buffer) as file:
        verdict = check(data_format, path, file)
    sys.stdout.buffer.write(verdict.to_line())
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
