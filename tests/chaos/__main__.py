"""`make chaos`: kills servers and workers under real trainings, and prints a table of what became of each."""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from chaos.scenario import Report, campaign


def main() -> int:
    """Runs the campaign; returns 1 when anything was not as it should be."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the plan of kills (default 1)")
    parser.add_argument("--trainings", type=int, default=9, help="trainings under kills (default 9)")
    parser.add_argument("--server-kills", type=int, default=12, help="in each training (default 12)")
    parser.add_argument("--worker-kills", type=int, default=6, help="in each training (default 6)")
    parser.add_argument("--seeds", type=int, default=3, help="different seeds of trainings (default 3)")
    arguments = parser.parse_args()
    # That connections are lost is what this is about.
    logging.getLogger("unslothd").setLevel(logging.ERROR)
    console = Console()
    reports: list[Report] = []
    with tempfile.TemporaryDirectory(prefix="unslothd-chaos-") as folder:
        for report in campaign(
            Path(folder),
            seed=arguments.seed,
            trainings=arguments.trainings,
            server_kills=arguments.server_kills,
            worker_kills=arguments.worker_kills,
            seeds=arguments.seeds,
        ):
            reports.append(report)
            console.print(f"training {len(reports)} of {arguments.trainings}: {_verdict(report)}", soft_wrap=True)
    console.print(_table(reports, arguments.seed))
    return 1 if any(report.problems for report in reports) else 0


def _verdict(report: Report) -> str:
    return "; ".join(report.problems) or "every event once, bits equal"


def _table(reports: list[Report], seed: int) -> Table:
    columns = ("training seed", "server kills", "worker kills", "recoveries", "events", "seconds", "verdict")
    table = Table(*columns, title=f"chaos, plan seed {seed}", show_footer=True)
    for column, value in (
        (1, sum(report.server_kills for report in reports)),
        (2, sum(report.worker_kills for report in reports)),
        (3, sum(report.recoveries for report in reports)),
        (4, sum(report.events for report in reports)),
        (5, round(sum(report.seconds for report in reports))),
        (6, sum(not report.problems for report in reports)),
    ):
        table.columns[column].footer = str(value)
    for each in reports:
        counts = (each.seed, each.server_kills, each.worker_kills, each.recoveries, each.events, round(each.seconds))
        table.add_row(*map(str, counts), _verdict(each))
    return table


if __name__ == "__main__":
    sys.exit(main())
