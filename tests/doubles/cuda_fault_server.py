"""The real server whose real workers break their CUDA context once: `cuda_fault_server.py ARGUMENTS OF unslothd serve`.

The same file is the worker: `cuda_fault_server.py --worker BUNDLE_DIR`. The first of one home does what a bug in a
kernel does, before its pass FAULT_PASS; later ones are as they always are.
"""

import sys
from pathlib import Path
from typing import Any

# The second one of step 4, where a step has two: step 3 is told by then, as the device is not far behind.
FAULT_PASS = 8


def serve(arguments: list[str]) -> int:
    """Serves until a signal."""
    from unslothd_server import __main__ as server

    command = (sys.executable, str(Path(__file__).resolve()), "--worker")
    real_serve = server.serve
    server.serve = lambda settings: real_serve(settings, worker_command=command)
    return server.run(arguments)


def work(bundle: Path) -> None:
    """Is a worker; breaks the context of the GPU unless an earlier one did."""
    from unslothd_server.engine.passes import StepPasses
    from unslothd_server.worker import __main__ as worker

    done = bundle.parent / "cuda-fault"
    run, passes = StepPasses.run, [0]

    def run_or_break(*args: Any) -> Any:
        passes[0] += 1
        if passes[0] == FAULT_PASS and not done.exists():
            done.touch()
            _break_context()
        return run(*args)

    StepPasses.run = run_or_break
    sys.argv = [sys.argv[0], str(bundle)]
    worker.main()


def _break_context() -> None:
    import torch

    eight = torch.zeros(8, device="cuda")
    print(eight[torch.tensor([1 << 20], device="cuda")])  # out of range: a device-side assert


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        work(Path(sys.argv[2]))
    sys.exit(serve(sys.argv[1:]))
