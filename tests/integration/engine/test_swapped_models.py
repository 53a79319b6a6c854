"""Files of a local model that are swapped while real libraries open them by their names: refused, and run by nobody."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.engine_runs import LoadTiny
from support.tiny_gguf import write_gguf
from support.tiny_model import build_tiny_llama
from unslothd.v1.model_pb2 import LoadProgress
from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap
from unslothd.worker.v1.worker_service_pb2 import LoadModelRequest
from unslothd_server.engine.unsloth_engine import UnslothEngine
from unslothd_server.errors import PermissionDeniedError, PreconditionError, UnslothdError


@pytest.fixture
def model(versions: dict[str, str], tiny: Path, tmp_path: Path) -> Path:
    """A model of this test alone."""
    return Path(shutil.copytree(tiny, tmp_path / "models" / "own"))


def refusal(
    source: Path, folder: Path, swap: Callable[[], object], *, roots: list[Path] | None = None
) -> UnslothdError:
    """What a load ends with whose files are swapped after they were looked at and before they are read."""

    def report(progress: LoadProgress) -> None:
        if progress.phase == LoadProgress.PHASE_LOADING_WEIGHTS:
            swap()

    bootstrap = WorkerBootstrap(device_map="auto", cache_dir=str(folder / "cache"), model_roots=map(str, roots or []))
    request = LoadModelRequest(model_name="own", source=str(source), max_seq_length=128)
    engine = UnslothEngine()
    with pytest.raises(UnslothdError) as raised:
        engine.load(bootstrap, request, report)
    with pytest.raises(PreconditionError, match="No model is loaded"):
        engine._require_loaded()  # pyright: ignore[reportPrivateUsage]
    return raised.value


def test_other_weights_than_those_that_were_looked_at_are_not_used(model: Path, tiny: Path, tmp_path: Path) -> None:
    def swap() -> None:
        (model / "model.safetensors").unlink()
        shutil.copy(tiny / "model.safetensors", model)

    error = refusal(model, tmp_path, swap)
    assert isinstance(error, PermissionDeniedError)
    assert "model.safetensors" in error.message


def test_a_base_that_is_swapped_under_its_adapter_is_not_used(
    load: LoadTiny, model: Path, tmp_path: Path, texts: list[dict[str, Any]]
) -> None:
    loaded = load(model)
    loaded.prepare()
    adapter = loaded.train(texts).output_dir / "final"

    def swap() -> None:
        model.rename(tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", model)

    assert isinstance(refusal(adapter, tmp_path, swap), PermissionDeniedError)


def test_a_gguf_file_that_is_swapped_is_not_kept_as_its_conversion(model: Path, tmp_path: Path) -> None:
    file = write_gguf(model, tmp_path / "models" / "own.gguf")
    other = write_gguf(build_tiny_llama(tmp_path / "other", tie_word_embeddings=True), tmp_path / "other.gguf")
    assert isinstance(refusal(file, tmp_path, lambda: other.replace(file)), PermissionDeniedError)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_pickle_in_the_place_of_safetensors_is_not_even_opened(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    def swap() -> None:
        torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
        (model / "model.safetensors").unlink()

    opened: list[object] = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: opened.append(args))
    refusal(model, tmp_path, swap)
    assert opened == []


def test_a_link_out_of_the_roots_is_refused_by_the_worker_too(model: Path, tiny: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(tiny / "model.safetensors")
    error = refusal(model, tmp_path, lambda: pytest.fail("it was read"), roots=[model.parent])
    assert "leads out of the folders" in error.message


def test_code_that_appears_beside_a_model_is_not_run(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    def swap() -> None:
        config = json.loads((model / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
        (model / "config.json").write_text(json.dumps(config))
        (model / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")

    refusal(model, tmp_path, swap)
    assert not ran.exists()
