"""The real server whose workers are doubles: `python fake_worker_server.py ARGUMENTS OF unslothd serve`.

Where the environment has FAKE_IMPORT_GATE, imports of workers end once that file exists.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from doubles.fake_worker import fake_worker_command
from unslothd_server import __main__ as server


def main() -> int:
    """Serves until a signal."""
    real_serve = server.serve
    gate = os.environ.get("FAKE_IMPORT_GATE")
    command = tuple(fake_worker_command(import_gate=Path(gate) if gate else None))
    server.serve = lambda settings: real_serve(settings, worker_command=command)
    return server.run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
