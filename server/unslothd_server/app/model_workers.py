"""Workers of models: brought up, watched over, put away; taken over from a server that ended, left to the next."""

import asyncio
import contextlib
from pathlib import Path

import structlog

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import LoadProgress, Model
from unslothd_server.app.loaded_model import LoadedModel, take_over
from unslothd_server.app.memory_admission import MemoryAdmission
from unslothd_server.app.model_store import ModelStore
from unslothd_server.app.ports import Worker, WorkerLauncher
from unslothd_server.app.training_state import now
from unslothd_server.app.worker_exit import WorkerStuckError, worker_died
from unslothd_server.errors import ExhaustedError, PreconditionError

log = structlog.get_logger()

# Memory also comes back from processes that are not ours, so nobody tells us.
_LOOK_FOR_MEMORY_SECONDS = 1.0
# Free memory never stands still, and what is told is kept for callers that come later.
_WORTH_TELLING_BYTES = 256 * 1024 * 1024


class ModelWorkers:
    """What the registry of models does to processes.

    Args:
        launcher: Starts workers.
        admission: Knows whether a model fits.
        store: Where models are kept on disk.
        hub_token: The operator's Hub token, for loads that bring none of their own; empty = none.
    """

    def __init__(
        self, launcher: WorkerLauncher, admission: MemoryAdmission, store: ModelStore, *, hub_token: str = ""
    ) -> None:
        self._launcher = launcher
        self._admission = admission
        self._store = store
        self._hub_token = hub_token

    def bring_up(self, entry: LoadedModel, *, token: str = "", waits: bool) -> "asyncio.Task[Exception | None]":
        """Begins to start a worker, load the model and prepare it as it was; the result is what went wrong.

        Nothing of a failed attempt stays but the entry, which is FAILED. Cancelling the task ends the attempt.

        Args:
            entry: The model.
            token: For the Hub; empty = the operator's.
            waits: Wait for memory where the model does not fit now, but could.

        Raises:
            ExhaustedError: The model does not fit (INSUFFICIENT_MEMORY); nothing was begun.
        """
        stored = entry.stored
        entry.failure = None
        try:
            self._admission.reserve(entry.model_id, stored.model_source, stored.request)
        except ExhaustedError as refused:
            if not waits or not self._admission.could_ever_fit(entry.model_id, stored.model_source, stored.request):
                raise
            begin, name = self._wait(entry, refused, token), f"wait for memory for {entry.model_id}"
        else:
            begin, name = self._bring_up(entry, token), f"bring up {entry.model_id}"
        entry.model.state = Model.STATE_LOADING
        entry.bringing_up = asyncio.create_task(begin, name=name)
        return entry.bringing_up

    async def _bring_up(self, entry: LoadedModel, token: str) -> Exception | None:
        error: Exception | None = None
        try:
            await self._make(entry, token)
        except asyncio.CancelledError:  # by `give_up`, which waits for this to end
            error = _unloaded_meanwhile(entry.model_id)
        except Exception as caught:  # noqa: BLE001 - whatever it is, whoever waits for the model gets it
            error = caught
        finally:
            self._admission.release(entry.model_id)
            entry.bringing_up = None
        if error is None:
            return None
        try:
            await self.put_away(entry)
        except WorkerStuckError as stuck:
            return stuck
        entry.model.state = Model.STATE_FAILED
        entry.failure = _as_failure(entry.model_id, error)
        return error

    async def give_up(self, entry: LoadedModel) -> None:
        """Ends the bringing up of a model, if that is under way, and returns once nothing is left of it."""
        await asyncio.sleep(0)  # a task that is cancelled before its first step cleans nothing up
        if entry.bringing_up is not None:
            entry.bringing_up.cancel()
            await asyncio.wait([entry.bringing_up])

    async def _wait(self, entry: LoadedModel, refused: ExhaustedError, token: str) -> Exception | None:
        try:
            await self._fits(entry, refused)
        except asyncio.CancelledError:
            entry.bringing_up = None
            entry.model.state = Model.STATE_FAILED
            return _unloaded_meanwhile(entry.model_id)
        finally:
            entry.lacks_memory = None
        return await self._bring_up(entry, token)

    async def _fits(self, entry: LoadedModel, refused: ExhaustedError) -> None:
        """Returns once the memory of a model is set aside; tells meanwhile how far it is from that."""
        told: int | None = None
        while True:
            entry.lacks_memory = refused
            needed, free = int(refused.metadata["needed_bytes"]), int(refused.metadata["free_bytes"])
            if told is None or abs(free - told) >= _WORTH_TELLING_BYTES:
                told = free
                waiting = LoadProgress(phase=LoadProgress.PHASE_WAITING_FOR_MEMORY, model_id=entry.model_id)
                waiting.done, waiting.total = free, needed
                entry.progress.append(waiting)
            await asyncio.sleep(_LOOK_FOR_MEMORY_SECONDS)
            try:
                self._admission.reserve(entry.model_id, entry.stored.model_source, entry.stored.request)
            except ExhaustedError as error:
                refused = error
            else:
                return

    async def _make(self, entry: LoadedModel, token: str) -> None:
        stored = entry.stored
        if not self._launcher.has_spare:  # a spare that still imports says so itself
            entry.progress.append(LoadProgress(phase=LoadProgress.PHASE_STARTING_WORKER, model_id=entry.model_id))
        worker = entry.worker = await self._launcher.launch(entry.model_id, device_map=entry.model.device_map)
        async for response in worker.load(stored.worker_load(token or self._hub_token)):
            if response.HasField("progress"):
                response.progress.model_id = entry.model_id
                entry.progress.append(response.progress)
            else:
                take_over(entry.model, response.model)
        if stored.prepare is not None:
            take_over(entry.model, await worker.prepare(stored.prepare))
        if not entry.model.HasField("load_time"):
            entry.model.load_time.CopyFrom(now())
        self._admission.learn(entry.model_id, entry.model.memory_bytes)
        self.ready(entry)

    def ready(self, entry: LoadedModel) -> None:
        """The worker of a model is there and holds it."""
        entry.model.state = Model.STATE_READY if entry.stored.prepare is None else Model.STATE_PREPARED
        entry.stored.suspended = False
        self._store.keep(entry.stored)
        assert entry.worker is not None
        entry.watch = asyncio.create_task(self._watch_over(entry, entry.worker), name=f"watch over {entry.model_id}")

    async def adopt(self, entry: LoadedModel, worker: Worker) -> bool:
        """Takes a worker over that an earlier server started; False when it does not hold the model, and is ended."""
        status = await worker.status()
        if not status.HasField("model") or (entry.stored.prepare is not None and not status.model.trainable_params):
            await worker.stop()
            return False
        entry.worker = worker
        take_over(entry.model, status.model)
        self.ready(entry)
        return True

    async def put_away(self, entry: LoadedModel, *, at_once: bool = False) -> None:
        """Ends the worker of a model, if it has one, and returns once it is gone.

        Args:
            entry: The model.
            at_once: Without asking it: one that is asked ends its training for good, as cancelled.

        Raises:
            WorkerStuckError: It does not end; the model is FAILED, and the next call tries again.
        """
        worker, entry.worker = entry.worker, None
        try:
            if worker is not None:
                await (worker.kill() if at_once else worker.stop())
        except WorkerStuckError as stuck:
            log.warning("a worker does not end", model_id=entry.model_id, error=stuck.message)
            entry.worker, entry.failure, entry.model.state = worker, stuck, Model.STATE_FAILED
            raise
        if entry.watch is not None:
            await entry.watch
            entry.watch = None
        entry.model.memory_bytes = 0

    async def suspend(self, entry: LoadedModel) -> None:
        """Frees the device of a model whose training is paused, or ends its wait for one.

        A worker that does not end leaves its model FAILED.
        """
        await self.give_up(entry)
        entry.model.state = Model.STATE_SUSPENDED
        entry.stored.suspended = True
        self._store.keep(entry.stored)
        with contextlib.suppress(WorkerStuckError):
            await self.put_away(entry)

    async def leave(self, entry: LoadedModel) -> None:
        """Lets go of the worker of a model, for the next server to take over."""
        if entry.watch is not None:
            entry.watch.cancel()
        if entry.worker is not None:
            await entry.worker.detach()

    def start_from(self, entry: LoadedModel, folder: Path | None) -> None:
        """The next worker of a model starts from these weights: the results of a training, if there are any."""
        prepare = entry.stored.prepare
        if folder is not None and prepare is not None and prepare.weights_from != str(folder):
            prepare.weights_from = str(folder)
            self._store.keep(entry.stored)

    async def _watch_over(self, entry: LoadedModel, worker: Worker) -> None:
        """Notices the death of a worker that nobody asked to end."""
        how = await worker.exited()
        if not how.asked and entry.worker is worker:
            entry.failure = worker_died(entry.model_id, how)
            entry.model.state = Model.STATE_FAILED
            entry.model.memory_bytes = 0


def _unloaded_meanwhile(model_id: str) -> PreconditionError:
    return PreconditionError(
        ErrorReason.ERROR_REASON_MODEL_NOT_READY,
        f'Model "{model_id}" was unloaded while it loaded. Load it again if that was not meant.',
    )


def _as_failure(model_id: str, error: Exception) -> PreconditionError:
    return PreconditionError(
        ErrorReason.ERROR_REASON_MODEL_NOT_READY,
        f'Model "{model_id}" could not be brought back: {error} Unload it, then load it again.',
    )
