"""Warm workers: spares that import Unsloth before anybody needs it; each launch takes one, and another one follows."""

import asyncio
import logging
from dataclasses import dataclass, field

from unslothd_server.errors import AbortedError, UnslothdError
from unslothd_server.workers.channel import WorkerProcess
from unslothd_server.workers.launcher import LocalLauncher

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """How soon a spare is followed by another one.

    Args:
        load_seconds: The import of the next one waits for the end of the load that took this one, at most so long: both
            would compete for the CPU and the disk.
        retry_seconds: Wait after the first death in a row; it doubles with each further one.
        most_deaths: After so many in a row no spare is started until a model is loaded without one.
    """

    load_seconds: float = 120.0
    retry_seconds: float = 2.0
    most_deaths: int = 5


@dataclass(eq=False)
class _Spare:
    """A spare that nobody has taken.

    Args:
        worker: Its process.
        is_ready: True once its imports are done.
        taken: Done once it is given to a model.
    """

    worker: WorkerProcess
    is_ready: bool = False
    taken: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class WarmLauncher:
    """Implements `app.ports.WorkerLauncher` and `app.ports.WarmWorkers`. A spare fits every model and device.

    Args:
        launcher: Starts processes.
        count: Spares that are kept; 0 = none.
        pace: How they are replaced.
    """

    def __init__(self, launcher: LocalLauncher, count: int, pace: Pace | None = None) -> None:
        self._launcher = launcher
        self._count = count
        self._pace = pace or Pace()
        self._spares: list[_Spare] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._cold_launch = asyncio.Event()

    @property
    def num_ready(self) -> int:
        """Spares whose imports are done."""
        return sum(spare.is_ready for spare in self._spares)

    @property
    def has_spare(self) -> bool:
        """True when the next launch takes a spare, done with its imports or not."""
        return bool(self._spares)

    async def launch(self, model_id: str, *, device_map: str) -> WorkerProcess:
        """Returns a spare that is now the worker of this model, or starts a worker when there is none that can be.

        Raises:
            AbortedError: It died, or did not answer in time (WORKER_DIED, WORKER_UNRESPONSIVE).
        """
        spare = self._take()
        if spare is not None and await self._hand_over(spare, model_id, device_map):
            return spare
        self._cold_launch.set()
        return await self._launcher.launch(model_id, device_map=device_map)

    def _take(self) -> WorkerProcess | None:
        if not self._spares:
            return None
        # One that still imports is further than a process that only starts.
        spare = next((each for each in self._spares if each.is_ready), self._spares[0])
        self._spares.remove(spare)
        spare.taken.set_result(None)
        return spare.worker

    async def _hand_over(self, spare: WorkerProcess, model_id: str, device_map: str) -> bool:
        try:
            await self._launcher.hand_over(spare, model_id, device_map=device_map)
        except AbortedError as error:
            _log.warning("a spare worker could not be used, another worker is started: %s", error.message)
            await _end(spare)
            return False
        except BaseException:
            await _end(spare)
            raise
        return True

    # --- keeping them ---

    def keep(self) -> None:
        """Begins to start spares; call it once, in a running event loop."""
        self._launcher.remove_dead_spares()
        self._keepers = [
            asyncio.create_task(self._keep_one(), name=f"spare worker {number}") for number in range(self._count)
        ]

    async def close(self) -> None:
        """Ends the spares; those that were taken are no longer spares. Launches go on without."""
        for keeper in self._keepers:
            keeper.cancel()
        if self._keepers:
            await asyncio.wait(self._keepers)

    async def _keep_one(self) -> None:
        deaths = 0
        while True:
            worker = await self._one_life()
            if worker is not None:
                deaths = 0
                await self._let_load(worker)
            elif (deaths := deaths + 1) < self._pace.most_deaths:
                await asyncio.sleep(self._pace.retry_seconds * 2 ** (deaths - 1))
            else:
                _log.error(
                    "%d spare workers died in a row; loads go on without. The next one is tried after a load.", deaths
                )
                self._cold_launch.clear()
                await self._cold_launch.wait()
                deaths = 0

    async def _one_life(self) -> WorkerProcess | None:
        """Returns a spare once it is taken; None when it died before, or could not be started."""
        try:
            spare = _Spare(await self._launcher.launch_spare())
        except (UnslothdError, OSError) as error:
            _log.warning("a spare worker could not be started: %s", error)
            return None
        self._spares.append(spare)
        try:
            await self._until_taken_or_lost(spare)
        finally:
            if not spare.taken.done():
                self._spares.remove(spare)
                await _end(spare.worker)
        return spare.worker if spare.taken.done() else None

    async def _until_taken_or_lost(self, spare: _Spare) -> None:
        importing = asyncio.create_task(spare.worker.imported())
        ended = asyncio.create_task(spare.worker.exited())
        try:
            await asyncio.wait([spare.taken, ended, importing], return_when=asyncio.FIRST_COMPLETED)
            if importing.done() and importing.exception() is None:
                spare.is_ready = True
                await asyncio.wait([spare.taken, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            importing.cancel()
            ended.cancel()
        if not spare.taken.done():
            how = ended.result().log_tail if ended.done() else importing.exception()
            _log.warning("a spare worker is lost, while %s: %s", "idle" if spare.is_ready else "importing", how)

    async def _let_load(self, worker: WorkerProcess) -> None:
        try:
            async with asyncio.timeout(self._pace.load_seconds):
                await worker.wait_load_over()
        except TimeoutError:
            _log.info("a load takes long; the next spare worker is started beside it")


async def _end(worker: WorkerProcess) -> None:
    """Ends a worker that holds nothing."""
    try:
        await worker.kill()
    except UnslothdError as error:
        _log.error("a spare worker cannot be ended: %s", error)
