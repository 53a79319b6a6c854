"""One row made into token ids and the mask of the tokens that carry loss. The trainer is left nothing to guess."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unslothd.v1.dataset_pb2 import RowFormat
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_pb2 import RenderedRow
from unslothd_server.engine import chat
from unslothd_server.engine.chat import Span
from unslothd_server.engine.rows import Row, row_error
from unslothd_server.errors import DatasetError

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


@dataclass(frozen=True)
class TokenRow:
    """A row as the model sees it.

    Args:
        input_ids: Token ids, at most max_seq_length.
        carries_loss: For each token whether it is learnt. The first is never: nothing comes before it.
        truncated: True when tokens were cut off.
    """

    input_ids: list[int]
    carries_loss: list[bool]
    truncated: bool

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(self.carries_loss)


@dataclass(frozen=True)
class _Text:
    """Finished text, the ranges that carry loss, and whether the end-of-sequence token is still to be added."""

    text: str
    spans: list[Span]
    special_tokens: bool
    assistant_mask: list[bool] | None = None
    input_ids: list[int] | None = None


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
        self._tokenizer = tokenizer
        self._format = row_format
        self._max_seq_length = max_seq_length
        self._special_ids = set(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        layout = row_format.WhichOneof("layout")
        self._to_text: Callable[[Row], _Text] = getattr(self, f"_{layout}")
        if layout == "chat":
            self._require_chat_template()

    def render(self, row: Row, number: int) -> TokenRow:
        """Renders a row.

        Args:
            row: Columns by name.
            number: Its place in the data, counted from 1, for errors.

        Raises:
            DatasetError: DATASET_ROW: a column is missing, None or of the wrong type, or the template refuses it.
        """
        try:
            text = self._to_text(row)
        except (chat.BadTurnsError, _BadValueError) as error:
            raise row_error(number, str(error)) from error
        ids, mask = self._tokenize(text)
        cut = self._max_seq_length
        truncated = len(ids) > cut
        ids, mask = ids[:cut], mask[:cut]
        if mask:
            mask[0] = False
        return TokenRow(ids, mask, truncated)

    def preview(self, row: TokenRow) -> RenderedRow:
        """The row as text with the character ranges that carry loss."""
        text = self._decode(row.input_ids)
        edges = [edge for run in _runs(row.carries_loss) for edge in run]
        spans = [len(self._decode(row.input_ids[:edge])) for edge in edges]
        return RenderedRow(text=text, num_tokens=len(row.input_ids), loss_spans=spans, truncated=row.truncated)

    # One method a layout, found by the layout's name in the contract.

    def _text(self, row: Row) -> _Text:
        text = _string(row, self._format.text.column)
        return _Text(text, [(0, len(text))], special_tokens=True)

    def _template(self, row: Row) -> _Text:
        values = _Values(row)
        text = self._format.template.template.format_map(values)
        return _Text(text, [(0, len(text))], special_tokens=True)

    def _alpaca(self, row: Row) -> _Text:
        instruction, output = _string(row, "instruction"), _string(row, "output")
        context = _string(row, "input") if row.get("input") is not None else ""
        prompt = ALPACA_WITH_INPUT if context.strip() else ALPACA
        return self._answer(prompt.format(instruction=instruction, input=context), output)

    def _prompt_completion(self, row: Row) -> _Text:
        columns = self._format.prompt_completion
        prompt, completion = row.get(columns.prompt_column), row.get(columns.completion_column)
        if isinstance(prompt, list) and isinstance(completion, list):
            self._require_chat_template()
            turns = chat.plain_turns(prompt, columns.prompt_column)
            return self._conversation(
                [*turns, *chat.plain_turns(completion, columns.completion_column)], first=len(turns)
            )
        if isinstance(prompt, list) or isinstance(completion, list):
            raise _BadValueError("prompt and completion must both be text or both be lists of turns")
        return self._answer(_string(row, columns.prompt_column), _string(row, columns.completion_column))

    def _chat(self, row: Row) -> _Text:
        column = self._format.chat.column
        return self._conversation(chat.plain_turns(row.get(column), column), first=0)

    def _answer(self, prompt: str, answer: str) -> _Text:
        start = len(prompt) if self._format.completion_only_loss else 0
        text = prompt + answer
        return _Text(text, [(start, len(text))], special_tokens=True)

    def _conversation(self, turns: list[chat.Turn], *, first: int) -> _Text:
        learn = [index for index, turn in enumerate(turns) if index >= first and turn["role"] == "assistant"]
        if not self._format.completion_only_loss:
            rendered = chat.render_chat(self._render_template, turns, [])
            return _Text(rendered.text, [(0, len(rendered.text))], special_tokens=False)
        if first == 0 and _marks_answers(self._tokenizer.chat_template):
            return self._marked_conversation(turns)
        rendered = chat.render_chat(self._render_template, turns, learn)
        return _Text(rendered.text, rendered.answers, special_tokens=False)

    def _marked_conversation(self, turns: list[chat.Turn]) -> _Text:
        """For templates that say themselves which tokens an assistant wrote ({% generation %})."""
        try:
            encoded = self._tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:
            raise chat.BadTurnsError(f"the chat template refuses it ({error})") from error
        mask = [bool(flag) for flag in encoded["assistant_masks"]]
        return _Text("", [], special_tokens=False, assistant_mask=mask, input_ids=list(encoded["input_ids"]))

    def _render_template(self, turns: Sequence[chat.Turn], *, add_generation_prompt: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _tokenize(self, text: _Text) -> tuple[list[int], list[bool]]:
        if text.input_ids is not None and text.assistant_mask is not None:
            return text.input_ids, text.assistant_mask
        ids, mask = self._encode(text)
        if text.special_tokens:
            return self._with_end_token(ids, mask)
        return ids, self._end_answers_at_their_end(ids, mask) if self._format.completion_only_loss else mask

    def _encode(self, text: _Text) -> tuple[list[int], list[bool]]:
        tokenizer = self._tokenizer
        bos = tokenizer.bos_token
        add_special = text.special_tokens and not (bos and text.text.startswith(bos))
        if tokenizer.is_fast:
            encoded = tokenizer(text.text, add_special_tokens=add_special, return_offsets_mapping=True)
            return list(encoded["input_ids"]), [_overlaps(span, text.spans) for span in encoded["offset_mapping"]]
        ids: list[int] = []
        mask: list[bool] = []
        # A slow tokenizer does not say where its tokens are: encode the pieces one by one.
        for piece, learnt in _pieces(text):
            new = tokenizer(piece, add_special_tokens=add_special and not ids)["input_ids"]
            ids += new
            mask += [learnt] * len(new)
        return ids, mask

    def _with_end_token(self, ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
        """Text that is over ends with the end-of-sequence token, learnt like the text, or the model never stops."""
        end = self._tokenizer.eos_token_id
        if end is None:
            return ids, mask
        if not ids or ids[-1] != end:
            return [*ids, end], [*mask, True]
        return ids, [*mask[:-1], True]

    def _end_answers_at_their_end(self, ids: list[int], mask: list[bool]) -> list[bool]:
        """Makes each answer end with its end-of-turn token.

        White space that a template puts after that token is not learnt, because generation has ended there; and where
        only the content of a turn could be placed, the token that follows it is learnt with it.
        """
        for start, end in _runs(mask):
            special = [index for index in range(start, end) if ids[index] in self._special_ids]
            if special:
                tail = range(special[-1] + 1, end)
                if not self._decode([ids[index] for index in tail]).strip():
                    mask[tail.start : tail.stop] = [False] * len(tail)
            elif end < len(ids) and ids[end] in self._special_ids:
                mask[end] = True
        return mask

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _require_chat_template(self) -> None:
        if not self._tokenizer.chat_template:
            raise DatasetError(
                ErrorReason.ERROR_REASON_DATASET_COLUMNS,
                "The rows are conversations, but this model's tokenizer has no chat template. Load the instruct "
                "version of the model, or give the rows as prompt and completion, or as text.",
            )


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


def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if isinstance(value, str):
        return value
    if column not in row:
        raise _BadValueError(f'it has no column "{column}"')
    kind = "empty (null)" if value is None else f"a {type(value).__name__}"
    raise _BadValueError(f'"{column}" is {kind}, but must be text')


def _marks_answers(template: str | dict[str, str] | None) -> bool:
    return isinstance(template, str) and "generation %}" in template.replace("-%}", "%}").replace("endgeneration", "")


def _overlaps(token: Span, spans: Sequence[Span]) -> bool:
    start, end = token
    return start < end and any(start < span_end and end > span_start for span_start, span_end in spans)


def _pieces(text: _Text) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    position = 0
    for start, end in text.spans:
        pieces += [(text.text[position:start], False), (text.text[start:end], True)]
        position = end
    pieces.append((text.text[position:], False))
    return [(piece, learnt) for piece, learnt in pieces if piece]


def _runs(mask: Sequence[bool]) -> list[Span]:
    """Ranges of consecutive true flags."""
    edges = [index for index in range(len(mask) + 1) if _at(mask, index) != _at(mask, index - 1)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _at(flags: Sequence[bool], index: int) -> bool:
    return 0 <= index < len(flags) and flags[index]
