"""What a model_name may mean, and what it may never reach."""

import json
from pathlib import Path

import pytest

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.sources import resolve_model_source
from unslothd_server.errors import InvalidFieldsError, NotFoundError, PermissionDeniedError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    root.mkdir()
    return root


@pytest.fixture
def roots(root: Path) -> AllowedRoots:
    return AllowedRoots([root])


def a_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def no_result(training_id: str, step: int) -> Path:
    raise NotFoundError(ErrorReason.ERROR_REASON_TRAINING_NOT_FOUND, training_id)


def test_org_slash_name_is_a_hub_id(roots: AllowedRoots):
    found = resolve_model_source("unsloth/Llama-3.2-1B", roots, no_result)
    assert (found.source, found.path, found.base_id) == ("unsloth/Llama-3.2-1B", None, "Llama-3.2-1B")


def test_a_folder_below_a_root_wins_over_a_hub_id_of_the_same_name(root: Path, roots: AllowedRoots):
    folder = a_model(root / "unsloth" / "tiny")
    assert resolve_model_source("unsloth/tiny", roots, no_result).path == folder.resolve()


def test_an_absolute_folder_below_a_root_is_taken(root: Path, roots: AllowedRoots):
    folder = a_model(root / "tiny")
    assert resolve_model_source(str(folder), roots, no_result).source == str(folder.resolve())


def test_a_gguf_file_names_its_model_without_the_suffix(root: Path, roots: AllowedRoots):
    (root / "SmolLM2.gguf").write_bytes(b"GGUF")
    assert resolve_model_source("SmolLM2.gguf", roots, no_result).base_id == "SmolLM2"


def test_the_result_of_a_training_is_a_source(root: Path, roots: AllowedRoots):
    folder = root / "run" / "final"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "unsloth/tiny"}))
    found = resolve_model_source("training:training-1", roots, lambda training_id, step: folder)
    assert (found.path, found.base_id) == (folder.resolve(), "training-1")


def test_a_checkpoint_of_a_training_is_a_source(root: Path, roots: AllowedRoots):
    folder = root / "run" / "checkpoint-40"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "unsloth/tiny"}))
    asked: list[tuple[str, int]] = []

    def result_of(training_id: str, step: int) -> Path:
        asked.append((training_id, step))
        return folder

    found = resolve_model_source("training:training-1/checkpoint-40", roots, result_of)
    assert (found.path, asked) == (folder.resolve(), [("training-1", 40)])


def test_a_result_that_was_replaced_by_a_link_out_of_the_roots_is_refused(
    tmp_path: Path, root: Path, roots: AllowedRoots
):
    a_model(tmp_path / "outside")
    (root / "final").symlink_to(tmp_path / "outside")
    with pytest.raises(PermissionDeniedError):
        resolve_model_source("training:training-1", roots, lambda training_id, step: root / "final")


@pytest.mark.parametrize("step", ["0", "-1", "x", "1/2"])
def test_a_checkpoint_without_a_step_is_refused(step: str, roots: AllowedRoots):
    with pytest.raises(InvalidFieldsError):
        resolve_model_source(f"training:training-1/checkpoint-{step}", roots, no_result)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "./../../etc", "~/secrets"])
def test_a_path_outside_the_roots_is_refused_whether_or_not_it_exists(name: str, roots: AllowedRoots):
    with pytest.raises(PermissionDeniedError) as caught:
        resolve_model_source(name, roots, no_result)
    assert caught.value.reason_name == "PATH_NOT_ALLOWED"


def test_a_link_that_leads_out_of_the_roots_is_refused(tmp_path: Path, root: Path, roots: AllowedRoots):
    a_model(tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(PermissionDeniedError):
        resolve_model_source("./link", roots, no_result)


def test_an_adapter_whose_base_lies_outside_the_roots_is_refused(tmp_path: Path, root: Path, roots: AllowedRoots):
    base = a_model(tmp_path / "outside")
    adapter = root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    with pytest.raises(PermissionDeniedError):
        resolve_model_source("./adapter", roots, no_result)


def test_nothing_at_a_path_is_not_found_and_says_where_it_looked(root: Path, roots: AllowedRoots):
    with pytest.raises(NotFoundError, match=str(root)):
        resolve_model_source("./missing", roots, no_result)


def test_a_folder_without_a_model_is_not_found(root: Path, roots: AllowedRoots):
    (root / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"config\.json"):
        resolve_model_source("./empty", roots, no_result)


def test_a_name_that_is_nothing_of_all_this_is_a_wrong_field(roots: AllowedRoots):
    with pytest.raises(InvalidFieldsError) as caught:
        resolve_model_source("what is this?", roots, no_result)
    assert [each.field for each in caught.value.violations] == ["model_name"]
