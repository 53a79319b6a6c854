"""`make fuzz`: makes valid and broken requests of every RPC, and prints a table of how each ended."""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fuzz.campaign import Report, run


def main() -> int:
    """Runs the rounds, each on a server of its own; returns 1 when anything was not as promised."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the first round; each further one takes the next")
    parser.add_argument("--requests", type=int, default=1_000_000, help="in all (default 1000000)")
    parser.add_argument("--round", type=int, default=50_000, help="requests to one server (default 50000)")
    arguments = parser.parse_args()
    console = Console()
    reports: list[Report] = []
    left = arguments.requests
    while left > 0:
        with tempfile.TemporaryDirectory(prefix="unslothd-fuzz-") as folder:
            report = run(Path(folder), seed=arguments.seed + len(reports), requests=min(left, arguments.round))
        left -= report.requests
        reports.append(report)
        console.print(_summary(report), soft_wrap=True)
        for finding in report.findings:
            console.print(finding, soft_wrap=True, markup=False)
    console.print(_table(reports))
    return 1 if any(report.findings or report.exit_code for report in reports) else 0


def _summary(report: Report) -> str:
    return (
        f"seed {report.seed}: {report.requests} requests in {report.seconds:.0f} s, {len(report.findings)} findings, "
        f"{report.bytes_a_request:+.0f} bytes a request, open files {report.files_before} -> {report.files_after}, "
        f"exit code {report.exit_code}"
    )


def _table(reports: list[Report]) -> Table:
    total: Counter[tuple[str, str, str]] = sum((report.outcomes for report in reports), Counter())
    table = Table("RPC", "requests", "OK", "dropped", "errors, each documented", title="fuzz", show_lines=True)
    for rpc in sorted({rpc for rpc, _, _ in total}):
        of_rpc = {(code, reason): count for (name, code, reason), count in total.items() if name == rpc}
        errors = sorted(((count, reason or code) for (code, reason), count in of_rpc.items() if code not in _ENDS))
        told = ", ".join(f"{name} {count}" for count, name in reversed(errors))
        counts = (sum(of_rpc.values()), of_rpc.get(("OK", ""), 0), of_rpc.get(("dropped", ""), 0))
        table.add_row(rpc, *map(str, counts), told)
    return table


_ENDS = {"OK", "dropped"}


if __name__ == "__main__":
    sys.exit(main())
