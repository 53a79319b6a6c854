"""One worker process as the server sees it: its calls, its death and its end."""

import asyncio
import logging
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from unslothd.v1.model_pb2 import Model
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import TrainingPlan
from unslothd.worker.v1 import worker_service_pb2 as messages
from unslothd.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from unslothd_server.app.worker_exit import WorkerExit, WorkerStuckError, worker_died
from unslothd_server.errors import UnslothdError
from unslothd_server.worker.exit_record import read_exit_record
from unslothd_server.workers import exit_report
from unslothd_server.workers.bundle import Bundle
from unslothd_server.workers.calls import answered_error, is_broken
from unslothd_server.workers.liveness import ProcessHandle, kill_session, lock_holder
from unslothd_server.workers.stop import kill_process, stop_process
from unslothd_server.workers.timeouts import WorkerTimeouts

T = TypeVar("T")

_log = logging.getLogger(__name__)
_UNLIMITED = -1
_CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", _UNLIMITED),
    ("grpc.max_send_message_length", _UNLIMITED),
    # An error's text and details may hold long paths; the sum of both is in the trailers twice.
    ("grpc.max_metadata_size", 1 << 20),
    ("grpc.absolute_max_metadata_size", 2 << 20),
    # A worker's socket opens a moment after its start: try again soon, and never wait for what another channel learnt.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]


class WorkerProcess:
    """Implements `app.ports.Worker` over the socket in a bundle. Make it in a running event loop.

    Args:
        bundle: The worker's folder.
        home: Home of the server.
        process: Handle on the worker; owned from here on.
        child: The same process if this server started it: reaped here, and its exit code is known.
        timeouts: Bounds of every answer.
    """

    def __init__(
        self,
        bundle: Bundle,
        home: Path,
        process: ProcessHandle,
        child: "subprocess.Popen[bytes] | None",
        timeouts: WorkerTimeouts,
    ) -> None:
        self._bundle = bundle
        self._home = home
        self._process = process
        self._child = child
        self._timeouts = timeouts
        self._asked = False
        self._load_over = asyncio.Event()
        self._stopping: asyncio.Task[WorkerExit] | None = None
        self._channel = grpc.aio.insecure_channel(f"unix:{bundle.socket_path}", options=_CHANNEL_OPTIONS)
        self._stub = WorkerServiceStub(self._channel)
        self._end = asyncio.create_task(self._see_end(), name=f"end of worker {bundle.model_id}")

    @classmethod
    def attach(cls, bundle: Bundle, home: Path, timeouts: WorkerTimeouts) -> "WorkerProcess | None":
        """Returns the worker that lives in a folder, whoever started it; None when none does."""
        pid = lock_holder(bundle.layout.lock)
        if pid is None:
            return None
        try:
            process = ProcessHandle(pid)
        except ProcessLookupError:
            return None
        if lock_holder(bundle.layout.lock) != pid:  # it died, and the id was used again, between the two
            process.close()
            return None
        return cls(bundle, home, process, None, timeouts)

    @property
    def model_id(self) -> str:
        """Model that it holds."""
        return self._bundle.model_id

    @property
    def pid(self) -> int:
        """Its process id, which is its session's too."""
        return self._process.pid

    async def load(self, request: messages.LoadModelRequest) -> AsyncIterator[messages.LoadModelResponse]:
        """Loads the model; the last message carries it."""
        try:
            async for response in self._stream("loading", lambda: self._stub.LoadModel(request)):
                yield response
        finally:
            self._load_over.set()

    async def prepare(self, request: messages.PrepareForTrainingRequest) -> Model:
        """Attaches trainable parameters."""
        bound = self._timeouts.prepare
        response = await self._answer("preparing", bound, lambda: self._stub.PrepareForTraining(request, timeout=bound))
        return response.model

    async def start_training(self, request: messages.StartTrainingRequest) -> None:
        """Hands a training over."""
        bound = self._timeouts.start_training
        await self._answer("taking a training", bound, lambda: self._stub.StartTraining(request, timeout=bound))

    async def watch(self, training_id: str, after_sequence: int) -> AsyncIterator[TrainingEvent]:
        """Events after a sequence, as they come; ends after the terminal event."""
        request = messages.WatchTrainingRequest(training_id=training_id, after_sequence=after_sequence)
        async for response in self._stream("training", lambda: self._stub.WatchTraining(request)):
            yield response.event

    async def cancel(self, training_id: str, *, save_checkpoint: bool) -> None:
        """Asks the training to stop at the next step boundary."""
        request = messages.CancelTrainingRequest(training_id=training_id, save_checkpoint=save_checkpoint)
        bound = self._timeouts.answer
        await self._answer("cancelling", bound, lambda: self._stub.CancelTraining(request, timeout=bound))

    async def pause(self, training_id: str) -> None:
        """Asks the training to stop at the next step boundary in a state from which it can go on."""
        request, bound = messages.PauseTrainingRequest(training_id=training_id), self._timeouts.answer
        await self._answer("pausing", bound, lambda: self._stub.PauseTraining(request, timeout=bound))

    async def plan(self, request: messages.PlanTrainingRequest) -> TrainingPlan:
        """Works out what a training would do; ends when cancelled."""
        bound = self._timeouts.plan
        response = await self._answer("planning", bound, lambda: self._stub.PlanTraining(request, timeout=bound))
        return response.plan

    async def export(self, request: messages.ExportModelRequest) -> AsyncIterator[messages.ExportModelResponse]:
        """Writes the model in another form; the last message carries the artifact."""
        async for response in self._stream("exporting", lambda: self._stub.ExportModel(request)):
            yield response

    async def generate(self, request: messages.GenerateRequest) -> AsyncIterator[messages.GenerateResponse]:
        """Streams text."""
        async for response in self._stream("generating", lambda: self._stub.Generate(request)):
            yield response

    async def status(self) -> messages.GetStatusResponse:
        """What it is doing now."""
        request, bound = messages.GetStatusRequest(), self._timeouts.answer
        return await self._answer("reading its status", bound, lambda: self._stub.GetStatus(request, timeout=bound))

    async def wait_listening(self) -> messages.GetStatusResponse:
        """Returns its first answer.

        Raises:
            AbortedError: It died, or did not answer within `timeouts.start`.
        """
        request, bound = messages.GetStatusRequest(), self._timeouts.start
        first = asyncio.create_task(
            self._answer("starting", bound, lambda: self._stub.GetStatus(request, timeout=bound, wait_for_ready=True))
        )
        try:
            # A call that waits for a socket does not notice that nobody will open it.
            await asyncio.wait([first, self._end], return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                raise worker_died(self.model_id, self._end.result())
            return first.result()
        finally:
            first.cancel()

    async def imported(self) -> None:
        """Returns once its imports are done.

        Raises:
            AbortedError: It died, or was not done within `timeouts.import_libraries`.
        """
        request, bound = messages.GetStatusRequest(when_imported=True), self._timeouts.import_libraries
        await self._answer("importing", bound, lambda: self._stub.GetStatus(request, timeout=bound))

    async def take_model(self, model_id: str, *, device_map: str) -> None:
        """Makes a spare the worker of a model, first in its folder: a server that finds it there knows it as that."""
        self._bundle = self._bundle.given_to(model_id, device_map=device_map)
        request, bound = messages.TakeModelRequest(bootstrap=self._bundle.bootstrap), self._timeouts.answer
        await self._answer("taking a model", bound, lambda: self._stub.TakeModel(request, timeout=bound))

    async def wait_load_over(self) -> None:
        """Returns once a load has ended, well or not, or the process has."""
        load_over = asyncio.create_task(self._load_over.wait())
        try:
            await asyncio.wait([load_over, self._end], return_when=asyncio.FIRST_COMPLETED)
        finally:
            load_over.cancel()

    async def stop(self) -> WorkerExit:
        """Ends the process by the bounded stop ladder and removes its folder. Repeatable; goes on when cancelled.

        Raises:
            WorkerStuckError: Not even SIGKILL ended it in time.
        """
        if self._bundle.is_spare:
            return await self.kill()
        return await self._ended_by(lambda: stop_process(self._process, self._end, self._ask_to_end, self._timeouts))

    async def kill(self) -> WorkerExit:
        """As `stop`, without asking first: it has nothing to save, or its training goes on elsewhere."""
        return await self._ended_by(lambda: kill_process(self._process, self._end, self._timeouts))

    async def exited(self) -> WorkerExit:
        """Returns once the process is gone, for whatever reason. Any number of callers may wait."""
        return await asyncio.shield(self._end)

    async def detach(self) -> None:
        """Lets go of a worker that shall live on: for a server that stops. No call may follow."""
        self._end.cancel()
        await asyncio.wait([self._end])
        await self._channel.close()
        self._process.close()

    async def _ended_by(self, end: Callable[[], Awaitable[None]]) -> WorkerExit:
        if self._stopping is None or (self._stopping.done() and self._stopping.exception() is not None):
            self._stopping = asyncio.create_task(self._stop(end), name=f"stop of worker {self.model_id}")
        return await asyncio.shield(self._stopping)

    async def _stop(self, end: Callable[[], Awaitable[None]]) -> WorkerExit:
        if not self._end.done():
            self._asked = True
            await end()
        if not self._end.done():
            raise WorkerStuckError(self.model_id, self._process.pid)
        await self._channel.close(grace=self._timeouts.death_after_broken_call)
        await asyncio.to_thread(self._bundle.remove, self._home)
        return self._end.result()

    async def _ask_to_end(self) -> None:
        request, bound = messages.ShutdownRequest(), self._timeouts.answer
        await self._answer("being asked to end", bound, lambda: self._stub.Shutdown(request, timeout=bound))

    async def _see_end(self) -> WorkerExit:
        await self._process.ended()
        # Before the worker is reaped, while its id cannot be used again: nothing of its session may live on. This also
        # closes what forked children inherited of the connection, so that calls under way end.
        if not await kill_session(self._process.pid, within_s=self._timeouts.end_on_sigkill):
            _log.error("processes of a worker outlived SIGKILL", extra={"model_id": self.model_id})
        returncode = None if self._child is None else self._child.wait()
        self._process.close()
        layout = self._bundle.layout
        record = read_exit_record(layout.exit_record, self._process.pid)
        end = exit_report.worker_exit(returncode, record, layout.log, asked=self._asked)
        _log.info("worker ended: exit code %s, signal %s", end.exit_code, end.signal, extra={"model_id": self.model_id})
        return end

    async def _answer(self, doing: str, bound_s: float, start: Callable[[], Awaitable[T]]) -> T:
        self._check_alive()
        try:
            return await start()
        except grpc.aio.AioRpcError as error:
            raise await self._meaning(error, doing, bound_s) from error

    async def _stream(self, doing: str, start: "Callable[[], grpc.aio.UnaryStreamCall[Any, T]]") -> AsyncIterator[T]:
        self._check_alive()
        call = start()
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise await self._meaning(error, doing, self._timeouts.death_after_broken_call) from error
        finally:
            call.cancel()

    def _check_alive(self) -> None:
        if self._end.done():
            raise worker_died(self.model_id, self._end.result())

    async def _meaning(self, error: grpc.aio.AioRpcError, doing: str, bound_s: float) -> UnslothdError:
        if not is_broken(error):
            return answered_error(error)
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            await asyncio.wait([self._end], timeout=self._timeouts.death_after_broken_call)
        if self._end.done():
            return worker_died(self.model_id, self._end.result())
        return exit_report.unresponsive(self.model_id, doing, bound_s)
