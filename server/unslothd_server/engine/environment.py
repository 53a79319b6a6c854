"""The heavy import, done once and in the one order that works, with Unsloth's own network and shell habits off."""

import gc
import importlib
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

REPORTED_PACKAGES = ("unsloth", "torch", "transformers", "trl", "peft", "bitsandbytes")

# What Unsloth patches, and only as it is imported.
PATCHED_PACKAGES = ("transformers", "trl", "peft")

# What Unsloth may not do on its own inside a service: report usage, run pip or apt.
QUIET_ENVIRONMENT = {
    "UNSLOTH_AUTO_INSTALL": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Bars are for terminals; the worker's stderr is a log.
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    # A dead network must become an answer, not a wait: seconds for the request that only asks what there is.
    "HF_HUB_ETAG_TIMEOUT": "10",
    "HF_HUB_DOWNLOAD_TIMEOUT": "30",
}


def import_libraries() -> dict[str, str]:
    """Imports unsloth before everything that it patches. Returns the versions of the packages that matter.

    Raises:
        RuntimeError: Something that it patches was imported before: training would work, slower and in more memory.
    """
    too_early = [name for name in PATCHED_PACKAGES if name in sys.modules]
    if too_early and "unsloth" not in sys.modules:
        raise RuntimeError(f"{', '.join(too_early)} must not be imported before unsloth: import it inside a function")
    # An operator may turn statistics on; everything else is not for discussion.
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    # Padded tuned passes have few shapes, so that launches can be recorded once: 14 600 -> 23 300 tokens a second with
    # mixed lengths on an H100. Unsloth reads it at its import; passes of many shapes do without by themselves.
    os.environ.setdefault("UNSLOTH_BLOCK_CUDAGRAPHS", "1")
    os.environ.update(QUIET_ENVIRONMENT)
    with _kept_for_life():
        # The order is the point: unsloth patches the others while they are not imported yet.
        for name in ("unsloth", "torch", "transformers", "trl", "peft", "datasets"):
            importlib.import_module(name)
    return versions()


@contextmanager
def _kept_for_life() -> Generator[None]:
    """Spares the garbage collector what the block makes.

    An import leaves 600 000 objects. To walk them again and again takes a sixth of its time, and afterwards 0.3 s at
    the end of every training.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.collect()
    gc.freeze()


def versions() -> dict[str, str]:
    """Versions of the packages that matter; "" for one that is not installed."""
    return {name: _version(name) for name in REPORTED_PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def engine_name() -> str:
    """What the started event calls the engine, e.g. "unsloth 2026.10.9"."""
    return f"unsloth {_version('unsloth')}"
