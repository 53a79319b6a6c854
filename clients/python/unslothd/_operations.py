"""What a flow (`_flows.py`) asks for, one operation at a time; `_drive.py` carries it out."""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from google.protobuf.message import Message

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Unary:
    """Make a unary call within `timeout` seconds; its response is sent back."""

    method: str
    request: Message
    timeout: float | None


@dataclass(frozen=True)
class SendStream:
    """Make a call whose requests are a stream; its one response is sent back."""

    method: str
    requests: Iterable[Message]


@dataclass(frozen=True)
class OpenStream:
    """Start a streaming call, in place of the one that is open; nothing is sent back."""

    method: str
    request: Message


@dataclass(frozen=True)
class Next:
    """Wait for the next message of the open stream; it is sent back, or None at the end of the stream."""


@dataclass(frozen=True)
class CloseStream:
    """End the open stream; nothing is sent back."""


@dataclass(frozen=True)
class Sleep:
    """Wait; nothing is sent back."""

    seconds: float


@dataclass(frozen=True)
class Blocking:
    """Call this, which may wait for a disk; what it returns is sent back."""

    call: Callable[[], Any]


@dataclass(frozen=True)
class Emit(Generic[ItemT]):
    """Hand this to the user; nothing is sent back."""

    item: ItemT


Operation: TypeAlias = Unary | SendStream | OpenStream | Next | CloseStream | Sleep | Blocking
# What is sent back differs from operation to operation; each flow knows what it asked for.
Flow: TypeAlias = Generator[Operation | Emit[ItemT], Any, ResultT]
