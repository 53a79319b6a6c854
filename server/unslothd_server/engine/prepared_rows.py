"""The rows of a request, read and rendered, with the warnings that they deserve: what a plan and a training share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unslothd.v1.training_event_pb2 import TrainingWarning
from unslothd.worker.v1.worker_service_pb2 import StartTrainingRequest
from unslothd_server.engine.tokens import PREVIEW_ROWS, TokenisedDataset, tokenise


@dataclass(frozen=True)
class PreparedRows:
    """Every row that a training uses.

    Args:
        train: Rows to train on.
        evaluation: Rows to evaluate on; None = none.
        warnings: Of rows that were cut or left out.
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
) -> PreparedRows:
    """Reads and renders the rows to train and to evaluate on.

    Args:
        request: Names the datasets.
        tokenizer: A Transformers tokenizer.
        max_seq_length: Tokens; longer rows are cut.
        check: Called for every row; raises to stop.
        preview_rows: Rows that are kept as text.

    Raises:
        UnslothdError: As `tokens.tokenise` says.
    """

    def rows_of(field: str) -> TokenisedDataset:
        source = getattr(request, field)
        return tokenise(source, tokenizer, max_seq_length, field=field, check=check, preview_rows=preview_rows)

    train = rows_of("train_dataset")
    evaluation = rows_of("eval_dataset") if request.HasField("eval_dataset") else None
    warnings = row_warnings(train, "train_dataset", max_seq_length)
    if evaluation is not None:
        warnings += row_warnings(evaluation, "eval_dataset", max_seq_length)
    return PreparedRows(train, evaluation, warnings)


def row_warnings(rows: TokenisedDataset, field: str, max_seq_length: int) -> list[TrainingWarning]:
    """A warning for rows that were cut, and one for rows that were left out.

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
        text = (
            f"{rows.dropped_rows} of {rows.num_rows + rows.dropped_rows} rows of {field} were left out: none of "
            f"their tokens carries loss within {max_seq_length} tokens. Look for empty answers and for prompts that "
            "fill max_seq_length."
        )
        warnings.append(TrainingWarning(reason="ROWS_DROPPED", message=text))
    return warnings
