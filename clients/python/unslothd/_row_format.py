"""Says how one row becomes what the model sees: the RowFormat of a dataset."""

from typing import Any, Literal, TypeAlias

from unslothd import errors
from unslothd.v1 import dataset_pb2

Layout: TypeAlias = Literal["text", "chat", "prompt_completion", "alpaca", "preference"]


def row_format(
    layout: Layout | None = None,
    *,
    template: str = "",
    column: str = "",
    prompt_column: str = "",
    completion_column: str = "",
    chosen_column: str = "",
    rejected_column: str = "",
    completion_only_loss: bool | None = None,
) -> dataset_pb2.RowFormat:
    r"""Says how one row becomes what the model sees.

    Args:
        layout: Kind of row; None = detected by the server from the column names, or the template if there is one.
        template: Text with {column} places, e.g. "### Review: {text}\n### Sentiment: {label}". Not with layout.
        column: Column of "text" (default "text") and "chat" (default "messages").
        prompt_column: Column of "prompt_completion" and "preference"; default "prompt".
        completion_column: Column of "prompt_completion"; default "completion".
        chosen_column: Column of "preference"; default "chosen".
        rejected_column: Column of "preference"; default "rejected".
        completion_only_loss: Loss on the answers only; None = the server's default for the layout.

    Raises:
        InvalidRequest: An unknown layout, a template beside a layout, or a column that the layout does not have.
    """
    columns = {
        "column": column,
        "prompt_column": prompt_column,
        "completion_column": completion_column,
        "chosen_column": chosen_column,
        "rejected_column": rejected_column,
    }
    given = {name: value for name, value in columns.items() if value}
    result = dataset_pb2.RowFormat(completion_only_loss=completion_only_loss)
    if template:
        if layout is not None or given:
            raise errors.InvalidRequest("a template names its columns itself: leave out layout and the column names")
        result.template.template = template
        return result
    if layout is None:
        if given:
            raise errors.InvalidRequest(f"{', '.join(given)} needs a layout, e.g. row_format('text', column='body')")
        return result
    part = _layout_message(result, layout)
    for name, value in given.items():
        if name not in part.DESCRIPTOR.fields_by_name:
            raise errors.InvalidRequest(f"layout {layout!r} has no {name}")
        setattr(part, name, value)
    part.SetInParent()
    return result


def _layout_message(result: dataset_pb2.RowFormat, layout: str) -> Any:
    layouts = [field.name for field in result.DESCRIPTOR.oneofs_by_name["layout"].fields if field.name != "template"]
    if layout not in layouts:
        raise errors.InvalidRequest(f"unknown layout {layout!r}: use one of {', '.join(layouts)}, or template=…")
    return getattr(result, layout)
