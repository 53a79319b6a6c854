"""Checks rows that are lines of text: JSONL and CSV, by the rules by which `engine/rows.py` reads them later."""

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from unslothd_server.row_check.growing_file import GrowingFile
from unslothd_server.row_check.verdict import MAX_ROW_BYTES, ROWS_FOR_COLUMNS, Findings, Verdict

_BUFFER_BYTES = 1024 * 1024
_MIB = 1024 * 1024
_TOO_LONG = f"it has more than {MAX_ROW_BYTES // _MIB} MiB; split it into several rows"


def check_jsonl(file: GrowingFile) -> Verdict:
    """One JSON object a line; lines of white space do not count.

    Raises:
        RowsRefusedError: 20 rows are bad; the rest is not read.
    """
    findings = Findings()
    reader = io.BufferedReader(file, _BUFFER_BYTES)
    for line_number, line in enumerate(_bounded_lines(reader), start=1):
        if not line.strip():
            continue
        findings.num_rows += 1
        cause = _json_fault(line, line_number, findings)
        if cause:
            findings.bad(findings.num_rows, cause)
    return findings.verdict()


def _bounded_lines(reader: "io.BufferedReader[GrowingFile]") -> Iterator[bytes]:
    """Lines; of one that is too long only the beginning, longer than the limit."""
    for line in iter(partial(reader.readline, MAX_ROW_BYTES + 1), b""):
        yield line
        rest = line if len(line) > MAX_ROW_BYTES else b"\n"
        while rest and not rest.endswith(b"\n"):
            rest = reader.readline(_BUFFER_BYTES)


def _json_fault(line: bytes, line_number: int, findings: Findings) -> str:
    """Returns what is wrong with a line, or nothing."""
    if len(line) > MAX_ROW_BYTES:
        return _TOO_LONG
    try:
        row: Any = json.loads(line)
    except RecursionError:
        return f"line {line_number} nests its values too deeply"
    except MemoryError:
        return f"line {line_number} needs more memory than a row may"
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        return f"line {line_number} is not JSON ({error})"
    if not isinstance(row, dict):
        return f"it is of type {type(row).__name__}, but a row is an object with named columns"
    if findings.num_rows <= ROWS_FOR_COLUMNS:
        findings.names(list(row))  # pyright: ignore[reportUnknownArgumentType] - JSON's keys are text
    return ""


def check_csv(file: GrowingFile) -> Verdict:
    """A header line, then rows with as many fields; empty lines do not count.

    Raises:
        RowsRefusedError: 20 rows are bad; the rest is not read.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    findings, lines = Findings(), _CsvLines(file)
    reader = csv.reader(lines)
    try:
        header = next(reader, list[str]())
        if lines.take_fault():
            findings.bad(1, "the header line is not UTF-8; save the file as UTF-8")
        findings.names(header)
        for fields in filter(None, reader):
            findings.num_rows += 1
            fault = lines.take_fault()
            if fault:
                findings.bad(findings.num_rows, fault)
            elif len(fields) != len(header):
                cause = f"it has {len(fields)} fields, but the header names {len(header)}"
                findings.bad(findings.num_rows, cause)
    except csv.Error as error:  # where the next row begins is not known
        findings.num_rows += 1
        findings.bad(findings.num_rows, f"line {reader.line_num} cannot be read ({error})")
    return findings.verdict()


class _CsvLines:
    """Lines for csv.reader, each checked on the way, so that the row that a fault is in is known."""

    def __init__(self, file: GrowingFile) -> None:
        reader = io.BufferedReader(file, _BUFFER_BYTES)
        self._text = io.TextIOWrapper(reader, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self._fault = ""

    def __iter__(self) -> Iterator[str]:
        for line in iter(partial(self._text.readline, MAX_ROW_BYTES + 1), ""):
            if len(line) > MAX_ROW_BYTES:
                raise csv.Error(_TOO_LONG)
            if not line.isascii():
                self._check_encoding(line)
            yield line

    def _check_encoding(self, line: str) -> None:
        try:
            line.encode()
        except UnicodeEncodeError:
            self._fault = "it is not UTF-8; save the file as UTF-8"

    def take_fault(self) -> str:
        """Returns what was wrong since the last call, or nothing."""
        fault, self._fault = self._fault, ""
        return fault
