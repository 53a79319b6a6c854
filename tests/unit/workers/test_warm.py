"""Spare workers: taken by launches, replaced after use and after death, never at the cost of a launch."""

import asyncio
from collections.abc import Coroutine
from typing import Any, cast

import pytest

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.app.worker_exit import WorkerExit
from unslothd_server.errors import AbortedError
from unslothd_server.workers.warm import Pace, WarmLauncher

_TURNS = 30  # of the event loop, after which whatever happens by itself has happened


class Worker:
    """A process that imports, loads and ends when a test says so."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.is_imported = asyncio.Event()
        self.load_over = asyncio.Event()
        self.end: asyncio.Future[WorkerExit] = asyncio.get_running_loop().create_future()

    @property
    def lives(self) -> bool:
        return not self.end.done()

    def die(self) -> None:
        if self.lives:
            self.end.set_result(WorkerExit(None, "SIGKILL", "", asked=False))
            self.load_over.set()

    async def imported(self) -> None:
        imported = asyncio.create_task(self.is_imported.wait())
        await asyncio.wait([imported, self.end], return_when=asyncio.FIRST_COMPLETED)
        if not self.is_imported.is_set():
            raise lost()

    async def exited(self) -> WorkerExit:
        return await asyncio.shield(self.end)

    async def wait_load_over(self) -> None:
        await self.load_over.wait()

    async def kill(self) -> None:
        self.die()


class Launcher:
    """Starts such workers; what goes wrong is set by a test."""

    def __init__(self) -> None:
        self.spares: list[Worker] = []
        self.cold: list[Worker] = []
        self.starts_fail = False
        self.hand_overs_fail = False

    def remove_dead_spares(self) -> None:
        assert self.spares == []

    async def launch(self, model_id: str, *, device_map: str) -> Worker:
        self.cold.append(Worker(model_id))
        return self.cold[-1]

    async def launch_spare(self) -> Worker:
        self.spares.append(Worker("spare"))
        if self.starts_fail:
            self.spares[-1].die()
            raise lost()
        return self.spares[-1]

    async def hand_over(self, spare: Worker, model_id: str, *, device_map: str) -> None:
        if self.hand_overs_fail or not spare.lives:
            raise lost()
        spare.model_id = model_id


def lost() -> AbortedError:
    return AbortedError(ErrorReason.ERROR_REASON_WORKER_DIED, "The worker is gone. Load again.")


class Scene:
    """A launcher that keeps spares."""

    def __init__(self, count: int, pace: Pace) -> None:
        self.launcher = Launcher()
        self.warm = WarmLauncher(cast("Any", self.launcher), count, pace)

    async def settle(self) -> None:
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    async def launch(self, model_id: str = "m") -> Worker:
        worker = cast("Worker", await self.warm.launch(model_id, device_map="auto"))
        await self.settle()
        return worker

    async def after(self, *happened: Any) -> None:
        await self.settle()


def scene(test: Any, count: int = 1, pace: Pace | None = None) -> None:
    """Runs a test with spares that are kept and then ended."""

    async def run() -> None:
        async with asyncio.timeout(20):
            scene = Scene(count, pace or Pace(retry_seconds=0))
            scene.warm.keep()
            await scene.settle()
            await cast("Coroutine[Any, Any, None]", test(scene))
            await scene.warm.close()
            taken = [worker for worker in scene.launcher.spares if worker.model_id != "spare"]
            assert [worker for worker in scene.launcher.spares if worker.lives and worker not in taken] == []

    asyncio.run(run())


def test_a_spare_counts_as_warm_once_it_has_imported():
    async def test(scene: Scene) -> None:
        assert (scene.warm.has_spare, scene.warm.num_ready) == (True, 0)
        await scene.after(scene.launcher.spares[0].is_imported.set())
        assert (scene.warm.has_spare, scene.warm.num_ready) == (True, 1)

    scene(test)


@pytest.mark.parametrize("imported", [False, True])
def test_a_launch_takes_the_spare_also_while_it_imports(imported: bool):
    async def test(scene: Scene) -> None:
        (spare,) = scene.launcher.spares
        if imported:
            await scene.after(spare.is_imported.set())
        assert await scene.launch() is spare
        assert spare.model_id == "m"
        assert (scene.warm.has_spare, scene.launcher.cold) == (False, [])

    scene(test)


def test_of_several_spares_one_that_has_imported_is_taken():
    async def test(scene: Scene) -> None:
        _, second = scene.launcher.spares
        await scene.after(second.is_imported.set())
        assert await scene.launch() is second

    scene(test, count=2)


def test_the_next_spare_starts_when_the_load_is_over():
    async def test(scene: Scene) -> None:
        worker = await scene.launch()
        assert len(scene.launcher.spares) == 1
        await scene.after(worker.load_over.set())
        assert len(scene.launcher.spares) == 2
        assert scene.warm.has_spare

    scene(test)


def test_the_next_spare_starts_beside_a_load_that_takes_too_long():
    async def test(scene: Scene) -> None:
        await scene.launch()
        assert len(scene.launcher.spares) == 2

    scene(test, pace=Pace(load_seconds=0, retry_seconds=0))


def test_two_launches_at_once_share_no_spare():
    async def test(scene: Scene) -> None:
        first, second = await asyncio.gather(scene.launch("first"), scene.launch("second"))
        assert (first, second) == (scene.launcher.spares[0], scene.launcher.cold[0])
        assert (first.model_id, second.model_id) == ("first", "second")

    scene(test)


def test_a_spare_that_dies_is_replaced():
    async def test(scene: Scene) -> None:
        await scene.after(scene.launcher.spares[0].is_imported.set())
        await scene.after(scene.launcher.spares[0].die())
        assert len(scene.launcher.spares) == 2
        assert scene.warm.has_spare
        assert scene.warm.num_ready == 0

    scene(test)


def test_a_launch_whose_spare_died_a_moment_ago_starts_a_worker():
    async def test(scene: Scene) -> None:
        scene.launcher.spares[0].die()
        worker = await scene.launch()
        assert worker is scene.launcher.cold[0]
        assert worker.lives

    scene(test)


def test_a_spare_that_does_not_become_the_models_worker_is_ended_before_another_one_starts():
    async def test(scene: Scene) -> None:
        scene.launcher.hand_overs_fail = True
        worker = await scene.launch()
        assert worker is scene.launcher.cold[0]
        assert not scene.launcher.spares[0].lives

    scene(test)


def test_a_launch_that_is_cancelled_in_the_hand_over_ends_the_spare():
    async def test(scene: Scene) -> None:
        never = asyncio.Event()

        async def hang(*_: object, **__: object) -> None:
            await never.wait()

        scene.launcher.hand_over = hang
        launch = asyncio.create_task(scene.launch())
        await scene.settle()
        launch.cancel()
        await asyncio.wait([launch])
        assert not scene.launcher.spares[0].lives
        assert scene.launcher.cold == []

    scene(test)


def test_a_broken_environment_is_tried_five_times_and_again_after_the_next_load():
    async def test(scene: Scene) -> None:
        assert len(scene.launcher.spares) == 5
        assert not scene.warm.has_spare
        await scene.after(await scene.launch())
        assert len(scene.launcher.spares) == 10

    async def broken(this: Scene) -> None:
        this.launcher.starts_fail = True
        await this.after(this.launcher.spares[0].die())
        await test(this)

    scene(broken)


def test_deaths_while_importing_count_as_well():
    async def test(scene: Scene) -> None:
        for tried in range(1, 6):
            assert len(scene.launcher.spares) == tried
            await scene.after(scene.launcher.spares[-1].die())
        assert len(scene.launcher.spares) == 5
        assert not scene.warm.has_spare

    scene(test)


def test_without_spares_every_launch_starts_a_worker():
    async def test(scene: Scene) -> None:
        assert not scene.warm.has_spare
        assert await scene.launch() is scene.launcher.cold[0]
        assert scene.launcher.spares == []

    scene(test, count=0)


def test_closing_ends_the_spares_and_leaves_the_workers_of_models():
    async def test(scene: Scene) -> None:
        worker = await scene.launch()
        await scene.after(worker.load_over.set())
        await scene.warm.close()
        assert worker.lives
        assert [spare.lives for spare in scene.launcher.spares] == [True, False]
        assert not scene.warm.has_spare

    scene(test)
