"""What a dataset may be, and which templates are plain enough."""

from pathlib import Path

import pytest

from unslothd.v1.dataset_pb2 import DatasetSource, InlineRows, RowFormat, TemplateLayout, TextLayout
from unslothd_server.app.dataset_sources import resolve_dataset, template_columns
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.errors import InvalidFieldsError, NotFoundError, PermissionDeniedError


@pytest.fixture
def roots(tmp_path: Path) -> AllowedRoots:
    return AllowedRoots([tmp_path])


def test_a_relative_path_is_found_below_a_root(tmp_path: Path, roots: AllowedRoots):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    found = resolve_dataset(DatasetSource(path="rows.jsonl"), "train_dataset", roots, Path)
    assert found.path == str((tmp_path / "rows.jsonl").resolve())


def test_a_missing_path_is_not_found(roots: AllowedRoots):
    with pytest.raises(NotFoundError) as caught:
        resolve_dataset(DatasetSource(path="missing.jsonl"), "train_dataset", roots, Path)
    assert caught.value.reason_name == "DATASET_NOT_FOUND"


def test_a_path_outside_the_roots_is_refused(roots: AllowedRoots):
    with pytest.raises(PermissionDeniedError):
        resolve_dataset(DatasetSource(path="/etc/passwd"), "train_dataset", roots, Path)


def test_a_file_of_an_unknown_kind_names_the_field_and_the_known_kinds(tmp_path: Path, roots: AllowedRoots):
    (tmp_path / "rows.pkl").write_bytes(b"")
    with pytest.raises(InvalidFieldsError, match=r"\.jsonl") as caught:
        resolve_dataset(DatasetSource(path="rows.pkl"), "eval_dataset", roots, Path)
    assert caught.value.violations[0].field == "eval_dataset.path"


def test_plain_places_and_doubled_braces_are_a_template():
    assert template_columns("{{x}} {question} -> {answer_text}", "f") == ["question", "answer_text"]


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>10}", "{}", "{0}", "{a", "no place"])
def test_anything_but_plain_places_is_refused(template: str):
    with pytest.raises(InvalidFieldsError) as caught:
        template_columns(template, "train_dataset.row_format.template.template")
    assert caught.value.violations[0].field == "train_dataset.row_format.template.template"


@pytest.mark.parametrize(
    "layout",
    [RowFormat(text=TextLayout()), RowFormat(template=TemplateLayout(template="{a}"))],
    ids=["text", "template"],
)
def test_completion_only_loss_needs_rows_with_an_answer(layout: RowFormat, roots: AllowedRoots):
    layout.completion_only_loss = True
    source = DatasetSource(inline=InlineRows(data=b"{}"), row_format=layout)
    with pytest.raises(InvalidFieldsError, match="answer"):
        resolve_dataset(source, "train_dataset", roots, Path)
