"""A worker that takes the place of another: prepared with a checkpoint's weights, it trains on alike."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.engine_runs import Loaded, LoadTiny, Row
from unslothd.v1.model_pb2 import LoraConfig
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.errors import NotFoundError, PreconditionError

CONFIG = TrainingConfig(max_steps=2, warmup_steps=0, learning_rate=5e-3, save_steps=1)
ADAPTERS = {
    "adapter": (LoraConfig(r=4, lora_dropout=0.2), {}),
    "adapter with embeddings": (LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"]), {}),
    "all weights": (None, {"full_finetuning": True}),
}


def trainable(loaded: Loaded) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in loaded.torch_model.named_parameters() if p.requires_grad}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", ADAPTERS.values(), ids=ADAPTERS)
def test_a_replaced_worker_trains_on_as_the_first_would_have(
    load: LoadTiny, texts: list[Row], case: tuple[LoraConfig | None, dict[str, Any]]
) -> None:
    lora, options = case
    first = load(**options)
    first.prepare(lora)
    done = first.train(texts, CONFIG, name="done")
    learnt = trainable(first)
    expected = first.train(texts, CONFIG, name="expected")
    for name, folder in [("final", done.output_dir / "final"), ("checkpoint", done.output_dir / "checkpoint-2")]:
        second = load(**options)
        second.prepare(lora, seed=99, weights_from=folder)
        assert equal(trainable(second), learnt)
        got = second.train(texts, CONFIG, name=name)
        assert got.losses == expected.losses
        assert equal(trainable(second), trainable(first))


def test_an_adapter_that_came_with_the_model_is_replaced_too(load: LoadTiny, texts: list[Row]) -> None:
    first = load()
    first.prepare(LoraConfig(r=4))
    base = first.train(texts, CONFIG, name="base")
    later = first.train(texts, CONFIG, name="later")
    second = load(base.output_dir / "final")
    second.prepare(weights_from=later.output_dir / "final")
    assert equal(trainable(second), trainable(first))


@pytest.fixture
def trained(prepared: Loaded, texts: list[Row]) -> Path:
    return prepared.train(texts, CONFIG).output_dir


def refusal(load: LoadTiny, folder: Path, **options: Any) -> PreconditionError | NotFoundError:
    """What preparing says; the first weights stay."""
    lora = options.pop("lora", None)
    untouched, loaded = load(**options), load(**options)
    untouched.prepare(lora)
    with pytest.raises((PreconditionError, NotFoundError)) as raised:
        loaded.prepare(lora, weights_from=folder)
    loaded.prepare(lora)
    assert equal(trainable(loaded), trainable(untouched))
    return raised.value


def test_a_folder_that_is_not_there_or_holds_no_weights_is_told(load: LoadTiny, trained: Path, tmp_path: Path) -> None:
    assert refusal(load, tmp_path / "nowhere").reason_name == "CHECKPOINT_NOT_FOUND"
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_model.bin").write_bytes(b"pickle")
    assert refusal(load, pickled).reason_name == "CHECKPOINT_NOT_FOUND"


def test_a_changed_byte_is_noticed_in_a_checkpoint_and_in_a_result(load: LoadTiny, trained: Path) -> None:
    for folder in (trained / "checkpoint-1", trained / "final"):
        file = folder / "adapter_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        error = refusal(load, folder)
        assert error.reason_name == "CHECKPOINT_DAMAGED"
        assert "adapter_model.safetensors have changed" in error.message


def test_a_result_without_a_receipt_is_still_read_with_care(load: LoadTiny, trained: Path) -> None:
    final = trained / "final"
    (final / "receipt.json").unlink()
    file = final / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be read" in refusal(load, final).message


def test_weights_of_another_adapter_or_model_are_refused(load: LoadTiny, trained: Path) -> None:
    for folder in (trained / "checkpoint-1", trained / "final"):
        for lora in (LoraConfig(r=8), LoraConfig(target_modules=["q_proj"]), LoraConfig(modules_to_save=["lm_head"])):
            error = refusal(load, folder, lora=lora)
            assert error.reason_name == "CHECKPOINT_DAMAGED"
            assert "another model or adapter" in error.message
    assert refusal(load, trained / "final", full_finetuning=True).reason_name == "CHECKPOINT_NOT_FOUND"


def test_where_the_weights_came_from_is_in_the_receipt(load: LoadTiny, trained: Path, texts: list[Row]) -> None:
    loaded = load()
    loaded.prepare(weights_from=trained / "final")
    run = loaded.train(texts, CONFIG, name="later")
    receipt = json.loads((run.output_dir / "final" / "receipt.json").read_text())
    assert receipt["model"]["weights_from"] == str(trained / "final")
