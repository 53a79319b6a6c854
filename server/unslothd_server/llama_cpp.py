"""llama.cpp on this host: where its converter and quantizer are, and what they can write. Nothing is ever installed."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# The operator's setting; it is Unsloth's own, so that one llama.cpp serves both.
FOLDER_VARIABLE = "UNSLOTH_LLAMA_CPP_PATH"
_DEFAULT_FOLDER = Path("~/.unsloth/llama.cpp")
_CONVERTERS = ("convert_hf_to_gguf.py", "unsloth_convert_hf_to_gguf.py")
_QUANTIZER = "llama-quantize"

# What the converter writes by itself; all other types need the quantizer.
CONVERTER_TYPES = frozenset({"f32", "f16", "bf16", "q8_0"})
QUANTIZER_TYPES = frozenset(
    {
        *("q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m"),
        *("q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs"),
    }
)


@dataclass(frozen=True)
class LlamaCpp:
    """What was found.

    Args:
        converter: The script convert_hf_to_gguf.py.
        quantizer: The program llama-quantize; None when it is not there.
    """

    converter: Path
    quantizer: Path | None


def find_llama_cpp(environ: Mapping[str, str] | None = None) -> LlamaCpp | None:
    """Returns the llama.cpp of this host, or None: UNSLOTH_LLAMA_CPP_PATH, then PATH, then Unsloth's folder.

    Args:
        environ: Default: this process's environment.
    """
    environ = os.environ if environ is None else environ
    folders = [Path(environ[FOLDER_VARIABLE])] if environ.get(FOLDER_VARIABLE) else []
    folders += [Path(part) for part in environ.get("PATH", "").split(os.pathsep) if part]
    folders.append(_DEFAULT_FOLDER.expanduser())
    converter = next((path for folder in folders for path in _converters(folder) if path.is_file()), None)
    if converter is None:
        return None
    # Of one build where possible: the quantizer beside the converter before any other.
    return LlamaCpp(
        converter, next((path for folder in [converter.parent, *folders] for path in _quantizers(folder)), None)
    )


def _converters(folder: Path) -> list[Path]:
    return [folder / name for name in _CONVERTERS]


def _quantizers(folder: Path) -> list[Path]:
    places = (folder, folder / "build" / "bin")
    return [Path(found) for place in places if (found := shutil.which(_QUANTIZER, path=str(place)))]
