"""GGUF files made into what Unsloth loads: a folder of safetensors, converted once and kept in the cache."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import PreconditionError


def converted_folder(file: Path, cache_dir: Path) -> Path:
    """Returns the folder of safetensors and tokenizer that stands for a .gguf file, converting it if needed.

    Args:
        file: The .gguf file.
        cache_dir: Folder shared by workers; made if needed.

    Raises:
        PreconditionError: UNSAFE_WEIGHTS: the file is damaged, or of an architecture that is not read.
    """
    target = cache_dir / f"gguf-{_key(file)}"
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=cache_dir))
    try:
        _convert(file, work)
        work.chmod(0o755)
        _publish(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _key(file: Path) -> str:
    """Changes whenever the file does; hashing gigabytes at every load would cost more than it saves."""
    stat = file.stat()
    identity = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


def _publish(work: Path, target: Path) -> None:
    try:
        work.rename(target)
    except OSError:
        # Another worker converted the same file meanwhile; its folder is as good.
        if not target.is_dir():
            raise


def _convert(file: Path, work: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(file.parent), file.name
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (ValueError, KeyError, NotImplementedError, IndexError, RuntimeError, OSError) as error:
        raise PreconditionError(
            ErrorReason.ERROR_REASON_UNSAFE_WEIGHTS,
            f"The GGUF file {file} cannot be read: {error}. Check that it is whole and of an architecture that "
            "transformers reads, or give the model as safetensors.",
        ) from error
    # The weights are dequantised now; the leftover config would make every later load look for GGUF again.
    for holder in (model, model.config):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    os.sync()
