"""Rows of each layout made into token ids and the mask of what is learnt. The trainer is left nothing to guess."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from unslothd.v1.dataset_pb2 import RowFormat
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_pb2 import RenderedRow
from unslothd_server.engine.chat import ChatTemplate
from unslothd_server.engine.encoding import MarkedText, TextEncoder, TokenRow, runs
from unslothd_server.engine.rows import Row, row_error
from unslothd_server.engine.turns import BadTurnsError, Tool, Turn, plain_tools, plain_turns
from unslothd_server.errors import DatasetError

TOOLS_COLUMN = "tools"
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class RowRenderer:
    """Renders rows of one layout with one tokenizer.

    Args:
        tokenizer: A Transformers tokenizer.
        row_format: Resolved: every field set.
        max_seq_length: Tokens; longer rows are cut at the end.

    Raises:
        DatasetError: The layout needs a chat template that the tokenizer does not have.
    """

    def __init__(self, tokenizer: Any, row_format: RowFormat, max_seq_length: int) -> None:
        self._format = row_format
        self._answers_only = row_format.completion_only_loss
        self._encoder = TextEncoder(tokenizer, max_seq_length)
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self._texts: Callable[[Row], list[MarkedText]] = getattr(self, f"_{row_format.WhichOneof('layout')}_layout")
        self.rows_with_ignored_tools = 0
        if row_format.WhichOneof("layout") == "chat":
            self._require_template()

    def render(self, rows: Sequence[tuple[int, Row]]) -> list[list[TokenRow]]:
        """Renders rows.

        Args:
            rows: Each with its place in the data, counted from 1, for errors.

        Returns:
            For each row what the model sees of it: one text, or two for a preference pair, the chosen one first.

        Raises:
            DatasetError: DATASET_ROW: a column is missing, None or of the wrong type, or the template refuses it.
        """
        texts = [self._texts_of(number, row) for number, row in rows]
        encoded = self._encoder.encode([text for group in texts for text in group])
        ends = list(accumulate(len(group) for group in texts))
        return [encoded[end - len(group) : end] for group, end in zip(texts, ends, strict=True)]

    def preview(self, row: TokenRow) -> RenderedRow:
        """The row as text with the character ranges that carry loss."""
        decode = self._encoder.decode
        edges = [edge for run in runs(row.carries_loss) for edge in run]
        return RenderedRow(
            text=decode(row.input_ids),
            num_tokens=len(row.input_ids),
            loss_spans=[len(decode(row.input_ids[:edge])) for edge in edges],
            truncated=row.truncated,
        )

    def _texts_of(self, number: int, row: Row) -> list[MarkedText]:
        try:
            return self._texts(row)
        except (BadTurnsError, _BadValueError) as error:
            raise row_error(number, str(error)) from error

    # One method a layout, found by the layout's name in the contract.

    def _text_layout(self, row: Row) -> list[MarkedText]:
        return [_document(_string(row, self._format.text.column))]

    def _template_layout(self, row: Row) -> list[MarkedText]:
        return [_document(self._format.template.template.format_map(_Values(row)))]

    def _alpaca_layout(self, row: Row) -> list[MarkedText]:
        instruction, output = _string(row, "instruction"), _string(row, "output")
        context = _string(row, "input") if row.get("input") is not None else ""
        prompt = ALPACA_WITH_INPUT if context.strip() else ALPACA
        return [self._completed(prompt.format(instruction=instruction, input=context), output)]

    def _prompt_completion_layout(self, row: Row) -> list[MarkedText]:
        columns = self._format.prompt_completion
        return [self._pair(row, columns.prompt_column, columns.completion_column)]

    def _chat_layout(self, row: Row) -> list[MarkedText]:
        column = self._format.chat.column
        return [self._conversation(plain_turns(row.get(column), column), row, first=0)]

    def _preference_layout(self, row: Row) -> list[MarkedText]:
        columns = self._format.preference
        answers = (columns.chosen_column, columns.rejected_column)
        if row.get(columns.prompt_column) is not None or not all(isinstance(row.get(name), list) for name in answers):
            return [self._pair(row, columns.prompt_column, answer) for answer in answers]
        # Whole conversations: what both begin with is the prompt.
        chosen, rejected = (plain_turns(row[name], name) for name in answers)
        pairs = zip(chosen, rejected, strict=False)
        first = next((place for place, (one, other) in enumerate(pairs) if one != other), 0)
        return [self._conversation(turns, row, first=first) for turns in (chosen, rejected)]

    def _pair(self, row: Row, prompt_column: str, answer_column: str) -> MarkedText:
        prompt, answer = row.get(prompt_column), row.get(answer_column)
        if isinstance(prompt, list) and isinstance(answer, list):
            turns = plain_turns(prompt, prompt_column)
            return self._conversation([*turns, *plain_turns(answer, answer_column)], row, first=len(turns))
        if isinstance(prompt, list) or isinstance(answer, list):
            raise _BadValueError(f"{prompt_column} and {answer_column} must both be text or both be lists of turns")
        return self._completed(_string(row, prompt_column), _string(row, answer_column))

    def _completed(self, prompt: str, answer: str) -> MarkedText:
        text = prompt + answer
        if not self._answers_only:
            return _document(text)
        spans = [(len(prompt), len(text))] if answer.strip() else []
        return MarkedText(text, spans, is_chat=False, has_answers=True)

    def _conversation(self, turns: list[Turn], row: Row, *, first: int) -> MarkedText:
        template, tools = self._require_template(), self._tools(row)
        if not self._answers_only:
            text = template.text(turns, tools)
            return MarkedText(text, [(0, len(text))] if text else [], is_chat=True, has_answers=False)
        learn = [index for index, turn in enumerate(turns) if index >= first and turn["role"] == "assistant"]
        chat = template.answers(turns, learn, tools)
        return MarkedText(chat.text, chat.answers, is_chat=True, has_answers=not chat.marked)

    def _tools(self, row: Row) -> list[Tool] | None:
        tools = plain_tools(row.get(TOOLS_COLUMN), TOOLS_COLUMN)
        if tools is not None and not self._require_template().shows_tools:
            self.rows_with_ignored_tools += 1
        return tools

    def _require_template(self) -> ChatTemplate:
        if self._template is None:
            raise DatasetError(
                ErrorReason.ERROR_REASON_DATASET_COLUMNS,
                "The rows are conversations, but this model's tokenizer has no chat template. Load the instruct "
                "version of the model, or give the rows as prompt and completion, or as text.",
            )
        return self._template


class _BadValueError(ValueError):
    """A value of a row cannot be used; the text says why."""


class _Values(dict[str, str]):
    """Values of a template: text as it is, numbers and truth values as Python writes them."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self._row = row

    def __missing__(self, column: str) -> str:
        value = self._row.get(column)
        return str(value) if isinstance(value, bool | int | float) else _string(self._row, column)


def _document(text: str) -> MarkedText:
    spans = [(0, len(text))] if text.strip() else []
    return MarkedText(text, spans, is_chat=False, has_answers=False)


def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if isinstance(value, str):
        return value
    if column not in row:
        raise _BadValueError(f'it has no column "{column}"')
    kind = "empty (null)" if value is None else f"a {type(value).__name__}"
    raise _BadValueError(f'"{column}" is {kind}, but must be text')
