"""Tokens made into text piece by piece, with nothing sent that a later token would change."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TokenText:
    """Decodes a growing list of tokens, holding back what may still change (half a character).

    Args:
        tokenizer: A Transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # tokens before it are settled and give context no more
        self._sent = 0  # tokens whose text was handed out

    def add(self, token: int) -> str:
        """The text that this token settles; may be empty."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(UNFINISHED):
            return ""
        self._context, self._sent = self._sent, len(self._ids)
        return text

    def rest(self) -> str:
        """The text of tokens that never became whole."""
        text = self._new_text()
        self._sent = len(self._ids)
        return text

    def _new_text(self) -> str:
        # Decoded with the tokens before them, because some tokenizers drop a leading space.
        known = self._decode(self._ids[self._context : self._sent])
        return self._decode(self._ids[self._context :])[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopTexts:
    """Passes text on up to the first stop text, holding back what may be the beginning of one.

    Args:
        stops: Texts that end the generation; they are not passed on.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def pass_on(self, text: str) -> str:
        """The part of the text so far that is safe to send."""
        if self.found:
            return ""
        self._held += text
        places = [place for place in map(self._held.find, self._stops) if place >= 0]
        if places:
            self.found = True
            sent, self._held = self._held[: min(places)], ""
            return sent
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        sent, self._held = self._held[:cut], self._held[cut:]
        return sent

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        sent, self._held = ("" if self.found else self._held), ""
        return sent

    def _overlap(self, stop: str) -> int:
        """Longest end of the held text that is a beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
