"""GGUF files made into what Unsloth loads: a folder of safetensors, converted once and kept in the cache."""

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import PreconditionError

# Part of the cache key: raise it when the conversion changes, and old conversions are made again.
CONVERSION_VERSION = 1


def converted_folder(file: Path, cache_dir: Path, check: Callable[[], None] = lambda: None) -> Path:
    """Returns the folder of safetensors and tokenizer that stands for a .gguf file, converting it if needed.

    Args:
        file: The .gguf file.
        cache_dir: Folder shared by workers; made if needed.
        check: Called before the conversion is kept; raises where the file is not what it was.

    Raises:
        PreconditionError: UNSAFE_WEIGHTS: the file is damaged, or of an architecture that is not read.
    """
    target = cache_dir / f"gguf-{_key(file)}"
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=cache_dir))
    try:
        with _parsed_once():
            _convert(file, work)
        check()
        _publish(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _key(file: Path) -> str:
    """Changes whenever the file does; hashing gigabytes at every load would cost more than it saves."""
    stat = file.stat()
    identity = f"{CONVERSION_VERSION}\0{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


def _publish(work: Path, target: Path) -> None:
    try:
        work.rename(target)
    except OSError:
        # Another worker converted the same file meanwhile; its folder is as good.
        if not target.is_dir():
            raise


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Parses a file and builds its name map once inside.

    Transformers parses the file, with its hundred thousand tokens, four times, and builds the same map for every
    module: three quarters of the time of a conversion.
    """
    import gguf

    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (functools.cache(original) for original in originals)  # type: ignore[misc]
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals  # type: ignore[misc]


def _convert(file: Path, work: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(file.parent), file.name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
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
    _restore_special_tokens(file, tokenizer)
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    for path in work.iterdir():
        # On the disk before the folder gets its final name, or a power cut leaves a folder that looks whole.
        with path.open("rb") as written:
            os.fsync(written.fileno())


def _restore_special_tokens(file: Path, tokenizer: Any) -> None:
    """Gives the tokenizer the special tokens that the file names.

    Transformers (5.17, integrations/ggml.py) takes the begin token for the end token of every GPT-2 style tokenizer, so
    texts would end with the token that begins a turn.
    """
    from gguf import GGUFReader

    fields = GGUFReader(str(file)).fields
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    for key, attribute in names.items():
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(field.contents())))
