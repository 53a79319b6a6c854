"""A whole dataset rendered: the tokenised rows that the trainer gets, and the figures of the plan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unslothd.v1.dataset_pb2 import DatasetSource, RowFormat
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_pb2 import RenderedRow
from unslothd_server.engine.layouts import resolve_layout
from unslothd_server.engine.rendering import RowRenderer
from unslothd_server.engine.rows import open_rows
from unslothd_server.errors import DatasetError

PREVIEW_ROWS = 3
IGNORED_LABEL = -100


@dataclass(frozen=True)
class TokenisedDataset:
    """Rows ready for the trainer.

    Args:
        rows: A datasets.Dataset with input_ids and labels.
        row_format: Every field set.
        num_rows: Rows that are left.
        num_tokens: Their tokens.
        loss_tokens: Those that carry loss.
        longest_row_tokens: Tokens of the longest row.
        truncated_rows: Rows that were cut, dropped ones not counted.
        dropped_rows: Rows left out because nothing of them carries loss.
        preview: The first rows.
    """

    rows: Any
    row_format: RowFormat
    num_rows: int
    num_tokens: int
    loss_tokens: int
    longest_row_tokens: int
    truncated_rows: int
    dropped_rows: int
    preview: list[RenderedRow]


def tokenise(
    source: DatasetSource,
    tokenizer: Any,
    max_seq_length: int,
    *,
    field: str,
    check: Callable[[], None],
    preview_rows: int = PREVIEW_ROWS,
) -> TokenisedDataset:
    """Reads and renders every row.

    Args:
        source: A path or a Hub dataset.
        tokenizer: A Transformers tokenizer.
        max_seq_length: Tokens.
        field: Path of the dataset in the request, for errors.
        check: Called for every row; raises to stop.
        preview_rows: Rows that are kept as text.

    Raises:
        DatasetError: DATASET_EMPTY, DATASET_COLUMNS, DATASET_ROW.
        InvalidFieldsError, NotFoundError, PermissionDeniedError, UnavailableError: As the parts say.
    """
    opened = open_rows(source)
    given = source.row_format if source.HasField("row_format") else None
    row_format = resolve_layout(given, opened.columns, field=field)
    renderer = RowRenderer(tokenizer, row_format, max_seq_length)
    collected = _Collected()
    for number, row in enumerate(opened.rows, start=1):
        check()
        rendered = renderer.render(row, number)
        if not rendered.loss_tokens:
            collected.dropped += 1
            continue
        collected.add(rendered.input_ids, rendered.carries_loss, truncated=rendered.truncated)
        if len(collected.preview) < preview_rows:
            collected.preview.append(renderer.preview(rendered))
    if not collected.lengths:
        raise _nothing_left(collected.dropped, field)
    return TokenisedDataset(
        rows=collected.dataset(),
        row_format=row_format,
        num_rows=len(collected.lengths),
        num_tokens=sum(collected.lengths),
        loss_tokens=collected.loss_tokens,
        longest_row_tokens=max(collected.lengths),
        truncated_rows=collected.truncated,
        dropped_rows=collected.dropped,
        preview=collected.preview,
    )


class _Collected:
    """Grows row by row, 8 bytes a token: lists of Python integers would take ten times that."""

    def __init__(self) -> None:
        self.input_ids: list[Any] = []
        self.labels: list[Any] = []
        self.lengths: list[int] = []
        self.preview: list[RenderedRow] = []
        self.loss_tokens = self.truncated = self.dropped = 0

    def add(self, input_ids: list[int], carries_loss: list[bool], *, truncated: bool) -> None:
        import numpy as np

        ids = np.asarray(input_ids, dtype=np.int32)
        mask = np.asarray(carries_loss, dtype=bool)
        self.input_ids.append(ids)
        self.labels.append(np.where(mask, ids, np.int32(IGNORED_LABEL)))
        self.lengths.append(len(ids))
        self.loss_tokens += int(mask.sum())
        self.truncated += truncated

    def dataset(self) -> Any:
        import datasets
        import pyarrow

        kind = pyarrow.list_(pyarrow.int32())
        table = pyarrow.table(
            {"input_ids": pyarrow.array(self.input_ids, kind), "labels": pyarrow.array(self.labels, kind)}
        )
        return datasets.Dataset(table)


def _nothing_left(dropped: int, field: str) -> DatasetError:
    return DatasetError(
        ErrorReason.ERROR_REASON_DATASET_EMPTY,
        f"Nothing in {field} can be learnt: in all {dropped} rows no token carries loss, because the answers are empty "
        "or lie beyond max_seq_length. Give rows with answers, load the model with a larger max_seq_length, or set "
        "completion_only_loss to false.",
    )
