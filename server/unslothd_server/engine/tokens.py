"""A whole dataset rendered: the tokenised rows that the trainer gets, and the figures of the plan."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from unslothd.v1.dataset_pb2 import DatasetSource, RowFormat
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_pb2 import RenderedRow
from unslothd_server.engine.durable_files import FileSum
from unslothd_server.engine.encoding import TokenRow
from unslothd_server.engine.layouts import require_trainable, resolve_layout
from unslothd_server.engine.rendering import RowRenderer
from unslothd_server.engine.rows import Row, open_rows
from unslothd_server.errors import DatasetError

PREVIEW_ROWS = 3
IGNORED_LABEL = -100
# Rows that are tokenised together: enough to keep every core busy, few enough to stop soon.
BATCH_ROWS = 512


@dataclass(frozen=True)
class TokenisedDataset:
    """Rows ready for the trainer.

    Args:
        rows: A datasets.Dataset with input_ids and labels; of preference pairs both texts, the chosen one first.
        row_format: Every field set.
        num_rows: Rows that are left; a preference pair is one.
        num_tokens: Their tokens.
        loss_tokens: Those that carry loss.
        longest_row_tokens: Tokens of the longest row.
        truncated_rows: Rows that were cut, dropped ones not counted.
        dropped_rows: Rows left out because nothing of them carries loss.
        rows_without_answer: Those of the dropped rows that have nothing to learn at whatever length.
        rows_with_ignored_tools: Rows whose tools the chat template does not show.
        preview: The first rows; of a preference pair both texts.
        file: What their file is known by; None = not a file, a file that changed while it was read, or a plan.
        fingerprint: What `datasets` knows their folder or Hub dataset by; empty for a file.
    """

    rows: Any
    row_format: RowFormat
    num_rows: int
    num_tokens: int
    loss_tokens: int
    longest_row_tokens: int
    truncated_rows: int
    dropped_rows: int
    rows_without_answer: int
    rows_with_ignored_tools: int
    preview: list[RenderedRow]
    file: FileSum | None
    fingerprint: str

    @property
    def mean_row_tokens(self) -> float:
        """Tokens of a row, on average."""
        return self.num_tokens / self.num_rows


def tokenise(
    source: DatasetSource,
    tokenizer: Any,
    max_seq_length: int,
    *,
    field: str,
    check: Callable[[], None],
    preview_rows: int = PREVIEW_ROWS,
    like: RowFormat | None = None,
    for_training: bool = True,
) -> TokenisedDataset:
    """Reads and renders every row.

    Args:
        source: A path or a Hub dataset.
        tokenizer: A Transformers tokenizer.
        max_seq_length: Tokens.
        field: Path of the dataset in the request, for errors.
        check: Called for every row; raises to stop.
        preview_rows: Rows that are kept as text.
        like: Resolved layout of the rows that are trained on; None when these are those.
        for_training: Refuses layouts that no method trains on, and works out the sum of the file.

    Raises:
        DatasetError: DATASET_EMPTY, DATASET_COLUMNS, DATASET_ROW.
        InvalidFieldsError, NotFoundError, PermissionDeniedError, UnavailableError: As the parts say.
    """
    collected = _Collected()
    preview: list[RenderedRow] = []
    with closing(open_rows(source)) as opened:
        given = source.row_format if source.HasField("row_format") else None
        row_format = resolve_layout(given, opened.columns, field=field, like=like)
        if for_training:
            require_trainable(row_format)
        renderer = RowRenderer(tokenizer, row_format, max_seq_length)
        for batch in _batches(opened.rows, check):
            for seen in renderer.render(batch):
                if collected.add(seen) and collected.num_rows <= preview_rows:
                    preview += [renderer.preview(row) for row in seen]
        file = opened.file_sum() if for_training else None
    if not collected.num_rows:
        raise _nothing_left(collected, field, max_seq_length)
    return TokenisedDataset(
        rows=collected.dataset(),
        row_format=row_format,
        num_rows=collected.num_rows,
        num_tokens=sum(collected.lengths),
        loss_tokens=collected.loss_tokens,
        longest_row_tokens=max(collected.lengths),
        truncated_rows=collected.truncated,
        dropped_rows=collected.dropped,
        rows_without_answer=collected.without_answer,
        rows_with_ignored_tools=renderer.rows_with_ignored_tools,
        preview=preview,
        file=file,
        fingerprint=opened.fingerprint,
    )


def _batches(rows: Iterable[Row], check: Callable[[], None]) -> Iterator[list[tuple[int, Row]]]:
    batch: list[tuple[int, Row]] = []
    for numbered in enumerate(rows, start=1):
        check()
        batch.append(numbered)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


class _Collected:
    """Grows row by row, 8 bytes a token: lists of Python integers would take ten times that."""

    def __init__(self) -> None:
        self.input_ids: list[Any] = []
        self.labels: list[Any] = []
        self.lengths: list[int] = []
        self.num_rows = self.loss_tokens = self.truncated = self.dropped = self.without_answer = 0

    def add(self, seen: list[TokenRow]) -> bool:
        """Takes what the model sees of a row. Returns False for a row that is left out."""
        if not all(text.loss_tokens for text in seen):
            self.dropped += 1
            self.without_answer += not all(text.has_answer for text in seen)
            return False
        for text in seen:
            self.input_ids.append(text.input_ids)
            self.labels.append(np.where(text.carries_loss, text.input_ids, np.int32(IGNORED_LABEL)))
            self.lengths.append(len(text.input_ids))
            self.loss_tokens += text.loss_tokens
        self.num_rows += 1
        self.truncated += any(text.truncated for text in seen)
        return True

    def dataset(self) -> Any:
        import datasets
        import pyarrow

        kind = pyarrow.list_(pyarrow.int32())
        table = pyarrow.table(
            {"input_ids": pyarrow.array(self.input_ids, kind), "labels": pyarrow.array(self.labels, kind)}
        )
        return datasets.Dataset(table)


def dropped_causes(without_answer: int, cut_off: int, max_seq_length: int) -> str:
    """Why rows carry no loss, e.g. "2 have no answer (…), 1 has its answer beyond max_seq_length (128 tokens)"."""
    causes: list[str] = []
    if without_answer:
        have = "has" if without_answer == 1 else "have"
        causes.append(f"{without_answer} {have} nothing to learn (an empty answer or text, or no assistant turn)")
    if cut_off:
        have = "has its" if cut_off == 1 else "have their"
        causes.append(f"{cut_off} {have} answer beyond max_seq_length ({max_seq_length} tokens)")
    return " and ".join(causes)


def _nothing_left(collected: _Collected, field: str, max_seq_length: int) -> DatasetError:
    causes = dropped_causes(collected.without_answer, collected.dropped - collected.without_answer, max_seq_length)
    return DatasetError(
        ErrorReason.ERROR_REASON_DATASET_EMPTY,
        f"Nothing in {field} can be learnt: of {collected.dropped} rows {causes}. Give rows with answers, load the "
        "model with a larger max_seq_length, or set completion_only_loss to false.",
    )
