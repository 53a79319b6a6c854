"""One call of the fuzzer: made from its number, sent as bytes, and judged by what the contract promises."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from random import Random

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from fuzz.documented import codes_of_reasons, documented_reasons
from fuzz.messages import MessageMaker
from fuzz.wire import mutated, noise
from fuzz.words import Known, Words
from unslothd.v1 import service_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["UnslothService"]
ANSWER_SECONDS = 60.0
# What starts a process or writes files is called less often than what only looks.
_WEIGHTS = {"LoadModel": 4, "UploadDataset": 4, "ExportModel": 4, "Train": 6, "PauseTraining": 4, "ResumeTraining": 4}
_USUAL_WEIGHT = 10
_INTERNALS = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|<class |<[\w.]+ object| at 0x[0-9a-f]{4}|unslothd_server|\bgrpc\.|asyncio"
    r"|\b(?:Value|Key|Type|Attribute|Index|Runtime|OS|IO|Unicode\w*|Decode|Recursion|Assertion|Permission|FileNotFound"
    r"|IsADirectory|NotADirectory|JSONDecode|Memory|Overflow|Zero\w+|Timeout)Error\b"
)
_LOG_TAIL = "Last lines of its log:"
# What grpc.aio itself says when the server has answered before the last message of a stream was written.
_OF_THE_CLIENT = "Internal error from Core"
_HUGE_UNTIL = 2000  # later they would hide in their own waves whether memory grows
_HOSTILE_SIZE = 11 * 1024 * 1024  # beyond the limit that GetServerInfo tells


@dataclass
class Call:
    """A call that is yet to be made.

    Args:
        number: Its number in the run; with the seed it makes the same call again.
        method: The RPC.
        kind: "valid", "broken", "mutated" or "noise".
        payloads: Messages to send; one unless the RPC takes a stream.
        read: Messages to read of a stream before it is dropped; None = to its end.
        seconds: Deadline.
    """

    number: int
    method: MethodDescriptor
    kind: str
    payloads: list[bytes]
    read: int | None = None
    seconds: float = ANSWER_SECONDS


@dataclass
class Outcome:
    """What became of a call.

    Args:
        code: Name of the gRPC code; "dropped" when the fuzzer itself ended it.
        reason: ErrorInfo.reason.
        problems: What is not as promised, a sentence each.
        answer: The last message that came.
    """

    code: str
    reason: str = ""
    problems: list[str] = field(default_factory=list)
    answer: Message | None = None


class CallMaker:
    """Makes calls from their numbers.

    Args:
        seed: Of the run.
        known: What is on the server; the run keeps it up to date.
    """

    def __init__(self, seed: int, known: Known) -> None:
        self._seed = seed
        self._known = known
        self._methods = list(SERVICE.methods)
        self._weights = [_WEIGHTS.get(method.name, _USUAL_WEIGHT) for method in self._methods]

    def make(self, number: int) -> Call:
        """Makes a call; the same one for the same seed, number and knowledge."""
        random = Random(f"{self._seed}/{number}")
        method = random.choices(self._methods, self._weights)[0]
        kind = random.choices(("valid", "broken", "mutated", "noise"), (60, 20, 14, 6))[0]
        words = Words(random, self._known)
        huge = number < _HUGE_UNTIL
        maker = MessageMaker(random, words, huge=huge)
        if method.name == "UploadDataset":
            payloads = _upload(maker, words, random, kind)
        else:
            payloads = [maker.request(method.input_type, broken=kind == "broken").SerializeToString()]
        if kind == "mutated":
            payloads = [mutated(payload, random) for payload in payloads]
        elif kind == "noise":
            beyond = huge and random.random() < 0.1
            payloads = [b"\x0a" + b"\x01" * _HOSTILE_SIZE if beyond else noise(random)]
        call = Call(number, method, kind, payloads)
        if method.server_streaming and random.random() < 0.2:
            call.read = random.randint(0, 3)
        if random.random() < 0.01:
            call.seconds = 0.002
        return call


def _upload(maker: MessageMaker, words: Words, random: Random, kind: str) -> list[bytes]:
    """A header and chunks in the order that is right, or in another."""
    header = pb.UploadDatasetRequest(header=pb.UploadDatasetHeader(name="rows", format=random.choice((1, 1, 1, 4))))
    chunk = pb.UploadDatasetRequest(chunk=words.rows())
    shapes: list[list[Message]] = [[], [chunk], [header, header], [chunk, header], [header, pb.UploadDatasetRequest()]]
    if kind == "valid" and random.random() < 0.15:  # a process reads the rows
        shapes = [[header, chunk], [header, chunk, chunk], [header]]
    elif random.random() < 0.5:
        shapes = [[maker.request(pb.UploadDatasetRequest.DESCRIPTOR, broken=True)]]
    return [message.SerializeToString() for message in random.choice(shapes)]


class Caller:
    """Sends calls over one channel, and judges what comes back.

    Args:
        channel: To the server.
        secrets: Texts that no message may hold, e.g. the folder of the source code.
    """

    def __init__(self, channel: grpc.aio.Channel, secrets: tuple[str, ...]) -> None:
        self._channel = channel
        self._secrets = secrets
        self._documented = documented_reasons()
        self._codes = codes_of_reasons()

    async def make(self, call: Call) -> Outcome:
        """Makes a call and returns what became of it. It never raises for what the server does."""
        outcome = Outcome("OK")
        try:
            last = await self._exchange(call)
        except grpc.aio.AioRpcError as error:
            self._judge_error(call, error, outcome)
            return outcome
        except asyncio.CancelledError:  # how grpc tells CANCELLED, whoever it came from
            outcome.code = "dropped"
            if call.seconds == ANSWER_SECONDS:
                outcome.problems.append("the server cancelled the call")
            return outcome
        if last is None:
            outcome.code = "dropped"
            return outcome
        try:
            outcome.answer = GetMessageClass(call.method.output_type).FromString(last)
        except DecodeError:
            outcome.problems.append("the answer is not a message of the contract")
        return outcome

    async def _exchange(self, call: Call) -> bytes | None:
        """The last message that came; None when the stream was dropped as planned."""
        path = f"/{SERVICE.full_name}/{call.method.name}"
        if call.method.client_streaming:
            return await self._channel.stream_unary(path)(_sent(call.payloads), timeout=call.seconds)
        if not call.method.server_streaming:
            return await self._channel.unary_unary(path)(call.payloads[0], timeout=call.seconds)
        stream = self._channel.unary_stream(path)(call.payloads[0], timeout=call.seconds)
        last, read = b"", 0
        async for message in stream:
            last, read = message, read + 1
            if call.read is not None and read >= call.read:
                stream.cancel()
                return None
        return last

    def _judge_error(self, call: Call, error: grpc.aio.AioRpcError, outcome: Outcome) -> None:
        outcome.code = error.code().name
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
        if details is None:
            late = outcome.code == "DEADLINE_EXCEEDED" and call.seconds < ANSWER_SECONDS
            if late or error.details() == _OF_THE_CLIENT:
                outcome.code = "dropped"
            else:
                outcome.problems.append(f"{outcome.code} without ErrorInfo: {error.details()}")
            return
        assert isinstance(details, bytes)
        outcome.reason = _reason(details)
        documented = self._documented[call.method.name].get(outcome.reason)
        if outcome.code in {"INTERNAL", "UNKNOWN"}:
            outcome.problems.append(f"{outcome.code}: {error.details()}")
        elif documented is None:
            outcome.problems.append(f"reason {outcome.reason!r} ({outcome.code}) is not documented: {error.details()}")
        elif not outcome.code == documented == self._codes.get(outcome.reason):
            outcome.problems.append(f"{outcome.reason} came as {outcome.code}, documented is {documented}")
        # Of a worker that died the contract promises the last lines of its log, which are what they are.
        outcome.problems.extend(self._leaks((error.details() or "").partition(_LOG_TAIL)[0]))

    def _leaks(self, text: str) -> Iterator[str]:
        found = _INTERNALS.search(text)
        if found is not None:
            yield f"the text tells internals ({found.group()!r}): {text}"
        for secret in self._secrets:
            if secret in text:
                yield f"the text tells {secret}: {text}"


async def _sent(payloads: list[bytes]) -> AsyncIterator[bytes]:
    for payload in payloads:
        yield payload


def _reason(details: bytes) -> str:
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(details).details:
        if detail.Unpack(info):
            return info.reason if info.domain == "unslothd" else ""
    return ""


def as_text(call: Call) -> str:
    """The call for people: the RPC, and its messages as Python can send them again."""
    return json.dumps({"rpc": call.method.name, "kind": call.kind, "messages": [repr(p[:2000]) for p in call.payloads]})
