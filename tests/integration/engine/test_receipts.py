"""The receipt of a run: everything in it is true, and checked here by other means than it was made by."""

import hashlib
import json
import struct
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict

from support.engine_runs import Loaded, LoadTiny, Row, Run, as_source
from unslothd.v1.dataset_pb2 import DatasetSource, RowFormat
from unslothd.v1.model_pb2 import LoraConfig
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import TrainingConfig, TrainingMetrics
from unslothd_server.worker.ports import StopSignal

CONFIG = TrainingConfig(max_steps=4, warmup_steps=0, learning_rate=5e-3, batch_size=2, save_steps=2)


def receipt_of(run: Run) -> dict[str, Any]:
    return json.loads((run.output_dir / "final" / "receipt.json").read_text(encoding="utf-8"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def losses_sha256(*runs: Run) -> str:
    """As docs/receipts.md says: of a step that was logged twice the last event counts."""
    losses = {step.step: step.loss for run in runs for step in run.of("step")}
    return sha256(b"".join(struct.pack("<qd", step, losses[step]) for step in sorted(losses)))


def test_a_receipt_says_what_ran_on_what_with_what(prepared: Loaded, tiny: Path, texts: list[Row]) -> None:
    import torch

    run = prepared.train(texts, CONFIG, eval_rows=texts[:3])
    receipt = receipt_of(run)
    assert (receipt["receipt_version"], receipt["training_id"], receipt["outcome"]) == (1, "out", "succeeded")
    assert (receipt["step"], receipt["total_steps"], receipt["resumed_from_step"]) == (4, 4, 0)
    assert receipt["start_time"] < receipt["end_time"]
    assert receipt["start_time"].endswith("Z")
    assert receipt["versions"]["torch"] == torch.__version__
    assert {"python", "unslothd", "unsloth", "transformers", "trl", "peft", "datasets"} <= set(receipt["versions"])
    assert receipt["device"] == {"name": "cpu"}
    assert receipt["seeds"] == {"training": 42, "adapter": 7, "load": 3}
    model = receipt["model"]
    assert (model["model_name"], model["source"], model["dtype"]) == ("tiny", str(tiny), "float32")
    assert (model["load_in_4bit"], model["full_finetuning"], model["trainable_params"]) == (False, False, 32_768)
    assert ParseDict(receipt["config"], TrainingConfig()) == run.plan.config
    assert ParseDict(receipt["lora"], LoraConfig()) == prepared.engine.prepare(prepared_request()).lora
    assert ParseDict(receipt["metrics"], TrainingMetrics()) == run.result.metrics
    assert receipt["losses"] == {"count": 4, "sha256": losses_sha256(run)}


def prepared_request() -> Any:
    from unslothd.worker.v1.worker_service_pb2 import PrepareForTrainingRequest

    return PrepareForTrainingRequest()


def test_the_weights_of_a_local_model_are_told_by_size_and_header(
    prepared: Loaded, tiny: Path, texts: list[Row]
) -> None:
    (told,) = receipt_of(prepared.train(texts, CONFIG))["model"]["weights"]
    data = Path(told["path"]).read_bytes()
    assert Path(told["path"]).parent == tiny
    assert told["num_bytes"] == len(data)
    assert told["header_sha256"] == sha256(data[: 8 + struct.unpack("<Q", data[:8])[0]])


def test_a_model_of_the_hub_is_told_by_its_commit(
    prepared: Loaded, texts: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--org--tiny"
    for name, content in {"refs/main": "1234abcd", "snapshots/1234abcd/config.json": "{}"}.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(content)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    prepared.engine._loaded.request.source = "org/tiny"  # type: ignore[union-attr]
    model = receipt_of(prepared.train(texts, CONFIG))["model"]
    assert (model["source"], model["commit"], model["weights"]) == ("org/tiny", "1234abcd", [])


def test_an_adapter_is_told_with_its_base(load: LoadTiny, tiny: Path, texts: list[Row]) -> None:
    first = load()
    first.prepare()
    final = first.train(texts, CONFIG, name="first").output_dir / "final"
    second = load(final)
    second.prepare()
    model = receipt_of(second.train(texts, CONFIG, name="second"))["model"]
    assert (model["source"], model["base_model"], model["base_commit"]) == (str(final), str(tiny), "")
    assert [Path(file["path"]).parent for file in model["weights"]] == [final, tiny]


def test_the_sums_of_all_results_are_in_the_receipt_and_it_lies_in_both_places(
    prepared: Loaded, texts: list[Row]
) -> None:
    run = prepared.train(texts, CONFIG)
    final = run.output_dir / "final"
    files = {path.relative_to(final).as_posix(): path.read_bytes() for path in final.rglob("*") if path.is_file()}
    receipt_bytes = files.pop("receipt.json")
    assert receipt_of(run)["files"] == {
        name: {"num_bytes": len(data), "sha256": sha256(data)} for name, data in files.items()
    }
    assert (prepared.folder / "trainings" / "out" / "receipt.json").read_bytes() == receipt_bytes


def test_the_rows_are_told_as_they_lay_on_disk_and_as_the_trainer_got_them(
    prepared: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from unslothd_server.engine import training

    build_trainer, trained_on = training.build_trainer, {}

    def build(*args: Any, **kwargs: Any) -> Any:
        trainer = build_trainer(*args, **kwargs)
        trained_on.update(trainer.train_dataset.to_dict())
        return trainer

    monkeypatch.setattr(training, "build_trainer", build)

    rows = [
        {"prompt": "1 2 ", "completion": "3 4"},
        {"prompt": "5", "completion": "6"},
        {"prompt": "7", "completion": ""},
    ]
    run = prepared.train(rows, CONFIG)
    told = receipt_of(run)["datasets"]["train"]
    path = prepared.folder / "out-rows.jsonl"
    assert ParseDict(told["source"], DatasetSource()) == as_source(path, path, None)
    assert told["file"] == {"num_bytes": path.stat().st_size, "sha256": sha256(path.read_bytes())}
    assert ParseDict(told["row_format"], RowFormat()) == run.plan.row_format
    assert "eval" not in receipt_of(run)["datasets"]
    assert (told["num_rows"], told["num_tokens"], told["loss_tokens"]) == (
        run.plan.num_rows,
        run.plan.num_tokens,
        run.plan.loss_tokens,
    )
    ids, labels = trained_on["input_ids"], trained_on["labels"]
    assert [len(row) for row in ids] == [len(row) for row in labels]
    expected = (
        np.array([len(row) for row in ids], dtype="<i8").tobytes()
        + np.array([*chain(*ids)], dtype="<i4").tobytes()
        + np.array([*chain(*labels)], dtype="<i4").tobytes()
    )
    assert told["tokens_sha256"] == sha256(expected)


def test_the_file_that_is_told_is_the_one_that_was_trained_on(prepared: Loaded, texts: list[Row]) -> None:
    path = prepared.folder / "out-rows.jsonl"
    read: list[bytes] = []

    def swap(event: TrainingEvent, _: StopSignal) -> None:
        if event.HasField("started"):
            read.append(path.read_bytes())
            path.unlink()
            path.write_text('{"text": "another"}')

    told = receipt_of(prepared.train(texts, CONFIG, on_event=swap))["datasets"]["train"]
    assert told["file"] == {"num_bytes": len(read[0]), "sha256": sha256(read[0])}


def test_a_folder_of_rows_is_told_by_its_fingerprint(prepared: Loaded, texts: list[Row], tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(texts).save_to_disk(str(tmp_path / "rows"))
    told = receipt_of(prepared.train(tmp_path / "rows", CONFIG))["datasets"]["train"]
    assert told["fingerprint"] == datasets.load_from_disk(str(tmp_path / "rows"))._fingerprint
    assert "file" not in told


def test_equal_runs_have_equal_receipts_but_for_times(load: LoadTiny, texts: list[Row]) -> None:
    told: list[dict[str, Any]] = []
    for _ in range(2):
        loaded = load()
        loaded.prepare()
        receipt = receipt_of(loaded.train(texts, CONFIG, name="equal"))
        for name in ("start_time", "end_time", "metrics"):
            del receipt[name]
        told.append(receipt)
    assert told[0] == told[1]


def test_the_receipt_of_a_resumed_run_holds_the_losses_of_all_its_steps(load: LoadTiny, texts: list[Row]) -> None:
    first, second = load(), load()
    first.prepare()
    second.prepare()
    whole = first.train(texts, CONFIG, name="run")
    rest = second.train(texts, CONFIG, name="run", resume_from=whole.output_dir / "checkpoint-2")
    receipt = receipt_of(rest)
    assert receipt["resumed_from_step"] == 2
    assert receipt["losses"] == {"count": 4, "sha256": losses_sha256(whole, rest)}


def test_what_a_model_learnt_before_is_in_the_receipt(prepared: Loaded, texts: list[Row]) -> None:
    prepared.train(texts, CONFIG, name="first")
    receipt = receipt_of(prepared.train(texts, CONFIG, name="second"))
    assert receipt["model"]["trained_by"] == ["first"]


def test_a_cancelled_training_that_saved_has_a_receipt_and_one_that_did_not_has_none(
    prepared: Loaded, texts: list[Row]
) -> None:
    def cancel(save: bool) -> Any:
        def on_event(event: TrainingEvent, stop: StopSignal) -> None:
            if event.HasField("step") and event.step.step == 2:
                stop.save_checkpoint = save
                stop.requested.set()

        return on_event

    saved = prepared.train(texts, CONFIG, name="saved", on_event=cancel(save=True))
    receipt = receipt_of(saved)
    assert (receipt["outcome"], receipt["step"], receipt["total_steps"]) == ("cancelled", 3, 4)
    prepared.train(texts, CONFIG, name="lost", on_event=cancel(save=False))
    assert not list((prepared.folder / "trainings" / "lost").glob("receipt*"))


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
def test_full_fine_tuning_has_a_receipt_without_lora(load: LoadTiny, texts: list[Row], full: bool) -> None:
    loaded = load(full_finetuning=full)
    loaded.prepare()
    receipt = receipt_of(loaded.train(texts, CONFIG))
    assert ("lora" in receipt) is not full
    assert any(name.endswith("model.safetensors") for name in receipt["files"])
