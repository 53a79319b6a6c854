"""Exports: what other programs read of them, and that the model they come from stays as it was."""

import errno
import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from support.engine_runs import Loaded, LoadTiny, Row
from support.plain_transformers import PROMPT, Reader
from support.tiny_model import build_tiny_llama
from unslothd.v1.artifact_pb2 import Artifact, ExportFormat, ExportProgress
from unslothd.v1.model_pb2 import LoraConfig
from unslothd.v1.service_pb2 import GenerateRequest
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd.worker.v1.worker_service_pb2 import ExportModelRequest
from unslothd_server.engine import export_weights, export_writer
from unslothd_server.errors import AbortedError, ExhaustedError, InvalidFieldsError, PreconditionError

ADAPTER = ExportFormat.EXPORT_FORMAT_ADAPTER
MERGED = ExportFormat.EXPORT_FORMAT_MERGED_16BIT
MERGED_4BIT = ExportFormat.EXPORT_FORMAT_MERGED_4BIT
GGUF = ExportFormat.EXPORT_FORMAT_GGUF

TRAINING = TrainingConfig(max_steps=4, warmup_steps=0, learning_rate=2e-2)
# bfloat16 keeps 8 bits: of logits near 1 the rounding of some hundred weights leaves about this.
BF16_TOLERANCE = 0.03


def export(
    loaded: Loaded,
    form: "ExportFormat.ValueType",
    *,
    name: str = "export",
    quantization: str = "",
    progress: list[ExportProgress] | None = None,
    cancelled: threading.Event | None = None,
) -> Artifact:
    request = ExportModelRequest(format=form, output_dir=str(loaded.folder / name), gguf_quantization=quantization)
    report = ([] if progress is None else progress).append
    return loaded.engine.export(request, report, cancelled or threading.Event())


def logits_of(loaded: Loaded) -> list[float]:
    import torch

    model = loaded.torch_model.eval()
    with torch.no_grad():
        return model(**loaded.tokenizer(PROMPT, return_tensors="pt")).logits[0, -1].tolist()


def bits_of(loaded: Loaded) -> dict[str, str]:
    """A digest of every weight, the adapter's included."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().float().numpy().tobytes()).hexdigest()
        for name, tensor in loaded.torch_model.named_parameters()
    }


def leftovers(loaded: Loaded) -> list[str]:
    return [path.name for path in loaded.folder.iterdir() if "export" in path.name]


@pytest.fixture
def trained(prepared: Loaded, texts: list[Row]) -> Loaded:
    prepared.train(texts, TRAINING)
    return prepared


# ── merged ──


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(),
        LoraConfig(r=8, lora_alpha=32, use_rslora=True),
        LoraConfig(target_modules=["q_proj", "embed_tokens", "lm_head"]),
        LoraConfig(r=4, target_modules=["v_proj", "down_proj"], layers_to_transform=[1], modules_to_save=["lm_head"]),
    ],
    ids=["plain", "rslora", "embeddings", "one-layer"],
)
def test_a_merged_export_gives_the_logits_of_base_and_adapter_in_plain_transformers(
    in_plain_transformers: Reader, load: LoadTiny, texts: list[Row], lora: LoraConfig
) -> None:
    loaded = load()
    untrained = logits_of(loaded)
    loaded.prepare(lora)
    loaded.train(texts, TRAINING)
    plain = in_plain_transformers(Path(export(loaded, MERGED).path))
    assert plain.dtype == "torch.bfloat16"
    assert plain.problems == ([], [])
    assert plain.logits == pytest.approx(logits_of(loaded), abs=BF16_TOLERANCE)
    assert plain.logits != pytest.approx(untrained, abs=5 * BF16_TOLERANCE)


@pytest.mark.parametrize(("targets", "stays_tied"), [(["q_proj", "v_proj"], True), (["q_proj", "embed_tokens"], False)])
def test_tied_embeddings_stay_tied_unless_training_broke_the_tie(
    in_plain_transformers: Reader,
    load: LoadTiny,
    texts: list[Row],
    tmp_path: Path,
    targets: list[str],
    stays_tied: bool,
) -> None:
    loaded = load(build_tiny_llama(tmp_path / "tied", tie_word_embeddings=True))
    loaded.prepare(LoraConfig(target_modules=targets))
    loaded.train(texts, TRAINING)
    plain = in_plain_transformers(Path(export(loaded, MERGED).path))
    assert plain.tied == stays_tied
    assert plain.problems == ([], [])
    assert plain.logits == pytest.approx(logits_of(loaded), abs=BF16_TOLERANCE)


def test_a_model_quantised_at_its_load_is_merged_with_the_weights_of_its_folder(
    in_plain_transformers: Reader, load: LoadTiny, texts: list[Row], tiny: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = load(load_in_4bit=True)
    loaded.prepare()
    loaded.train(texts, TRAINING)
    merged = in_plain_transformers(Path(export(loaded, MERGED, name="merged").path))
    adapter = export(loaded, ADAPTER, name="adapter").path
    import torch

    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter).eval()
    with torch.no_grad():
        logits = whole(**loaded.tokenizer(PROMPT, return_tensors="pt")).logits[0, -1].tolist()
    assert merged.dtype == "torch.bfloat16"
    assert merged.logits == pytest.approx(logits, abs=BF16_TOLERANCE)


def test_a_base_that_exists_in_4_bits_only_is_dequantised(
    in_plain_transformers: Reader, load: LoadTiny, texts: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_weights, "_base_folder", lambda loaded, base: None)
    loaded = load(load_in_4bit=True)
    loaded.prepare()
    loaded.train(texts, TRAINING)
    plain = in_plain_transformers(Path(export(loaded, MERGED).path))
    assert plain.dtype == "torch.bfloat16"
    assert plain.logits == pytest.approx(logits_of(loaded), abs=BF16_TOLERANCE)


def test_all_trained_weights_are_written_in_16_bits(
    in_plain_transformers: Reader, load: LoadTiny, texts: list[Row]
) -> None:
    loaded = load(full_finetuning=True)
    loaded.prepare()
    loaded.train(texts, TrainingConfig(max_steps=3, warmup_steps=0, learning_rate=1e-3))
    plain = in_plain_transformers(Path(export(loaded, MERGED).path))
    assert plain.dtype == "torch.bfloat16"
    assert plain.logits == pytest.approx(logits_of(loaded), abs=BF16_TOLERANCE)


def test_a_large_model_is_written_in_several_files_that_load_as_one(
    in_plain_transformers: Reader, trained: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_writer, "MAX_SHARD_BYTES", 100_000)
    artifact = export(trained, MERGED)
    names = [file.name for file in artifact.files]
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert "model.safetensors.index.json" in names
    plain = in_plain_transformers(Path(artifact.path))
    assert plain.logits == pytest.approx(logits_of(trained), abs=BF16_TOLERANCE)


def test_an_export_changes_no_bit_of_the_model_which_trains_and_generates_afterwards(
    trained: Loaded, texts: list[Row]
) -> None:
    before = bits_of(trained)
    for form in (ADAPTER, MERGED):
        export(trained, form, name=f"export-{form}")
    assert bits_of(trained) == before
    request = GenerateRequest(prompt=PROMPT, max_new_tokens=4)
    assert len(list(trained.engine.generate(request, threading.Event()))) > 0
    assert trained.train(texts, TRAINING, name="more").losses[-1] < 6


# ── the adapter ──


def test_an_adapter_export_is_the_adapter_and_its_tokenizer(trained: Loaded) -> None:
    artifact = export(trained, ADAPTER)
    names = [file.name for file in artifact.files]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(names)
    assert not [name for name in names if name.startswith(("model", "README", "optimizer"))]


def test_an_exported_adapter_loads_again(trained: Loaded, in_plain_transformers: Reader, load: LoadTiny) -> None:
    again = load(export(trained, ADAPTER).path)
    assert logits_of(again) == pytest.approx(logits_of(trained), abs=1e-6)
    merged = export(again, MERGED, name="merged")
    assert in_plain_transformers(Path(merged.path)).logits == pytest.approx(logits_of(again), abs=BF16_TOLERANCE)


@pytest.mark.parametrize("full_finetuning", [False, True])
def test_a_model_without_an_adapter_has_none_to_export(load: LoadTiny, full_finetuning: bool) -> None:
    loaded = load(full_finetuning=full_finetuning)
    with pytest.raises(PreconditionError) as raised:
        export(loaded, ADAPTER)
    assert raised.value.reason_name == "EXPORT_UNSUPPORTED"
    assert "MERGED_16BIT" in raised.value.message
    assert leftovers(loaded) == []


# ── what is told ──


def test_every_file_is_told_with_its_size_and_sum(trained: Loaded) -> None:
    artifact = export(trained, MERGED)
    assert artifact.format == MERGED
    assert [file.name for file in artifact.files] == sorted(path.name for path in Path(artifact.path).iterdir())
    for file in artifact.files:
        content = (Path(artifact.path) / file.name).read_bytes()
        assert (file.num_bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_progress_goes_through_its_phases_to_their_ends(trained: Loaded) -> None:
    progress: list[ExportProgress] = []
    export(trained, MERGED, progress=progress)
    assert list(dict.fromkeys(each.phase for each in progress)) == ["merging", "hashing"]
    for phase in ("merging", "hashing"):
        steps = [each for each in progress if each.phase == phase]
        assert steps[-1].done == steps[-1].total > 0
        assert [each.done for each in steps] == sorted(each.done for each in steps)


# ── what goes wrong ──


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    trained: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_writer.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ExhaustedError) as raised:
        export(trained, MERGED)
    assert raised.value.reason_name == "DISK_FULL"
    assert int(raised.value.metadata["needed_bytes"]) > 1000
    assert leftovers(trained) == []


def test_a_disk_that_fills_up_leaves_nothing(trained: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def fails(tensors: Any, file: Path, **options: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(ExhaustedError) as raised:
        export(trained, MERGED)
    assert raised.value.reason_name == "DISK_FULL"
    assert leftovers(trained) == []


def test_a_cancelled_export_leaves_nothing(trained: Loaded) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(AbortedError):
        export(trained, MERGED, cancelled=cancelled)
    assert leftovers(trained) == []


def test_4bit_weights_are_refused_on_a_cpu(trained: Loaded) -> None:
    with pytest.raises(PreconditionError) as raised:
        export(trained, MERGED_4BIT)
    assert raised.value.reason_name == "EXPORT_UNSUPPORTED"
    assert "MERGED_16BIT" in raised.value.message


def test_an_adapter_that_is_more_than_an_added_matrix_is_not_merged(load: LoadTiny, tiny: Path, tmp_path: Path) -> None:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), PeftLoraConfig(target_modules=["q_proj"], use_dora=True)
    )
    model.save_pretrained(tmp_path / "dora")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "dora")
    with pytest.raises(PreconditionError) as raised:
        export(load(tmp_path / "dora"), MERGED)
    assert "q_proj" in raised.value.message


# ── GGUF ──

# Stands for llama.cpp's convert_hf_to_gguf.py: takes its arguments, and says what it was given.
CONVERTER = """
import pathlib, sys
folder, _, outfile, _, outtype = sys.argv[1:]
assert (pathlib.Path(folder) / "config.json").is_file() and (pathlib.Path(folder) / "tokenizer.json").is_file()
if outtype == "f32":
    sys.exit("NotImplementedError: Architecture 'Tiny' not supported!")
pathlib.Path(outfile).write_bytes(b"GGUF" + outtype.encode())
"""
QUANTIZER = '#!/bin/sh\n{ cat "$1"; printf %s "$3"; } > "$2"\n'


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "llama.cpp"
    (folder / "build" / "bin").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    quantizer = folder / "build" / "bin" / "llama-quantize"
    quantizer.write_text(QUANTIZER)
    quantizer.chmod(0o755)
    monkeypatch.setenv("UNSLOTH_LLAMA_CPP_PATH", str(folder))
    return folder


@pytest.mark.parametrize(
    ("asked", "name", "content"),
    [
        ("", "model-q8_0.gguf", b"GGUFq8_0"),
        ("F16", "model-f16.gguf", b"GGUFf16"),
        ("q4_k_m", "model-q4_k_m.gguf", b"GGUFbf16Q4_K_M"),
    ],
)
def test_gguf_is_written_by_llama_cpp(trained: Loaded, llama_cpp: Path, asked: str, name: str, content: bytes) -> None:
    artifact = export(trained, GGUF, quantization=asked)
    assert [file.name for file in artifact.files] == [name]
    assert (Path(artifact.path) / name).read_bytes() == content


def test_what_llama_cpp_cannot_write_is_told_in_its_own_words(trained: Loaded, llama_cpp: Path) -> None:
    with pytest.raises(PreconditionError) as raised:
        export(trained, GGUF, quantization="f32")
    assert raised.value.reason_name == "EXPORT_UNSUPPORTED"
    assert "Architecture 'Tiny' not supported" in raised.value.message
    assert leftovers(trained) == []


def test_an_unknown_gguf_type_is_a_wrong_field(trained: Loaded, llama_cpp: Path) -> None:
    with pytest.raises(InvalidFieldsError) as raised:
        export(trained, GGUF, quantization="q9_z")
    assert raised.value.violations[0].field == "gguf_quantization"


def test_gguf_without_llama_cpp_is_refused(trained: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PreconditionError) as raised:
        export(trained, GGUF)
    assert "UNSLOTH_LLAMA_CPP_PATH" in raised.value.message
