"""Takes requests in: within their time and size, decoded, by the rules of the contract."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from google.protobuf.message import DecodeError, Message

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.service_pb2 import LoadModelRequest, PlanTrainingRequest, TrainRequest
from unslothd_server.access.limits import CallLimits
from unslothd_server.errors import AbortedError, ExhaustedError, FieldViolation, InvalidFieldsError, PreconditionError
from unslothd_server.rpc.validation import validate

Parse = Callable[[bytes], Message]


class Intake:
    """Reads what a caller sends.

    Args:
        limits: What calls may hold.
        clock: Monotonic seconds.
    """

    def __init__(self, limits: CallLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock

    async def one(self, requests: AsyncIterator[bytes], parse: Parse, *, exposed: bool) -> Message:
        """Returns the request of a call that has one.

        Args:
            requests: Where it comes from.
            parse: Decodes it.
            exposed: Others could read it on its way.

        Raises:
            UnslothdError: INVALID_FIELD, MESSAGE_TOO_LARGE, INLINE_ROWS_TOO_LARGE, UPLOAD_STALLED or
                HUB_TOKEN_IN_PLAIN_TEXT.
        """
        data = await self._next(requests)
        if data is None:
            raise InvalidFieldsError([FieldViolation("request", "is missing: the call ended without it")])
        return self._checked(data, parse, exposed=exposed)

    async def each(self, requests: AsyncIterator[bytes], parse: Parse) -> AsyncIterator[Message]:
        """Yields the requests of a call that streams them; each is checked as it comes: 0.04 ms for a chunk of 1 MiB.

        Raises:
            UnslothdError: As `one`, but for HUB_TOKEN_IN_PLAIN_TEXT: no request that is streamed has a token.
        """
        num_bytes, waited, asked = 0, 0.0, self._clock()
        while (data := await self._next(requests)) is not None:
            # Only the sender's time: what the server does with a request, or a full disk, makes no upload slow.
            waited += self._clock() - asked
            num_bytes += len(data)
            self._check_pace(num_bytes, waited)
            yield self._checked(data, parse, exposed=False)
            asked = self._clock()

    async def _next(self, requests: AsyncIterator[bytes]) -> bytes | None:
        seconds = self._limits.upload_idle_seconds
        try:
            async with asyncio.timeout(seconds):
                return await anext(requests, None)
        except TimeoutError:
            raise AbortedError(
                ErrorReason.ERROR_REASON_UPLOAD_STALLED,
                f"Nothing came for {seconds:g} s, so the call was ended and nothing is kept. Send it again.",
            ) from None

    def _check_pace(self, num_bytes: int, waited: float) -> None:
        least = self._limits.min_upload_bytes_per_second
        if waited > self._limits.upload_idle_seconds and num_bytes < least * waited:
            raise AbortedError(
                ErrorReason.ERROR_REASON_UPLOAD_STALLED,
                f"{num_bytes} bytes came in {waited:.0f} s; the least is {least:g} a second, so the call was ended and "
                "nothing is kept. Make the rows first, as a file, and send it over a faster connection.",
            )

    def _checked(self, data: bytes, parse: Parse, *, exposed: bool) -> Message:
        if len(data) > self._limits.max_message_bytes:
            raise self._too_large(len(data))
        try:
            request = parse(data)
        except DecodeError:
            raise InvalidFieldsError([FieldViolation("request", "is not a message of this contract")]) from None
        if exposed and isinstance(request, LoadModelRequest) and request.token:
            raise _token_in_plain_text()
        validate(request)
        if isinstance(request, TrainRequest | PlanTrainingRequest):
            self._check_inline(request)
        return request

    def _check_inline(self, request: TrainRequest | PlanTrainingRequest) -> None:
        most = self._limits.max_inline_bytes
        for field, source in (("train_dataset", request.train_dataset), ("eval_dataset", request.eval_dataset)):
            if len(source.inline.data) > most:
                raise ExhaustedError(
                    ErrorReason.ERROR_REASON_INLINE_ROWS_TOO_LARGE,
                    f"{field}.inline has {len(source.inline.data)} bytes; the most is {most}. Send the rows with "
                    "UploadDataset and name their dataset_id.",
                    metadata={"inline_bytes": str(len(source.inline.data)), "max_bytes": str(most)},
                )

    def _too_large(self, size: int) -> ExhaustedError:
        most = self._limits.max_message_bytes
        return ExhaustedError(
            ErrorReason.ERROR_REASON_MESSAGE_TOO_LARGE,
            f"The request has {size} bytes; the most is {most}. "
            "Upload large datasets with UploadDataset, or name the path of a file on the server.",
            metadata={"message_bytes": str(size), "max_bytes": str(most)},
        )


def _token_in_plain_text() -> PreconditionError:
    return PreconditionError(
        ErrorReason.ERROR_REASON_HUB_TOKEN_IN_PLAIN_TEXT,
        "The Hugging Face token came over the network in plain text, so it was not used. Revoke it at the Hub: others "
        "may have read it. Then send a new one over TLS or an SSH tunnel, or let the operator set HF_TOKEN there.",
    )
