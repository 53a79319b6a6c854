"""Runs every benchmark and prints its table; `make bench`. With --save also writes results/<date>-<device>.json."""

import argparse
import importlib
import json
import re
import subprocess
import sys
from datetime import UTC, datetime

from _common import HERE, environment, machine, machine_line

BENCHMARKS = (
    "client_import",
    "server_memory",
    "event_latency",
    "reliability",
    "clients",
    "upload",
    "plan",
    "mcp_calls",
    "load_model",
    "step_overhead",
)
BENCHMARK_SECONDS = 1800


def main() -> int:
    """Runs them one after the other; returns 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(BENCHMARKS)}; default all")
    parser.add_argument("--save", action="store_true", help="keep the figures")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    failed, saved = [], {"machine": machine(), "figures": {}}
    for name in options.names or BENCHMARKS:
        command = [sys.executable, str(HERE / f"{name}.py"), "--json"]
        done = subprocess.run(
            command, env=environment(), timeout=BENCHMARK_SECONDS, check=False, text=True, stdout=subprocess.PIPE
        )
        if done.returncode:
            failed.append(name)
            continue
        saved["figures"][name] = result = json.loads(done.stdout)
        print(f"\n=== {name}: {machine_line(result['machine'])}")
        print(importlib.import_module(name).table(result["figures"]) + "\n", flush=True)
    if options.save:
        device = re.sub(r"[^a-z0-9]+", "-", saved["machine"]["device"].lower()).strip("-")
        file = HERE / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{device}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(saved, indent=1) + "\n")
        print(f"\nsaved in {file.relative_to(HERE.parent)}")
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
