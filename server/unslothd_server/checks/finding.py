"""What a check found: how bad it is, what is there, and what to do about it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"  # work goes on, worse than it could
    PROBLEM = "problem"  # something cannot be done


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Args:
        name: What was checked, in a word or two.
        level: How bad it is.
        text: What is there.
        mend: What to do about it; empty when it is OK.
    """

    name: str
    level: Level
    text: str
    mend: str = ""

    def to_json(self) -> dict[str, str]:
        """As plain JSON values."""
        return {key: str(value) for key, value in asdict(self).items()}


def ok(name: str, text: str) -> Finding:
    """All is well."""
    return Finding(name, Level.OK, text)


def warning(name: str, text: str, mend: str) -> Finding:
    """Work goes on, but somebody should know."""
    return Finding(name, Level.WARNING, text, mend)


def problem(name: str, text: str, mend: str) -> Finding:
    """Something cannot be done."""
    return Finding(name, Level.PROBLEM, text, mend)


def count(findings: Iterable[Finding], level: Level) -> int:
    """How many findings are as bad as that."""
    return sum(finding.level is level for finding in findings)


def lines(findings: Iterable[Finding]) -> list[str]:
    """Lays findings out for a terminal or a log: a line each, with what to do below."""
    out: list[str] = []
    for finding in findings:
        out.append(f"  {finding.level:<8} {finding.name:<14} {finding.text}")
        if finding.mend:
            out.append(f"{'':26}→ {finding.mend}")
    return out
