"""What a DatasetSource means: its path is found and checked here, its rows are read by the worker."""

import string
from collections.abc import Callable
from pathlib import Path

from unslothd.v1.dataset_pb2 import DatasetSource, RowFormat
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.service_pb2 import PlanTrainingRequest, TrainRequest
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.errors import FieldViolation, InvalidFieldsError

# Returns the rows of an uploaded dataset; raises NotFoundError (DATASET_NOT_FOUND).
StoredRows = Callable[[str], Path]

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")


def resolve_datasets(
    request: TrainRequest | PlanTrainingRequest, roots: AllowedRoots, stored_rows: StoredRows
) -> tuple[DatasetSource, DatasetSource | None]:
    """Returns the rows to train on and, if there are any, to evaluate on; wrong fields of both are told at once."""
    found: dict[str, DatasetSource] = {}
    violations: list[FieldViolation] = []
    sources = {"train_dataset": request.train_dataset}
    if request.HasField("eval_dataset"):
        sources["eval_dataset"] = request.eval_dataset
    for field, source in sources.items():
        try:
            found[field] = resolve_dataset(source, field, roots, stored_rows)
        except InvalidFieldsError as error:
            violations.extend(error.violations)
    if violations:
        raise InvalidFieldsError(violations)
    return found["train_dataset"], found.get("eval_dataset")


def resolve_dataset(source: DatasetSource, field: str, roots: AllowedRoots, stored_rows: StoredRows) -> DatasetSource:
    """Returns the source with an absolute, allowed path.

    Args:
        source: As asked.
        field: Name of the request's field, for errors.
        roots: Folders that may be read.
        stored_rows: Finds uploaded datasets.

    Raises:
        UnslothdError: DATASET_NOT_FOUND, PATH_NOT_ALLOWED or INVALID_FIELD.
    """
    _check_row_format(source.row_format, f"{field}.row_format")
    result = DatasetSource()
    result.CopyFrom(source)
    origin = source.WhichOneof("origin")
    if origin == "dataset_id":
        result.path = str(stored_rows(source.dataset_id))
    if origin == "path":
        path = roots.require(source.path, ErrorReason.ERROR_REASON_DATASET_NOT_FOUND, "dataset file or folder")
        if path.is_file() and path.suffix not in FILE_SUFFIXES:
            raise InvalidFieldsError(
                [FieldViolation(f"{field}.path", f"must end in {', '.join(FILE_SUFFIXES)}, or be a folder")]
            )
        if path.is_dir():
            roots.check_inside(path)
        result.path = str(path)
    return result


def _check_row_format(row_format: RowFormat, field: str) -> None:
    layout = row_format.WhichOneof("layout")
    if layout == "template":
        template_columns(row_format.template.template, f"{field}.template.template")
    if layout in {"text", "template"} and row_format.completion_only_loss:
        raise InvalidFieldsError(
            [
                FieldViolation(
                    f"{field}.completion_only_loss", f"must be false or unset: {layout} rows have no answer part"
                )
            ]
        )


def template_columns(template: str, field: str) -> list[str]:
    """Returns the columns that a template names. Raises InvalidFieldsError for anything but plain {column} places."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InvalidFieldsError([FieldViolation(field, f'{error}; write "{{{{" and "}}}}" for braces')]) from None
    columns: list[str] = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if spec or conversion or not name or not name.replace("_", "a").replace(" ", "a").isalnum() or name.isdigit():
            place = f"{{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
            raise InvalidFieldsError(
                [FieldViolation(field, f"{place} is not a plain {{column}} place; attributes and formats are refused")]
            )
        columns.append(name)
    if not columns:
        raise InvalidFieldsError([FieldViolation(field, "names no {column}, so every row would be the same text")])
    return columns
