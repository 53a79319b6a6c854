"""Ctrl-C while the main thread waits for a message: Python may raise KeyboardInterrupt at any place in it."""

import gc
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import grpc
import pytest

import unslothd
from unslothd._stream_reader import StreamReader
from unslothd.v1.service_pb2 import GenerateResponse

SECONDS = 20
# More places than are on the way to a message, fewer than would take minutes.
MOST_PLACES = 5000


class Interrupt:
    """A KeyboardInterrupt at one of the places where calls begin and return: Python looks for signals there."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.struck_at = self.struck_in = ""

    def strikes_in(self, call: Callable[[], object]) -> None:
        """Makes the call, which it ends where it strikes.

        Not in a finalizer, where Python ignores it.
        """
        here = sys._getframe()

        def profile(frame: FrameType, event: str, _argument: object) -> None:
            self.place -= frame is not here
            if self.place == 0:
                sys.setprofile(None)
                self.struck_at = f"{event} in {frame.f_code.co_filename}:{frame.f_lineno}"
                self.struck_in = f"{event} of {frame.f_code.co_name}"
                raise KeyboardInterrupt

        gc.disable()
        sys.setprofile(profile)
        try:
            call()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
            gc.enable()


def hold(server, pieces: list[str], left: threading.Event) -> None:
    """Has the next generation give these pieces, and go on until the client leaves."""

    def serve(_request: object, context: grpc.ServicerContext) -> Iterator[GenerateResponse]:
        context.add_callback(left.set)
        yield from [GenerateResponse(text=piece) for piece in pieces]
        left.wait(SECONDS)

    server.script.on("Generate", serve)


def read_through(client: unslothd.Client, read: list[str]) -> None:
    read += client.generate("m", "And then?")


def test_wherever_it_strikes_the_call_can_be_closed_and_others_be_made(server, say):
    client = unslothd.Client(server.target)  # its end would wait for ever for a channel that hangs
    for place in itertools.count(1):
        left, interrupt, read = threading.Event(), Interrupt(place), list[str]()
        hold(server, ["Once", " upon"], left)
        text = client.generate("m", "Tell me")
        assert next(text) == "Once"
        interrupt.strikes_in(lambda text=text: next(text))
        text.close()
        assert left.wait(SECONDS), f"not closed after {interrupt.struck_at}"
        server.script.on("Generate", say.messages(GenerateResponse(text="The end"), GenerateResponse(summary={})))
        another = threading.Thread(target=read_through, args=[client, read], daemon=True)
        another.start()
        another.join(SECONDS)
        assert read == ["The end"], f"nothing is read after {interrupt.struck_at}"
        if not interrupt.struck_at:
            break
        assert place < MOST_PLACES
    client.close()


def test_wherever_it_strikes_whoever_goes_on_gets_the_same_message():
    for place in itertools.count(1):
        interrupt, reader = Interrupt(place), StreamReader(iter([1, 2, 3]))
        assert reader.next() == 1
        interrupt.strikes_in(reader.next)
        if not interrupt.struck_at:
            break
        given = interrupt.struck_in == "return of next"
        assert list(iter(reader.next, None)) == ([3] if given else [2, 3]), interrupt.struck_at
        assert place < MOST_PLACES


def test_after_a_ctrl_c_in_the_wait_iterating_goes_on_with_the_same_piece(server, say):
    pieces = [GenerateResponse(text="Once"), GenerateResponse(text=" upon"), GenerateResponse(summary={})]
    places_in_the_wait = 0
    with unslothd.Client(server.target) as client:
        for place in itertools.count(1):
            server.script.on("Generate", say.messages(*pieces))
            text, interrupt = client.generate("m", "Tell me"), Interrupt(place)
            assert next(text) == "Once"
            interrupt.strikes_in(lambda text=text: next(text))
            if not interrupt.struck_at:
                break
            if "_stream_reader.py" in interrupt.struck_at and interrupt.struck_in != "return of next":
                assert list(text) == [" upon"]
                places_in_the_wait += 1
            text.close()
            assert place < MOST_PLACES
    assert places_in_the_wait


def test_a_signal_that_does_not_wake_the_wait_is_noticed_all_the_same():
    over = threading.Event()

    class Stream:
        def __next__(self) -> int:
            # Another thread than the one that waits takes the signal, as when it comes just before the wait.
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            over.wait(SECONDS)
            return 1

    reader = StreamReader(Stream())
    with pytest.raises(KeyboardInterrupt):
        reader.next()
    over.set()
    assert reader.next() == 1


def test_an_error_of_the_stream_is_raised_again_and_again():
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    reader = StreamReader(broken())
    assert reader.next() == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            reader.next()


def test_a_reader_that_nobody_has_ends_its_thread():
    dropped = threading.Event()

    class Stream:
        def __next__(self) -> int:
            return 1

        def __del__(self) -> None:
            dropped.set()

    reader = StreamReader(Stream())
    assert reader.next() == 1
    del reader
    assert dropped.wait(SECONDS)
