"""Checkpoints on disk: sealed when they are whole, checked before they are used, removed when they are not kept.

Transformers writes a checkpoint file by file, so a process that is killed meanwhile leaves half a folder. Here the last
file of a checkpoint is its manifest, with the size and SHA-256 of every other one: a folder without it is not whole.
"""

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.engine.durable_files import as_json, difference, sums_of, sync_folder, write_text
from unslothd_server.errors import NotFoundError, PreconditionError

MANIFEST_NAME = "manifest.json"
RECEIPT_NAME = "receipt.json"  # in the folder of a result, whose files it lists as a manifest does
MANIFEST_VERSION = 1


def folder_of(output_dir: Path, step: int) -> Path:
    """Where Transformers puts the checkpoint of an optimizer step."""
    return output_dir / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """Optimizer step of a checkpoint's folder; 0 when its name does not tell one."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else 0


def seal(folder: Path, *, eval_loss: float | None) -> None:
    """Brings every file of a checkpoint to the disk, then writes the manifest, in one step.

    Args:
        folder: With everything that belongs to the checkpoint.
        eval_loss: Measured at its step; None = not measured.
    """
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "step": step_of(folder),
        "eval_loss": eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None,
        "files": as_json(sums_of(folder, without=[MANIFEST_NAME])),
    }
    write_text(folder / MANIFEST_NAME, json.dumps(manifest, indent=1))
    sync_folder(folder.parent)


def verify(folder: Path, *, contents: bool = True) -> str | None:
    """Says what is wrong with a checkpoint, e.g. "optimizer.pt is missing"; None when it is whole.

    Args:
        folder: The checkpoint.
        contents: Read every file; else only names and sizes are compared.
    """
    if not folder.is_dir():
        return "it is not there"
    if not (folder / MANIFEST_NAME).is_file():
        return f"it has no {MANIFEST_NAME}, so it was never finished"
    return _compare(folder, MANIFEST_NAME, contents=contents)


def verify_result(folder: Path) -> str | None:
    """Says what is wrong with the folder of a result; None when its files are those of its receipt, or it has none."""
    return _compare(folder, RECEIPT_NAME, contents=True) if (folder / RECEIPT_NAME).is_file() else None


def _compare(folder: Path, list_name: str, *, contents: bool) -> str | None:
    listing = _read(folder / list_name)
    if listing is None:
        return f"its {list_name} cannot be read"
    return difference(folder, listing["files"], contents=contents)


def _read(path: Path) -> dict[str, Any] | None:
    """A manifest or receipt; None when it is none.

    Raises:
        PreconditionError: A newer version wrote the manifest (CHECKPOINT_DAMAGED); it must not be taken for damage,
            which is removed.
    """
    try:
        listing = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(listing, dict) or not isinstance(listing.get("files"), dict):
        return None
    if listing.get("manifest_version", 0) > MANIFEST_VERSION:
        raise PreconditionError(
            ErrorReason.ERROR_REASON_CHECKPOINT_DAMAGED,
            f"{path} has version {listing['manifest_version']}, and this server reads up to {MANIFEST_VERSION}: "
            "a newer one wrote it. Go on with that version.",
        )
    return listing


@dataclass(frozen=True)
class ResumePoint:
    """Where a training goes on.

    Args:
        folder: A whole checkpoint.
        step: Its optimizer step.
        passed_over: What was wrong with each newer one, one clause each.
    """

    folder: Path
    step: int
    passed_over: tuple[str, ...] = ()

    @property
    def warning(self) -> str | None:
        """What a user should know of the choice; None when the checkpoint that was asked for is whole."""
        if not self.passed_over:
            return None
        return (
            f"{'; '.join(self.passed_over)}. Training goes on from {self.folder.name} instead; the steps after "
            f"{self.step} are done again."
        )


def choose(asked: Path, fallbacks: Sequence[Path]) -> ResumePoint:
    """The checkpoint to go on from: the one asked for, else the first whole fallback.

    Args:
        asked: Folder of the checkpoint.
        fallbacks: Folders of older ones, newest first.

    Raises:
        NotFoundError: CHECKPOINT_NOT_FOUND: none of them is there.
        PreconditionError: CHECKPOINT_DAMAGED: none of those that are there is whole.
    """
    passed_over: list[str] = []
    for folder in (asked, *fallbacks):
        problem = verify(folder)
        if problem is None:
            return ResumePoint(folder, step_of(folder), tuple(passed_over))
        passed_over.append(f"{folder.name} cannot be used: {problem}")
    text = "; ".join(passed_over)
    if not any(folder.is_dir() for folder in (asked, *fallbacks)):
        raise NotFoundError(
            ErrorReason.ERROR_REASON_CHECKPOINT_NOT_FOUND,
            f"There is no checkpoint to go on from: {text}. Name one that is there, or start the training anew.",
        )
    raise PreconditionError(
        ErrorReason.ERROR_REASON_CHECKPOINT_DAMAGED,
        f"No checkpoint is whole: {text}. Bring the files back from a copy, or start the training anew.",
    )


def remove(folder: Path) -> None:
    """Removes a checkpoint, as far as the disk lets it; of half a folder nothing is taken for a whole one."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_after(output_dir: Path, step: int) -> None:
    """Removes what a training that goes on after a step makes again, and what was never finished.

    Args:
        output_dir: Folder of the training; it need not exist.
        step: Optimizer step of the checkpoint that it goes on from; 0 = it begins.
    """
    for folder in _folders(output_dir):
        if step_of(folder) > step or verify(folder, contents=False) is not None:
            remove(folder)


def remove_surplus(output_dir: Path, keep: int) -> None:
    """Removes all checkpoints but the newest ones and the one with the lowest eval loss.

    Args:
        output_dir: Folder of the training.
        keep: How many of the newest; 0 = all.
    """
    folders = _folders(output_dir)
    if not keep or len(folders) <= keep:
        return
    best = _best(folders)
    for folder in folders[:-keep]:
        if folder != best:
            remove(folder)


def _best(folders: Sequence[Path]) -> Path | None:
    """The folder with the lowest eval loss, of equal ones the oldest; None when no loss was measured."""
    losses = {folder: loss for folder in folders if (loss := _eval_loss(folder)) is not None}
    return min(losses, key=lambda folder: losses[folder], default=None)


def _eval_loss(folder: Path) -> float | None:
    loss = (_read(folder / MANIFEST_NAME) or {}).get("eval_loss")
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def _folders(output_dir: Path) -> list[Path]:
    """Folders of checkpoints, whole or not, oldest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if step_of(path) and path.is_dir()), key=step_of)
