"""Text that is streamed is never taken back."""

from collections.abc import Sequence

from unslothd_server.engine.text_stream import StopTexts, TokenText


class BytesTokenizer:
    """One token a byte, so that a character may take several."""

    def decode(self, ids: Sequence[int], **kwargs: object) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_half_a_character_is_held_back_until_it_is_whole() -> None:
    stream = TokenText(BytesTokenizer())
    assert [stream.add(byte) for byte in "aü東b".encode()] == ["a", "", "ü", "", "", "東", "b"]
    assert stream.rest() == ""


def test_a_character_that_never_became_whole_comes_last() -> None:
    stream = TokenText(BytesTokenizer())
    assert [stream.add(byte) for byte in b"a\xc3"] == ["a", ""]
    assert stream.rest() == "\N{REPLACEMENT CHARACTER}"


def feed(stops: StopTexts, pieces: list[str]) -> list[str]:
    return [stops.pass_on(piece) for piece in pieces]


def test_text_ends_before_the_first_stop_text_wherever_the_pieces_are_cut() -> None:
    stops = StopTexts(["END", "STOP"])
    assert "".join(feed(stops, ["one E", "N", "two ST", "O", "P three END"])) == "one ENtwo "
    assert stops.found
    assert stops.rest() == ""


def test_what_may_become_a_stop_text_is_held_back_and_sent_once_it_cannot() -> None:
    stops = StopTexts(["END"])
    assert feed(stops, ["a E", "N", "X"]) == ["a ", "", "ENX"]
    assert feed(stops, ["EN"]) == [""]
    assert stops.rest() == "EN"
    assert not stops.found


def test_without_stop_texts_everything_passes_at_once() -> None:
    assert feed(StopTexts([]), ["a", "b"]) == ["a", "b"]
