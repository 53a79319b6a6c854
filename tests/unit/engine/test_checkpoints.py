"""Sealed checkpoints: what is whole, what is not, where a training goes on, and what is removed."""

import json
from pathlib import Path

import pytest

from unslothd_server.engine import checkpoints
from unslothd_server.errors import NotFoundError, PreconditionError


def make(output_dir: Path, step: int, *, eval_loss: float | None = None, sealed: bool = True) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    (folder / "more").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 100)
    (folder / "more" / "optimizer.pt").write_bytes(b"moments" * 100)
    if sealed:
        checkpoints.seal(folder, eval_loss=eval_loss)
    return folder


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


def test_a_sealed_folder_is_whole_and_its_manifest_names_every_file(tmp_path: Path) -> None:
    folder = make(tmp_path, 3, eval_loss=1.5)
    assert checkpoints.verify(folder) is None
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["eval_loss"]) == (3, 1.5)
    assert set(manifest["files"]) == {"adapter_model.safetensors", "more/optimizer.pt"}
    assert manifest["files"]["more/optimizer.pt"]["num_bytes"] == 700
    assert not list(folder.glob("*.partial"))


def test_a_folder_that_was_left_half_written_is_not_whole(tmp_path: Path) -> None:
    folder = make(tmp_path, 3, sealed=False)
    assert checkpoints.verify(folder) == "it has no manifest.json, so it was never finished"
    (folder / "manifest.json").write_text('{"manifest_ver')
    assert checkpoints.verify(folder) == "its manifest.json cannot be read"
    (folder / "manifest.json").write_text("[1]")
    assert checkpoints.verify(folder) == "its manifest.json cannot be read"
    (folder / "manifest.json").write_text('{"files": {"a": 5}}')
    assert checkpoints.verify(folder) == "what is known of a cannot be read"


def test_every_kind_of_damage_is_named_with_its_file(tmp_path: Path) -> None:
    missing, short, changed = make(tmp_path, 1), make(tmp_path, 2), make(tmp_path, 3)
    (missing / "more" / "optimizer.pt").unlink()
    (short / "adapter_model.safetensors").write_bytes(b"weights" * 50)
    (changed / "adapter_model.safetensors").write_bytes(b"wEights" * 100)
    assert checkpoints.verify(missing) == "more/optimizer.pt is missing"
    assert checkpoints.verify(short) == "adapter_model.safetensors has 350 bytes instead of 700"
    assert checkpoints.verify(changed) == "the contents of adapter_model.safetensors have changed"
    assert checkpoints.verify(changed, contents=False) is None
    assert checkpoints.verify(tmp_path / "checkpoint-9") == "it is not there"


def test_the_checkpoint_that_was_asked_for_is_taken_without_a_word_when_it_is_whole(tmp_path: Path) -> None:
    point = checkpoints.choose(make(tmp_path, 6), [make(tmp_path, 3)])
    assert (point.step, point.folder.name, point.warning) == (6, "checkpoint-6", None)


def test_the_first_whole_one_takes_the_place_of_damaged_ones_and_that_is_said(tmp_path: Path) -> None:
    newest, middle, oldest = make(tmp_path, 9), make(tmp_path, 6, sealed=False), make(tmp_path, 3)
    (newest / "adapter_model.safetensors").unlink()
    point = checkpoints.choose(newest, [middle, oldest])
    assert point.step == 3
    assert point.warning == (
        "checkpoint-9 cannot be used: adapter_model.safetensors is missing; checkpoint-6 cannot be used: it has no "
        "manifest.json, so it was never finished. Training goes on from checkpoint-3 instead; the steps after 3 are "
        "done again."
    )


def test_without_a_whole_checkpoint_the_error_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    with pytest.raises(
        PreconditionError, match=r"checkpoint-6 .* never finished; checkpoint-3 .* not there"
    ) as damaged:
        checkpoints.choose(make(tmp_path, 6, sealed=False), [tmp_path / "checkpoint-3"])
    assert damaged.value.reason_name == "CHECKPOINT_DAMAGED"
    with pytest.raises(NotFoundError, match="start the training anew") as missing:
        checkpoints.choose(tmp_path / "checkpoint-5", [])
    assert missing.value.reason_name == "CHECKPOINT_NOT_FOUND"


def test_what_is_made_again_and_what_is_not_whole_is_removed_before_going_on(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        make(tmp_path, step)
    make(tmp_path, 4, sealed=False)
    (tmp_path / "runs").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    checkpoints.remove_after(tmp_path, 6)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-best", "runs"]
    checkpoints.remove_after(tmp_path / "nowhere", 0)


@pytest.mark.parametrize(
    ("losses", "keep", "left"),
    [
        ({1: None, 2: None, 10: None}, 2, [2, 10]),
        ({1: 0.5, 2: 0.7, 3: 0.9, 4: 0.8}, 2, [1, 3, 4]),
        ({1: 0.5, 2: 0.7, 3: 0.4}, 1, [3]),
        ({1: 0.5, 2: 0.5, 3: 0.9}, 1, [1, 3]),
        ({1: float("nan"), 2: 0.5, 3: 0.9}, 1, [2, 3]),
        ({1: 0.5, 2: 0.7}, 0, [1, 2]),
        ({1: 0.5, 2: 0.7}, 5, [1, 2]),
    ],
    ids=["newest", "newest-and-best", "best-is-newest", "equal", "not-a-number", "all", "fewer"],
)
def test_the_newest_ones_and_the_best_one_are_kept(
    tmp_path: Path, losses: dict[int, float | None], keep: int, left: list[int]
) -> None:
    for step, loss in losses.items():
        make(tmp_path, step, eval_loss=loss)
    checkpoints.remove_surplus(tmp_path, keep)
    assert sorted(checkpoints.step_of(path) for path in tmp_path.iterdir()) == left


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_taken_for_damage(tmp_path: Path) -> None:
    newer = make(tmp_path, 6)
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps({**manifest, "manifest_version": 2}))
    with pytest.raises(PreconditionError, match="has version 2, and this server reads up to 1"):
        checkpoints.choose(newer, [make(tmp_path, 3)])
    with pytest.raises(PreconditionError, match="Go on with that version"):
        checkpoints.remove_after(tmp_path, 6)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6"]
