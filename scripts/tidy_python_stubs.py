"""Finishes the generated Python stubs: keeps site-packages clean and drops what buf generates without need."""

import shutil
import sys
from pathlib import Path

VENDORED_IMPORT = ("from buf.validate import", "from unslothd._vendor.buf.validate import")
VENDORED_MODULE = ("import buf.validate.validate_pb2", "import unslothd._vendor.buf.validate.validate_pb2")


def main(root: Path) -> None:
    """Tidies the stubs below `root`, the folder that holds the `unslothd` package."""
    # google.rpc comes from googleapis-common-protos, which every gRPC installation has.
    shutil.rmtree(root / "google", ignore_errors=True)

    # buf.validate must not be a top-level name in site-packages: other distributions own it.
    vendored = root / "unslothd" / "_vendor" / "buf"
    shutil.rmtree(vendored.parent, ignore_errors=True)
    vendored.parent.mkdir(parents=True)
    shutil.move(root / "buf", vendored)
    for package in (vendored.parent, vendored, vendored / "validate"):
        (package / "__init__.py").write_text('"""Stubs of buf.validate, under our own name."""\n')

    for stub in (root / "unslothd").rglob("*_pb2*.py*"):
        if stub.name.endswith("_pb2_grpc.pyi") and not stub.with_suffix(".py").exists():
            stub.unlink()  # a file without a service
            continue
        text = stub.read_text()
        for old, new in (VENDORED_IMPORT, VENDORED_MODULE):
            text = text.replace(old, new)
        stub.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
