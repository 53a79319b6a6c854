"""Loading, the adapter, and what is told about both."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.engine_runs import Loaded, LoadTiny, Row
from support.plain_transformers import PROMPT, Reader
from support.tiny_gguf import write_gguf
from support.tiny_model import HIDDEN_SIZE, VOCAB_SIZE, build_tiny_llama
from unslothd.v1.model_pb2 import LoadProgress, LoraConfig
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.engine.parameters import ParameterCounts, count_parameters
from unslothd_server.errors import (
    InvalidFieldsError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
    UnslothdError,
)

TINY_PARAMS = 155_968
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_the_import_tells_the_versions(versions: dict[str, str]) -> None:
    assert versions.keys() == {"unsloth", "torch", "transformers", "trl", "peft", "bitsandbytes"}
    assert all(versions.values())


def test_what_was_imported_is_walked_by_no_garbage_collection(versions: dict[str, str]) -> None:
    assert gc.isenabled()
    assert gc.get_freeze_count() > 100_000


def test_a_folder_is_loaded_and_described(load: LoadTiny) -> None:
    loaded = load()
    model = loaded.model
    assert (model.dtype, model.device, model.device_map, model.load_in_4bit) == ("float32", "cpu", "auto", False)
    assert (model.total_params, model.trainable_params, model.max_seq_length) == (TINY_PARAMS, 0, 128)
    assert model.memory_bytes > 10**8
    assert not model.HasField("lora")
    assert list(model.warnings) == []
    assert [step.phase for step in loaded.progress] == [LoadProgress.PHASE_LOADING_WEIGHTS]


def test_a_dtype_can_be_chosen(load: LoadTiny) -> None:
    assert load(dtype="bfloat16").model.dtype == "bfloat16"


def test_what_the_device_cannot_do_is_a_warning(load: LoadTiny) -> None:
    model = load(dtype="float16").model
    assert model.dtype != "float16"
    assert any("float16" in warning for warning in model.warnings)


def test_an_unknown_dtype_is_a_wrong_field(load: LoadTiny) -> None:
    with pytest.raises(InvalidFieldsError) as raised:
        load(dtype="float8")
    assert raised.value.violations[0].field == "dtype"


def test_4bit_weights_are_read_back_and_count_unpacked(load: LoadTiny) -> None:
    loaded = load(load_in_4bit=True)
    assert loaded.model.load_in_4bit
    assert loaded.model.total_params == TINY_PARAMS
    assert loaded.prepare(LoraConfig(r=8)).trainable_params == 16_384
    assert loaded.prepare().total_params == TINY_PARAMS


def test_4bit_trains(load: LoadTiny, texts: list[Row]) -> None:
    loaded = load(load_in_4bit=True)
    loaded.prepare()
    run = loaded.train(texts, TrainingConfig(max_steps=4, warmup_steps=0, learning_rate=1e-2))
    assert run.losses[-1] < run.losses[0]


def test_tied_weights_count_once(load: LoadTiny, tmp_path: Path) -> None:
    tied = load(build_tiny_llama(tmp_path / "tied", tie_word_embeddings=True))
    real_vocabulary = 640
    assert real_vocabulary == VOCAB_SIZE
    assert tied.model.total_params == TINY_PARAMS - VOCAB_SIZE * HIDDEN_SIZE


def test_llama_2_7b_has_its_published_counts() -> None:
    import torch
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=11008))
        model = get_peft_model(model, PeftLoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    assert count_parameters(model) == ParameterCounts(total=6_738_415_616, trainable=4_194_304)


# ── sources that cannot be loaded ──


def refused(load: LoadTiny, source: Path | str) -> UnslothdError:
    with pytest.raises(UnslothdError) as raised:
        load(source)
    return raised.value


def test_a_folder_of_pickled_weights_is_refused(load: LoadTiny, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refused(load, folder)
    assert isinstance(error, PreconditionError)
    assert error.reason_name == "UNSAFE_WEIGHTS"


def test_a_pickled_adapter_is_refused(load: LoadTiny, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny)}))
    (folder / "adapter_model.bin").write_bytes(b"anything")
    assert refused(load, folder).reason_name == "UNSAFE_WEIGHTS"


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "damaged"])
def test_a_source_that_holds_no_model_is_not_found(load: LoadTiny, tiny: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    if kind == "empty":
        source.mkdir()
    elif kind == "file":
        source.write_text("hello")
    elif kind == "damaged":
        shutil.copytree(tiny, source)
        (source / "model.safetensors").write_bytes(b"not weights")
    error = refused(load, source)
    assert isinstance(error, NotFoundError)
    assert error.reason_name == "MODEL_SOURCE_NOT_FOUND"
    assert str(source) in error.message


def test_a_gguf_file_becomes_the_same_model_with_the_same_tokens_and_trains(
    load: LoadTiny, tiny: Path, tmp_path: Path, texts: list[Row]
) -> None:
    import torch

    original = load()
    loaded = load(write_gguf(tiny, tmp_path / "tiny.gguf"))
    assert loaded.model.total_params == TINY_PARAMS
    weights = loaded.torch_model.state_dict()
    for name, weight in original.torch_model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=0, msg=name)
    assert loaded.tokenizer.eos_token == original.tokenizer.eos_token
    text = "The quick brown fox<|im_end|> jumps over 東京"
    assert loaded.tokenizer(text).input_ids == original.tokenizer(text).input_ids
    loaded.prepare()
    assert [step.step for step in loaded.train(texts).of("step")] == [1, 2]


def test_a_damaged_gguf_file_is_refused(load: LoadTiny, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not gguf at all")
    error = refused(load, tmp_path / "model.gguf")
    assert isinstance(error, PreconditionError)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_model_of_the_hub_without_network_is_told_at_once(load: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    # A port of this host where nobody listens stands for a Hub that cannot be reached.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = refused(load, "nobody/no-such-model")
    assert isinstance(error, UnavailableError)
    assert error.reason_name == "HUB_UNREACHABLE"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", "m.h5", "modeling.py"])
def test_neither_pickles_nor_code_are_fetched_from_the_hub(
    load: LoadTiny, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = ["model.safetensors", "config.json", name, f"folder/{name}"]
    fetched: list[str] = []

    def fetch(repository: str, *, allow_patterns: list[str], **_: Any) -> str:
        fetched.extend(filter_repo_objects(files, allow_patterns=allow_patterns))
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    refused(load, "org/model")
    assert fetched == ["model.safetensors", "config.json"]


def test_a_model_that_wants_its_own_code_is_refused(load: LoadTiny, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "custom")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "my_own"
    config["auto_map"] = {"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('this ran')\n")
    error = refused(load, folder)
    assert error.reason_name == "REMOTE_CODE_REFUSED"


# ── the adapter ──


def test_an_adapter_without_wishes_has_the_documented_defaults(load: LoadTiny) -> None:
    model = load().prepare()
    assert model.lora == LoraConfig(r=16, lora_alpha=16, lora_dropout=0, target_modules=SEVEN, use_rslora=False)
    assert model.trainable_params == 32_768
    assert model.total_params == TINY_PARAMS


def test_an_adapter_is_what_was_asked_for(load: LoadTiny) -> None:
    asked = LoraConfig(
        r=4,
        lora_alpha=12,
        lora_dropout=0.25,
        target_modules=["q_proj", "down_proj"],
        use_rslora=True,
        modules_to_save=["lm_head"],
        layers_to_transform=[1],
    )
    model = load().prepare(asked)
    assert model.lora == asked
    assert model.trainable_params == 4 * (64 + 64) + 4 * (128 + 64) + VOCAB_SIZE * HIDDEN_SIZE


def test_alpha_follows_the_rank_unless_set(load: LoadTiny) -> None:
    assert load().prepare(LoraConfig(r=64)).lora.lora_alpha == 64


def test_modules_and_layers_that_the_model_does_not_have_are_all_named(load: LoadTiny) -> None:
    asked = LoraConfig(target_modules=["q_proj", "w_pack"], modules_to_save=["head"], layers_to_transform=[0, 2])
    with pytest.raises(InvalidFieldsError) as raised:
        load().prepare(asked)
    fields = {violation.field: violation.description for violation in raised.value.violations}
    assert fields.keys() == {"lora.target_modules", "lora.modules_to_save", "lora.layers_to_transform"}
    assert "w_pack" in fields["lora.target_modules"]
    assert all(name in fields["lora.target_modules"] for name in SEVEN)


def test_preparing_again_is_idempotent_and_another_adapter_is_refused(load: LoadTiny) -> None:
    loaded = load()
    first = loaded.prepare(LoraConfig(r=8, target_modules=["q_proj", "embed_tokens"]))
    for again in (None, LoraConfig(r=8), LoraConfig(target_modules=["embed_tokens", "q_proj"]), first.lora):
        assert loaded.prepare(again).lora == first.lora
    with pytest.raises(PreconditionError) as raised:
        loaded.prepare(LoraConfig(r=16))
    assert raised.value.reason_name == "ALREADY_PREPARED"
    assert "r (16 asked, 8 attached)" in raised.value.message


def test_training_before_preparing_is_refused(load: LoadTiny, texts: list[Row]) -> None:
    with pytest.raises(PreconditionError) as raised:
        load().train(texts)
    assert raised.value.reason_name == "MODEL_NOT_PREPARED"


def test_all_weights_can_be_trained(load: LoadTiny, texts: list[Row]) -> None:
    loaded = load(full_finetuning=True)
    model = loaded.prepare()
    assert model.full_finetuning
    assert model.trainable_params == model.total_params == TINY_PARAMS
    assert not model.HasField("lora")
    run = loaded.train(texts, TrainingConfig(max_steps=3, warmup_steps=0, learning_rate=1e-3))
    assert run.losses[-1] < run.losses[0]
    assert (run.output_dir / "final" / "model.safetensors").is_file()
    reloaded = load(run.output_dir / "final")
    assert reloaded.model.total_params == TINY_PARAMS
    with pytest.raises(InvalidFieldsError):
        loaded.prepare(LoraConfig(r=8))


# ── the saved adapter ──


def logits_of(loaded: Loaded) -> list[float]:
    import torch

    model = loaded.torch_model.eval()
    with torch.no_grad():
        return model(**loaded.tokenizer(PROMPT, return_tensors="pt")).logits[0, -1].tolist()


@pytest.fixture
def trained(prepared: Loaded, texts: list[Row]) -> tuple[Loaded, Path]:
    run = prepared.train(texts, TrainingConfig(max_steps=3, warmup_steps=0, learning_rate=1e-2))
    return prepared, run.output_dir / "final"


def test_the_saved_adapter_gives_the_same_logits_in_plain_transformers_and_peft(
    in_plain_transformers: Reader, trained: tuple[Loaded, Path], tiny: Path
) -> None:
    loaded, final = trained
    assert in_plain_transformers(final, tiny).logits == pytest.approx(logits_of(loaded), abs=1e-5)
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)


def test_a_saved_adapter_loads_keeps_its_weights_and_trains_on(
    trained: tuple[Loaded, Path], load: LoadTiny, texts: list[Row]
) -> None:
    before, final = trained
    again = load(final)
    assert (again.model.total_params, again.model.trainable_params) == (TINY_PARAMS, 0)
    assert not again.model.HasField("lora")
    model = again.prepare(LoraConfig(r=16))
    assert model.lora == before.prepare().lora
    assert model.trainable_params == 32_768
    assert logits_of(again) == pytest.approx(logits_of(before), abs=1e-6)
    run = again.train(texts, TrainingConfig(max_steps=2, warmup_steps=0, learning_rate=1e-3), name="more")
    assert run.losses[-1] < run.losses[0] < 6


def test_a_saved_adapter_is_not_replaced_by_another(trained: tuple[Loaded, Path], load: LoadTiny) -> None:
    again = load(trained[1])
    with pytest.raises(PreconditionError) as raised:
        again.prepare(LoraConfig(r=4))
    assert raised.value.reason_name == "ALREADY_PREPARED"


def test_an_adapter_whose_base_is_gone_says_so(trained: tuple[Loaded, Path], load: LoadTiny, tmp_path: Path) -> None:
    config = trained[1] / "adapter_config.json"
    content = json.loads(config.read_text())
    content["base_model_name_or_path"] = str(tmp_path / "gone")
    config.write_text(json.dumps(content))
    error = refused(load, trained[1])
    assert error.reason_name == "MODEL_SOURCE_NOT_FOUND"
    assert str(tmp_path / "gone") in error.message
