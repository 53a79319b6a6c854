"""`python -m unslothd_server.worker BUNDLE_DIR`: a worker process with the Unsloth engine. Started by the server."""

import argparse
import os
from pathlib import Path


def main() -> None:
    """Reads the command line and is a worker until the process ends."""
    parser = argparse.ArgumentParser(prog="python -m unslothd_server.worker", description=__doc__)
    parser.add_argument("bundle_dir", type=Path, help="the worker's folder, with bootstrap.binpb in it")
    arguments = parser.parse_args()
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # before grpc is imported, which the next imports do

    from unslothd_server.worker.process import run

    # After grpc and protobuf: importing unsloth changes how protobuf would be imported.
    from unslothd_server.engine.unsloth_engine import UnslothEngine  # isort: skip

    run(arguments.bundle_dir, UnslothEngine())


if __name__ == "__main__":
    main()
