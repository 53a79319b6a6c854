"""How much memory weights need, read from the headers of safetensors files without loading any of them."""

import json
import math
import struct
from pathlib import Path
from typing import Any

# 4-bit NF4 weights: half a byte each, plus their scales (double-quantised, 64 weights a block).
_BYTES_PER_4BIT_WEIGHT = 0.5 + 0.016
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What a process needs beside the weights: the device context, kernels, and room to convert a shard.
OVERHEAD_BYTES = 512 * 1024 * 1024
_MOST_HEADER_BYTES = 100 * 1024 * 1024


def load_bytes(folder: Path, *, load_in_4bit: bool, dtype: str) -> int | None:
    """Estimates the device memory that loading a folder takes.

    Args:
        folder: Holds "*.safetensors" files.
        load_in_4bit: Linear weights become 4-bit; embeddings, the head and norms do not.
        dtype: "float32", "bfloat16" or "float16": of the weights that stay.

    Returns:
        Bytes, or None when there is no safetensors file with a readable header.
    """
    shapes = [item for file in sorted(folder.glob("*.safetensors")) for item in _shapes(file)]
    if not shapes:
        return None
    total = 0.0
    for name, shape in shapes:
        quantised = load_in_4bit and len(shape) == 2 and "embed" not in name and "lm_head" not in name  # noqa: PLR2004
        total += math.prod(shape) * (_BYTES_PER_4BIT_WEIGHT if quantised else _BYTES[dtype])
    return int(total) + OVERHEAD_BYTES


def _shapes(file: Path) -> list[tuple[str, list[int]]]:
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:  # noqa: PLR2004 - a safetensors file begins with the length of its header, 8 bytes
            return []
        (length,) = struct.unpack("<Q", prefix)
        if length > _MOST_HEADER_BYTES:
            return []
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError:
            return []
    return [(name, list(entry["shape"])) for name, entry in header.items() if name != "__metadata__"]
