"""Attention over rows of one or of few lengths is as long as they are, where Unsloth would make them longer.

cuDNN makes a plan for each new length, which takes 0.17 s on an H100 by Unsloth's word. So Unsloth fills queries, keys
and values up to the next multiple of 128, and one that is a multiple already by 128 more: 2048 tokens to 2176. That is
right for rows of many lengths. For those of one, or padded to a few widths, it is copies in every layer, forward and
backward, and more of attention.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from unslothd_server.engine.prepared_rows import PreparedRows

# An operator's word counts; Unsloth reads it at its import.
SETTING = "UNSLOTH_SDPA_CUDNN_BUCKET"
# Where Unsloth keeps what it read. Should it go away, lengths are filled up as Unsloth likes. On a host without a GPU
# the module is not imported, and no length is filled up.
MODULE, KEPT_AS = "unsloth.utils.attention_dispatch", "_CUDNN_LENGTH_BUCKET"


@contextmanager
def of_one_length_kept(rows: PreparedRows, *, packing: bool) -> Iterator[None]:
    """Inside, attention is as long as the rows where all have one length.

    Args:
        rows: To train and to evaluate on.
        packing: They will be packed, and then hold sequences of many lengths.
    """
    with kept() if not packing and _have_one_length(rows) else nullcontext():
        yield


@contextmanager
def kept() -> Iterator[None]:
    """Inside, attention is as long as the rows; models of this process share that."""
    module = sys.modules.get(MODULE)
    before = getattr(module, KEPT_AS, None)
    if before is None or SETTING in os.environ:
        yield
        return
    setattr(module, KEPT_AS, 0)
    try:
        yield
    finally:
        setattr(module, KEPT_AS, before)


def are_kept() -> bool:
    """True inside, where the rows have one length."""
    return getattr(sys.modules.get(MODULE), KEPT_AS, None) == 0


def _have_one_length(rows: PreparedRows) -> bool:
    each = [dataset for dataset in (rows.train, rows.evaluation) if dataset is not None]
    longest = max(dataset.longest_row_tokens for dataset in each)
    return all(dataset.num_tokens == dataset.num_rows * longest for dataset in each)
