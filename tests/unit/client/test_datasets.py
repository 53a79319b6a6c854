"""What users have becomes the DatasetSource that the server reads."""

import datetime
import decimal
import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import unslothd
from unslothd import errors
from unslothd.v1 import dataset_pb2

ROWS = [{"text": "eins"}, {"text": "zwei ✓"}]


def rows_in(source: dataset_pb2.DatasetSource) -> list[dict[str, object]]:
    assert source.inline.format == dataset_pb2.DATA_FORMAT_JSONL
    return [json.loads(line) for line in source.inline.data.decode().splitlines()]


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        tuple(ROWS),
        (row for row in ROWS),
        pd.DataFrame(ROWS),
        pa.Table.from_pylist(ROWS),
        datasets.Dataset.from_list(ROWS),
        datasets.IterableDataset.from_generator(lambda: iter(ROWS)),
    ],
    ids=["list", "tuple", "generator", "pandas", "pyarrow", "datasets", "iterable dataset"],
)
def test_rows_travel_as_jsonl(data):
    assert rows_in(unslothd.dataset(data)) == ROWS


def test_missing_cells_of_a_frame_are_null():
    frame = pd.DataFrame({"a": [1.5, float("nan")], "b": ["x", None], "c": pd.to_datetime(["2026-01-02", None])})
    assert rows_in(unslothd.dataset(frame)) == [
        {"a": 1.5, "b": "x", "c": "2026-01-02T00:00:00"},
        {"a": None, "b": None, "c": None},
    ]


def test_values_of_numpy_dates_and_decimals_are_plain():
    row = {"a": np.int64(3), "b": np.array([1, 2]), "c": datetime.date(2026, 1, 2), "d": decimal.Decimal("1.5")}
    assert rows_in(unslothd.dataset([row])) == [{"a": 3, "b": [1, 2], "c": "2026-01-02", "d": 1.5}]


@pytest.mark.parametrize("value", [b"bytes", float("nan"), object()])
def test_a_value_that_json_does_not_have_is_named_by_its_row(value):
    with pytest.raises(errors.InvalidRequest, match="row 2 cannot be sent as JSON"):
        unslothd.dataset([{"text": "ok"}, {"text": value}])


def test_rows_that_are_texts_are_refused_with_the_way_to_do_it():
    with pytest.raises(TypeError, match="for plain texts pass"):
        unslothd.dataset(["a", "b"])


def test_a_dict_of_splits_is_refused_with_its_keys():
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS))
    with pytest.raises(TypeError, match="train, test"):
        unslothd.dataset(splits)


@pytest.mark.parametrize("data", [7, None, b"bytes"])
def test_what_is_no_dataset_is_refused(data):
    with pytest.raises(TypeError, match="is not a dataset"):
        unslothd.dataset(data)


def test_no_rows_are_refused():
    with pytest.raises(errors.InvalidRequest, match="no rows") as caught:
        unslothd.dataset([])
    assert caught.value.reason == "DATASET_EMPTY"


def test_rows_beyond_4_mib_are_refused_before_all_are_read_and_say_what_to_do():
    taken = []

    def endless() -> object:
        while True:
            taken.append(1)
            yield {"text": "x" * 1_000_000}

    with pytest.raises(errors.InvalidRequest, match="upload_dataset"):
        unslothd.dataset(endless())
    assert len(taken) == 5


@pytest.mark.parametrize(
    ("suffix", "data_format"),
    [
        (".jsonl", dataset_pb2.DATA_FORMAT_JSONL),
        (".JSONL", dataset_pb2.DATA_FORMAT_JSONL),
        (".csv", dataset_pb2.DATA_FORMAT_CSV),
        (".parquet", dataset_pb2.DATA_FORMAT_PARQUET),
        (".arrow", dataset_pb2.DATA_FORMAT_ARROW_STREAM),
    ],
)
@pytest.mark.parametrize("kind", [Path, str])
def test_a_local_file_travels_as_it_is(tmp_path, suffix, data_format, kind):
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(b"whatever is in it")
    source = unslothd.dataset(kind(file))
    assert source.inline == dataset_pb2.InlineRows(format=data_format, data=b"whatever is in it")


def test_a_json_file_may_hold_a_list(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS, indent=2))
    assert rows_in(unslothd.dataset(file)) == ROWS


def test_a_broken_json_file_is_refused(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text("[1,")
    with pytest.raises(errors.InvalidRequest, match=r"rows\.json is not JSON"):
        unslothd.dataset(file)


def test_a_large_file_is_refused_with_the_way_to_do_it(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b" " * (4 * 1024 * 1024 + 1))
    with pytest.raises(errors.InvalidRequest, match=r"4194305 bytes.*upload_dataset"):
        unslothd.dataset(file)


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "rows.xlsx"
    file.write_bytes(b"x")
    with pytest.raises(errors.InvalidRequest, match=r"\.jsonl, "):
        unslothd.dataset(file)


def test_an_arrow_file_that_is_no_stream_is_refused(tmp_path):
    file = tmp_path / "rows.arrow"
    with pa.ipc.new_file(file, pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS))
    with pytest.raises(errors.InvalidRequest, match="not a stream"):
        unslothd.dataset(file)


def test_org_and_name_are_a_hub_dataset():
    assert unslothd.dataset("yahma/alpaca-cleaned").hub.name == "yahma/alpaca-cleaned"


@pytest.mark.parametrize("text", ["squad", "missing/rows.jsonl", "/data/rows", "./rows", "a/b/c"])
def test_a_str_that_could_be_several_things_is_refused_with_the_wrappers(text):
    with pytest.raises(errors.InvalidRequest) as caught:
        unslothd.dataset(text)
    for name in ("ServerPath", "HubDataset", "UploadedDataset"):
        assert name in str(caught.value)


def test_a_folder_here_that_looks_like_a_hub_name_is_refused(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.InvalidRequest, match=r"is a folder here.*ServerPath.*HubDataset"):
        unslothd.dataset("org/name")


def test_a_missing_path_is_refused_with_server_path(tmp_path):
    with pytest.raises(errors.InvalidRequest, match="ServerPath"):
        unslothd.dataset(tmp_path / "rows.jsonl")


def test_wrappers_say_where_rows_are():
    assert unslothd.dataset(unslothd.ServerPath("/data/rows.jsonl")).path == "/data/rows.jsonl"
    hub = unslothd.dataset(unslothd.HubDataset("squad", config="plain", split="train[:1%]", revision="v1")).hub
    assert (hub.name, hub.config, hub.split, hub.revision) == ("squad", "plain", "train[:1%]", "v1")
    assert unslothd.dataset(unslothd.UploadedDataset("sha256:" + "0" * 64)).dataset_id == "sha256:" + "0" * 64


def test_a_source_message_is_taken_as_it_is_and_not_changed():
    source = dataset_pb2.DatasetSource(path="x", limit=3)
    taken = unslothd.dataset(source, row_format="text")
    assert (taken.path, taken.limit, taken.row_format.WhichOneof("layout")) == ("x", 3, "text")
    assert not source.HasField("row_format")


@pytest.mark.parametrize("layout", ["text", "chat", "prompt_completion", "alpaca", "preference"])
def test_layouts_have_names(layout):
    assert unslothd.dataset(ROWS, row_format=layout).row_format.WhichOneof("layout") == layout


def test_a_row_format_has_columns_and_loss():
    made = unslothd.row_format(
        "prompt_completion", prompt_column="q", completion_column="a", completion_only_loss=False
    )
    assert made == dataset_pb2.RowFormat(
        prompt_completion=dataset_pb2.PromptCompletionLayout(prompt_column="q", completion_column="a"),
        completion_only_loss=False,
    )
    assert unslothd.dataset(ROWS, row_format=made, limit=1).limit == 1


def test_a_template_is_a_row_format():
    assert unslothd.dataset(ROWS, template="Q: {q}").row_format.template.template == "Q: {q}"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"layout": "poem"}, "prompt_completion"),
        ({"layout": "text", "template": "{a}"}, "leave out"),
        ({"layout": "text", "prompt_column": "q"}, "has no prompt_column"),
        ({"column": "body"}, "needs a layout"),
    ],
)
def test_a_row_format_that_makes_no_sense_is_refused(arguments, text):
    with pytest.raises(errors.InvalidRequest, match=text):
        unslothd.row_format(**arguments)
