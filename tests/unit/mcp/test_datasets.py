"""Every form of a dataset argument, and files that may be read."""

from pathlib import Path

import pytest

import unslothd
from unslothd_mcp.datasets import dataset, local_file
from unslothd_mcp.errors import ToolFailure

ID = "sha256:" + "a" * 64
FORMS = [
    ([{"text": "a"}], [{"text": "a"}]),
    ({"rows": [{"text": "a"}]}, [{"text": "a"}]),
    ("org/name", unslothd.HubDataset("org/name")),
    ({"hub": "name", "split": "train[:10%]"}, unslothd.HubDataset("name", split="train[:10%]")),
    ("/data/rows.jsonl", unslothd.ServerPath("/data/rows.jsonl")),
    ("data/rows.csv", unslothd.ServerPath("data/rows.csv")),
    ("./folder", unslothd.ServerPath("./folder")),
    ({"path": "folder"}, unslothd.ServerPath("folder")),
    (ID, unslothd.UploadedDataset(ID)),
    ({"dataset_id": ID}, unslothd.UploadedDataset(ID)),
]


@pytest.mark.parametrize(("value", "meant"), FORMS, ids=str)
def test_every_form_is_what_it_says(value: object, meant: object):
    assert dataset(value, "train_dataset", ()) == meant


@pytest.mark.parametrize(
    "value", [None, 3, "word", [], [1], {}, {"rows": 1}, {"hub": 1}, {"path": "a", "hub": "b"}], ids=str
)
def test_what_is_none_of_them_names_the_argument_and_the_forms(value: object):
    if value == []:
        assert dataset(value, "eval_dataset", ()) == []  # the client says that it is empty
        return
    with pytest.raises(ToolFailure) as caught:
        dataset(value, "eval_dataset", ())
    assert [each.field for each in caught.value.fields] == ["eval_dataset"]
    assert "dataset_id" in caught.value.message


def test_a_file_is_read_only_below_a_root_whatever_leads_there(tmp_path: Path):
    root = tmp_path / "root"
    root.mkdir()
    inside, outside = root / "a.jsonl", tmp_path / "b.jsonl"
    inside.touch()
    outside.touch()
    (root / "link.jsonl").symlink_to(outside)
    assert local_file(str(inside), [root]) == inside.resolve()
    for path in (outside, root / "link.jsonl", root / ".." / "b.jsonl", root, root / "missing.jsonl"):
        with pytest.raises(ToolFailure, match=r"outside|no file"):
            local_file(str(path), [root])
    with pytest.raises(ToolFailure, match="--allowed-root"):
        local_file(str(inside), [])
