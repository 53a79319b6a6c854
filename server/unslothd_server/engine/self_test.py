"""`python -m unslothd_server.engine.self_test`: imports what trains, and tells as JSON what came of it."""

import importlib
import json
import time

from unslothd_server.engine.environment import import_libraries


def main() -> None:
    """Prints one line, the last: versions, seconds of the import, CUDA of torch (or null), GPUs that it sees."""
    started = time.monotonic()
    versions = import_libraries()
    seconds = time.monotonic() - started
    torch = importlib.import_module("torch")
    told = {
        "versions": versions,
        "seconds": seconds,
        "cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }
    print(f"\n{json.dumps(told)}", flush=True)  # noqa: T201 - who started it reads this line


if __name__ == "__main__":
    main()
