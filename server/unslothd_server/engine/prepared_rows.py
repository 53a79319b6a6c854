"""The rows of a request, read and rendered, with the warnings that they deserve: what a plan and a training share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unslothd.v1.dataset_pb2 import RowFormat
from unslothd.v1.training_event_pb2 import TrainingWarning
from unslothd.worker.v1.worker_service_pb2 import StartTrainingRequest
from unslothd_server.engine.tokens import PREVIEW_ROWS, TokenisedDataset, dropped_causes, tokenise
from unslothd_server.errors import DatasetError


@dataclass(frozen=True)
class PreparedRows:
    """Every row that a training uses.

    Args:
        train: Rows to train on.
        evaluation: Rows to evaluate on; None = none.
        warnings: Of rows that were cut or left out, and of tools that are not seen.
    """

    train: TokenisedDataset
    evaluation: TokenisedDataset | None
    warnings: list[TrainingWarning]


def prepare_rows(
    request: StartTrainingRequest,
    tokenizer: Any,
    max_seq_length: int,
    *,
    check: Callable[[], None],
    preview_rows: int = PREVIEW_ROWS,
    for_training: bool = True,
) -> PreparedRows:
    """Reads and renders the rows to train and to evaluate on.

    Args:
        request: Names the datasets.
        tokenizer: A Transformers tokenizer.
        max_seq_length: Tokens; longer rows are cut.
        check: Called for every row; raises to stop.
        preview_rows: Rows that are kept as text.
        for_training: Refuses layouts that no method trains on.

    Raises:
        UnslothdError: As `tokens.tokenise` says; a DatasetError says in `metadata` which dataset it is about.
    """

    def rows_of(field: str, like: RowFormat | None = None) -> TokenisedDataset:
        try:
            return tokenise(
                getattr(request, field),
                tokenizer,
                max_seq_length,
                field=field,
                check=check,
                preview_rows=preview_rows,
                like=like,
                for_training=for_training,
            )
        except DatasetError as error:
            raise DatasetError(
                error.reason, f"{field}: {error.message}", metadata={**error.metadata, "dataset": field}
            ) from error

    train = rows_of("train_dataset")
    # Without a layout of its own, an eval set is read as the rows are that are trained on.
    evaluation = rows_of("eval_dataset", like=train.row_format) if request.HasField("eval_dataset") else None
    warnings = row_warnings(train, "train_dataset", max_seq_length)
    if evaluation is not None:
        warnings += row_warnings(evaluation, "eval_dataset", max_seq_length)
    return PreparedRows(train, evaluation, warnings)


def row_warnings(rows: TokenisedDataset, field: str, max_seq_length: int) -> list[TrainingWarning]:
    """A warning each for rows that were cut, rows that were left out, and tools that the model does not see.

    Args:
        rows: Rendered.
        field: Path of the dataset in the request.
        max_seq_length: Tokens at which they were cut.
    """
    warnings: list[TrainingWarning] = []
    if rows.truncated_rows:
        text = (
            f"{rows.truncated_rows} of {rows.num_rows} rows of {field} are longer than max_seq_length and were cut "
            f"at {max_seq_length} tokens. Load the model with a larger max_seq_length to train on all of them."
        )
        warnings.append(TrainingWarning(reason="ROWS_TRUNCATED", message=text))
    if rows.dropped_rows:
        causes = dropped_causes(rows.rows_without_answer, rows.dropped_rows - rows.rows_without_answer, max_seq_length)
        text = (
            f"{rows.dropped_rows} of {rows.num_rows + rows.dropped_rows} rows of {field} were left out because none of "
            f"their tokens carries loss: {causes}."
        )
        warnings.append(TrainingWarning(reason="ROWS_DROPPED", message=text))
    if rows.rows_with_ignored_tools:
        text = (
            f"{rows.rows_with_ignored_tools} rows of {field} have tools, but the chat template of this model does not "
            "show tools, so the model does not see them. Load a model whose template does, or put the tools into a "
            "system turn."
        )
        warnings.append(TrainingWarning(reason="TOOLS_IGNORED", message=text))
    return warnings
