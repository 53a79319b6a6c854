"""The answer of a check, and its form on the wire between the two processes: one line of JSON."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

MAX_BAD_ROWS = 20
MAX_ROW_BYTES = 64 * 1024 * 1024
MAX_COLUMNS = 1000
MAX_COLUMN_CHARACTERS = 256  # as the contract's rule for a column of a layout
# 20 causes travel in HTTP/2 trailers, which hold 8 KiB.
MAX_CAUSE_CHARACTERS = 120
# JSON rows need not all have the same keys; these are looked at for column names.
ROWS_FOR_COLUMNS = 100

Outcome = Literal["good", "bad_rows", "damaged", "empty"]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Args:
        number: Counted from 1, empty lines left out.
        cause: What is wrong with it.
    """

    number: int
    cause: str


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Args:
        outcome: "good": num_rows and columns count; "bad_rows": so does bad_rows; "damaged" and "empty": cause does.
        num_rows: Rows.
        columns: Their names, in the order of the data.
        bad_rows: The first of them, at most 20.
        cause: What is wrong with the whole, and what to do.
    """

    outcome: Outcome
    num_rows: int = 0
    columns: list[str] = field(default_factory=list[str])
    bad_rows: list[BadRow] = field(default_factory=list[BadRow])
    cause: str = ""

    def to_line(self) -> bytes:
        """Returns it as one line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Verdict":
        """Returns what `to_line` made the line of. Raises ValueError for a line that was cut."""
        content: dict[str, Any] = json.loads(line)
        content["bad_rows"] = [BadRow(**each) for each in content["bad_rows"]]
        return cls(**content)


class RowsRefusedError(Exception):
    """The check is over: there is nothing good to come.

    Args:
        verdict: The answer.
    """

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.cause)
        self.verdict = verdict


def damaged(cause: str) -> RowsRefusedError:
    """The data as a whole cannot be read."""
    return RowsRefusedError(Verdict("damaged", cause=cause))


def shortened(text: object) -> str:
    """Returns the first line of a text, short enough to travel."""
    line = str(text).partition("\n")[0].strip()
    return line if len(line) <= MAX_CAUSE_CHARACTERS else line[: MAX_CAUSE_CHARACTERS - 1] + "…"


class Findings:
    """What a check of text rows has found so far."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._columns: dict[str, None] = {}
        self._bad: list[BadRow] = []

    def bad(self, number: int, cause: str) -> None:
        """Notes a bad row. Raises RowsRefusedError when it is the last that is told."""
        self._bad.append(BadRow(number, shortened(cause)))
        if len(self._bad) == MAX_BAD_ROWS:
            raise RowsRefusedError(self.verdict())

    def names(self, columns: list[str]) -> None:
        """Notes names of columns. Raises RowsRefusedError when they cannot be those of rows."""
        self._columns.update(dict.fromkeys(columns))
        check_columns(list(self._columns))

    def verdict(self) -> Verdict:
        """Returns the answer, as if all had been read."""
        columns = list(self._columns)
        if self._bad:
            return Verdict("bad_rows", self.num_rows, columns, self._bad)
        return good_or_empty(self.num_rows, columns)


def good_or_empty(num_rows: int, columns: list[str]) -> Verdict:
    """Returns the answer for rows of which none is bad."""
    if not num_rows:
        return Verdict("empty", cause="The data has no rows. Upload at least one row.")
    if not columns:
        return Verdict("empty", cause="The rows have no columns. Give them at least one, for example text.")
    return Verdict("good", num_rows, columns)


def check_columns(columns: list[str]) -> None:
    """Raises RowsRefusedError when a layout could not name the columns, or nobody could list them."""
    if len(columns) > MAX_COLUMNS:
        raise damaged(f"The data has more than {MAX_COLUMNS} columns. Keep those that are trained on and upload again.")
    for column in columns:
        if len(column) > MAX_COLUMN_CHARACTERS:
            raise damaged(
                f'The name of the column "{column[:40]}…" has {len(column)} characters; the most is '
                f"{MAX_COLUMN_CHARACTERS}. Rename it and upload again."
            )
