"""Text with the ranges that are learnt, made into token ids and the mask of the tokens that carry loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from unslothd_server.engine.chat import Span

TokenIds = np.ndarray[Any, np.dtype[np.int32]]
LossMask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class MarkedText:
    """Text as the model shall see it.

    Args:
        text: All of it.
        spans: Character ranges that are learnt, in order, none empty.
        is_chat: True when a chat template wrote it, special tokens included; else the tokenizer adds its own, and the
            end-of-sequence token is learnt after text that is learnt to its end.
        has_answers: True when `spans` are answers, each of which ends with the end of its turn.
    """

    text: str
    spans: list[Span]
    is_chat: bool
    has_answers: bool


@dataclass(frozen=True)
class TokenRow:
    """A row as the model sees it.

    Args:
        input_ids: Token ids, int32, at most max_seq_length.
        carries_loss: For each token whether it is learnt. The first is never: nothing comes before it.
        truncated: True when tokens were cut off.
        has_answer: True when a token carried loss before the row was cut.
    """

    input_ids: TokenIds
    carries_loss: LossMask
    truncated: bool
    has_answer: bool

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(self.carries_loss.sum())


class TextEncoder:
    """Encodes texts, many at once: a fast tokenizer uses every core for a batch.

    Args:
        tokenizer: A Transformers tokenizer.
        max_seq_length: Tokens; longer rows are cut at the end.
    """

    def __init__(self, tokenizer: Any, max_seq_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_seq_length = max_seq_length
        self._end_id: int | None = tokenizer.eos_token_id
        self._special_ids = np.array(sorted(_special_ids(tokenizer)), np.int32)

    def encode(self, texts: Sequence[MarkedText]) -> list[TokenRow]:
        """Encodes texts; the rows are in their order."""
        rows: dict[int, TokenRow] = {}
        for add_special in (False, True):
            places = [place for place, text in enumerate(texts) if self._adds_special(text) is add_special]
            chosen = [texts[place] for place in places]
            encoded = self._tokens(chosen, add_special=add_special) if chosen else []
            for place, (ids, mask) in zip(places, encoded, strict=True):
                rows[place] = self._finish(texts[place], ids, mask)
        return [rows[place] for place in range(len(texts))]

    def decode(self, ids: Sequence[int] | TokenIds) -> str:
        """The text of tokens, special ones included."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _adds_special(self, text: MarkedText) -> bool:
        bos = self._tokenizer.bos_token
        return not text.is_chat and not (bos and text.text.startswith(bos))

    def _tokens(self, texts: list[MarkedText], *, add_special: bool) -> list[tuple[TokenIds, LossMask]]:
        if not self._tokenizer.is_fast:
            return [self._tokens_by_piece(text, add_special=add_special) for text in texts]
        encoded = self._tokenizer(
            [text.text for text in texts],
            add_special_tokens=add_special,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        rows = zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [(np.array(ids, np.int32), _overlapping(offsets, text.spans)) for text, ids, offsets in rows]

    def _tokens_by_piece(self, text: MarkedText, *, add_special: bool) -> tuple[TokenIds, LossMask]:
        """A slow tokenizer does not say where its tokens are, so the pieces are encoded one by one."""
        ids: list[int] = []
        mask: list[bool] = []
        for piece, learnt in _pieces(text):
            new = self._tokenizer(piece, add_special_tokens=add_special and not ids)["input_ids"]
            ids += new
            mask += [learnt] * len(new)
        return np.array(ids, np.int32), np.array(mask, np.bool_)

    def _finish(self, text: MarkedText, ids: TokenIds, mask: LossMask) -> TokenRow:
        if text.is_chat:
            if text.has_answers:
                self._end_answers_at_their_end(ids, mask)
        else:
            ids, mask = self._with_end_token(ids, mask, learnt=bool(text.spans))
        cut = self._max_seq_length
        truncated, has_answer = len(ids) > cut, bool(mask[1:].any())
        ids, mask = ids[:cut], mask[:cut]
        mask[:1] = False
        return TokenRow(ids, mask, truncated, has_answer)

    def _with_end_token(self, ids: TokenIds, mask: LossMask, *, learnt: bool) -> tuple[TokenIds, LossMask]:
        """Text that is over ends with the end-of-sequence token, learnt like the text, or the model never stops."""
        if self._end_id is None:
            return ids, mask
        if not len(ids) or ids[-1] != self._end_id:
            return np.append(ids, np.int32(self._end_id)), np.append(mask, learnt)
        mask[-1] = learnt
        return ids, mask

    def _end_answers_at_their_end(self, ids: TokenIds, mask: LossMask) -> None:
        """Makes each answer end with its end-of-turn token.

        White space that a template puts after that token is not learnt, because generation has ended there; and where
        an answer's range ends before that token, it is learnt with it.
        """
        special = np.isin(ids, self._special_ids)
        for start, end in runs(mask):
            places = np.flatnonzero(special[start:end])
            if len(places):
                tail = start + int(places[-1]) + 1
                if tail < end and not self.decode(ids[tail:end]).strip():
                    mask[tail:end] = False
            elif end < len(ids) and special[end] and ids[end] != self._tokenizer.bos_token_id:
                mask[end] = True


def runs(mask: LossMask) -> list[Span]:
    """Ranges of consecutive true flags."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _special_ids(tokenizer: Any) -> set[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return set(tokenizer.all_special_ids) | added


def _overlapping(offsets: list[Span], spans: list[Span]) -> LossMask:
    """For each token whether a character of it lies in one of the spans."""
    flat = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))
    starts, ends = flat[::2], flat[1::2]
    if not spans:
        return np.zeros(len(offsets), np.bool_)
    places = np.array(spans)
    # The first span that ends after the token begins is the only one that the token can reach first.
    first = np.searchsorted(places[:, 1], starts, side="right")
    reached = np.append(places[:, 0], np.iinfo(np.int64).max)[first]
    return (ends > reached) & (ends > starts)


def _pieces(text: MarkedText) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    position = 0
    for start, end in text.spans:
        pieces += [(text.text[position:start], False), (text.text[start:end], True)]
        position = end
    pieces.append((text.text[position:], False))
    return [(piece, learnt) for piece, learnt in pieces if piece]
