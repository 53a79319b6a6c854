"""Which layout rows have: a given RowFormat completed and checked, or one detected from the column names."""

from collections.abc import Collection, Sequence
from string import Formatter

from unslothd.v1.dataset_pb2 import RowFormat
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import DatasetError, FieldViolation, InvalidFieldsError

CHAT_COLUMNS = ("messages", "conversations")
DETECTABLE = (
    "messages or conversations (chat), prompt and completion, instruction and output (Alpaca), text, "
    "or chosen and rejected; other columns need row_format, e.g. a template"
)
NO_PREFERENCE_METHOD = (
    "They can be stored and planned, but no method of this version trains on them; keep them for preference methods, "
    'or train on the chosen answers as prompt_completion with completion_column "chosen".'
)
# Layouts that have an answer part, so that loss can be on the answers only.
ANSWER_LAYOUTS = ("chat", "prompt_completion", "alpaca", "preference")


def resolve_layout(
    given: RowFormat | None, columns: Sequence[str], *, field: str, like: RowFormat | None = None
) -> RowFormat:
    """Returns the layout with every field set.

    Args:
        given: As in the request; None or without a layout = as `like`, or else detected.
        columns: Column names of the rows.
        field: Path of the dataset in the request, e.g. "train_dataset", for errors.
        like: Resolved layout of the rows that are trained on; None when these are those.

    Raises:
        DatasetError: DATASET_COLUMNS: columns are missing, or no layout fits.
        InvalidFieldsError: completion_only_loss for a layout without answers, or a bad template.
    """
    own = given is not None and given.WhichOneof("layout") is not None
    follows = like is not None and not own
    resolved = RowFormat()
    if like is not None and follows:
        resolved.CopyFrom(like)
    if given is not None:
        resolved.MergeFrom(given)
    if resolved.WhichOneof("layout") is None:
        _detect(resolved, columns)
    layout = str(resolved.WhichOneof("layout"))
    _complete_columns(resolved, layout, columns)
    _complete_loss(resolved, layout, field)
    whose = " of train_dataset, which rows without a layout of their own follow," if follows else ""
    require_columns(needed_columns(resolved, field), columns, f"The {layout} layout{whose}")
    return resolved


def require_trainable(row_format: RowFormat) -> None:
    """Raises DATASET_COLUMNS for rows that can be planned but that no method of this version trains on."""
    if row_format.WhichOneof("layout") == "preference":
        raise DatasetError(
            ErrorReason.ERROR_REASON_DATASET_COLUMNS,
            f"These are preference rows. {NO_PREFERENCE_METHOD}",
        )


def needed_columns(row_format: RowFormat, field: str) -> list[str]:
    """Columns that a resolved layout reads from every row.

    Alpaca's optional "input", and the prompt of preference pairs that may be whole conversations, are not among them.
    """
    needed: list[str] = []
    match row_format.WhichOneof("layout"):
        case "text":
            needed = [row_format.text.column]
        case "chat":
            needed = [row_format.chat.column]
        case "prompt_completion":
            needed = [row_format.prompt_completion.prompt_column, row_format.prompt_completion.completion_column]
        case "alpaca":
            needed = ["instruction", "output"]
        case "template":
            needed = template_columns(row_format.template.template, field)
        case "preference":
            needed = [row_format.preference.chosen_column, row_format.preference.rejected_column]
        case _:
            pass
    return needed


def template_columns(template: str, field: str) -> list[str]:
    """Names of the {column} places of a template, each once.

    Raises:
        InvalidFieldsError: It cannot be parsed, has no place, or a place is more than a plain name.
    """
    try:
        places = [place for place in Formatter().parse(template) if place[1] is not None]
    except ValueError as error:
        raise _template_error(field, f"cannot be parsed ({error}); write {{{{ and }}}} for braces") from None
    names: list[str] = []
    for _, field_name, spec, conversion in places:
        name = str(field_name)
        if not name or spec or conversion or any(character in name for character in ".[]"):
            raise _template_error(field, f"has the place {{{name}}}; only plain {{column}} places are legal")
        names.append(name)
    if not names:
        raise _template_error(field, "has no {column} place, so every row would be the same text")
    return list(dict.fromkeys(names))


def require_columns(needed: Collection[str], columns: Sequence[str], who: str) -> None:
    """Raises DATASET_COLUMNS with what was found and what was needed when a column is missing."""
    missing = [name for name in needed if name not in columns]
    if missing:
        raise DatasetError(
            ErrorReason.ERROR_REASON_DATASET_COLUMNS,
            f"{who} needs the column{_s(needed)} {_list(needed)}, but the rows have {_list(columns)}. "
            "Name the right columns in row_format, or rename them in the rows.",
        )


def _detect(resolved: RowFormat, columns: Sequence[str]) -> None:
    chat_column = next((name for name in CHAT_COLUMNS if name in columns), None)
    if chat_column is not None:
        resolved.chat.column = chat_column
    elif {"prompt", "completion"} <= set(columns):
        resolved.prompt_completion.SetInParent()
    elif {"instruction", "output"} <= set(columns):
        resolved.alpaca.SetInParent()
    elif "text" in columns:
        resolved.text.SetInParent()
    elif {"chosen", "rejected"} <= set(columns):
        resolved.preference.SetInParent()
    else:
        raise DatasetError(
            ErrorReason.ERROR_REASON_DATASET_COLUMNS,
            f"No layout fits the columns {_list(columns)}. Recognised are {DETECTABLE}.",
        )


def _complete_columns(resolved: RowFormat, layout: str, columns: Sequence[str]) -> None:
    if layout == "text":
        resolved.text.column = resolved.text.column or "text"
    elif layout == "chat":
        found = next((name for name in CHAT_COLUMNS if name in columns), "messages")
        resolved.chat.column = resolved.chat.column or found
    elif layout == "prompt_completion":
        chosen = resolved.prompt_completion
        chosen.prompt_column = chosen.prompt_column or "prompt"
        chosen.completion_column = chosen.completion_column or "completion"
    elif layout == "preference":
        pair = resolved.preference
        pair.prompt_column = pair.prompt_column or "prompt"
        pair.chosen_column = pair.chosen_column or "chosen"
        pair.rejected_column = pair.rejected_column or "rejected"


def _complete_loss(resolved: RowFormat, layout: str, field: str) -> None:
    has_answers = layout in ANSWER_LAYOUTS
    if not resolved.HasField("completion_only_loss"):
        resolved.completion_only_loss = has_answers
    elif resolved.completion_only_loss and not has_answers:
        raise InvalidFieldsError(
            [
                FieldViolation(
                    f"{field}.row_format.completion_only_loss",
                    f"the {layout} layout has no answer part; leave it unset, or use chat, prompt_completion or alpaca",
                )
            ]
        )


def _template_error(field: str, description: str) -> InvalidFieldsError:
    return InvalidFieldsError([FieldViolation(f"{field}.row_format.template.template", description)])


def _list(names: Collection[str]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "none"


def _s(names: Collection[str]) -> str:
    return "" if len(names) == 1 else "s"
