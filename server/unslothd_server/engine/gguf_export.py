"""GGUF files by llama.cpp's own converter and quantizer, where the operator has put them."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from unslothd_server.engine.disk_faults import FULL_TEXTS
from unslothd_server.engine.export_weights import MergedWeights
from unslothd_server.engine.export_writer import write_model
from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.export_formats import DEFAULT_GGUF_QUANTIZATION, check_gguf_quantization, export_unsupported
from unslothd_server.llama_cpp import CONVERTER_TYPES, FOLDER_VARIABLE, find_llama_cpp

Progress = Callable[[str, int, int], None]

_LOOK_S = 0.5  # how soon a cancelled export ends the program that runs
_TAIL_LINES = 5


class Converter:
    """llama.cpp, ready to write one type.

    Args:
        quantization: As in the request, e.g. "q4_k_m"; empty = the default.

    Raises:
        PreconditionError: EXPORT_UNSUPPORTED: llama.cpp, or the part of it that is needed, is not there.
        InvalidFieldsError: There is no such type.
    """

    def __init__(self, quantization: str) -> None:
        found = find_llama_cpp()
        if found is None:
            raise export_unsupported(
                "llama.cpp is not on this server. Ask its operator to put it there and name its folder in "
                f"{FOLDER_VARIABLE}, or export MERGED_16BIT and convert that."
            )
        self._quantization = quantization.lower() or DEFAULT_GGUF_QUANTIZATION
        check_gguf_quantization(self._quantization, found)
        self._llama_cpp = found

    def write(self, loaded: LoadedModel, merged: MergedWeights, folder: Path, progress: Progress) -> None:
        """Writes one .gguf file into a folder.

        Raises:
            ExhaustedError, OSError: The disk is full.
            PreconditionError: EXPORT_UNSUPPORTED: llama.cpp cannot write this architecture or tokenizer.
        """
        plain, log = folder / "plain", folder / "llama.cpp.log"
        write_model(loaded, merged, plain, progress)
        result = folder / f"model-{self._quantization}.gguf"
        if self._quantization in CONVERTER_TYPES:
            self._convert(plain, result, self._quantization, log, progress)
        else:
            whole = folder / "whole.gguf"
            self._convert(plain, whole, "bf16" if "bfloat16" in str(merged.dtype) else "f16", log, progress)
            shutil.rmtree(plain)
            quantizer = str(self._llama_cpp.quantizer)
            command = [quantizer, str(whole), str(result), self._quantization.upper()]
            _run(command, log, lambda: progress("quantizing", 0, 0))
            whole.unlink()
        shutil.rmtree(plain, ignore_errors=True)
        log.unlink()

    def _convert(self, plain: Path, result: Path, kind: str, log: Path, progress: Progress) -> None:
        converter = str(self._llama_cpp.converter)
        command = [sys.executable, converter, str(plain), "--outfile", str(result), "--outtype", kind]
        _run(command, log, lambda: progress("converting", 0, 0))


def _run(command: Sequence[str], log: Path, while_it_runs: Callable[[], None]) -> None:
    """Runs a program to its end; `while_it_runs` may raise to end it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(  # noqa: S603 - the operator's llama.cpp; nothing of it is the request's but a checked type
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        try:
            while process.poll() is None:
                while_it_runs()
                _wait(process)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise _failure(command, process.returncode, log)


def _wait(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(_LOOK_S)
    except subprocess.TimeoutExpired:
        return


def _failure(command: Sequence[str], returncode: int, log: Path) -> Exception:
    text = log.read_text(encoding="utf-8", errors="replace")
    if any(known in text for known in FULL_TEXTS):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    program = Path(command[1] if command[0] == sys.executable else command[0]).name
    tail = "\n".join(text.strip().splitlines()[-_TAIL_LINES:])
    return export_unsupported(
        f"llama.cpp's {program} could not write this model (exit code {returncode}). Export MERGED_16BIT instead, or "
        f"ask the operator for another version of llama.cpp. Its last lines:\n{tail}"
    )
