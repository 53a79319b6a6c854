"""The real server whose real workers break their CUDA context once: `cuda_fault_server.py ARGUMENTS OF unslothd serve`.

The same file is the worker: `cuda_fault_server.py --worker BUNDLE_DIR`. The first of one home does what a bug in a
kernel does, at the begin of its optimizer step FAULT_STEP; later ones are as they always are.
"""

import sys
from pathlib import Path

FAULT_STEP = 4


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
    begin_step, steps = StepPasses.begin_step, [0]

    def begin_step_or_break(passes: StepPasses) -> None:
        steps[0] += 1
        if steps[0] == FAULT_STEP and not done.exists():
            done.touch()
            _break_context()
        begin_step(passes)

    StepPasses.begin_step = begin_step_or_break
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
