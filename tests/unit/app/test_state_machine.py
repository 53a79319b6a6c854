"""Models and trainings against a small model of what may follow what, whatever is asked and whatever dies when."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from doubles.in_memory_workers import InMemoryTraining
from support.app_in_memory import AppInMemory, write_model
from unslothd.v1.dataset_pb2 import DatasetSource, InlineRows
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2 import (
    LoadModelRequest,
    PrepareForTrainingRequest,
    ResumeTrainingRequest,
    TrainRequest,
)
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import Training
from unslothd_server.app.models import Models
from unslothd_server.app.training_run import TrainingRun
from unslothd_server.app.training_state import FINAL_STATES, apply, is_final
from unslothd_server.app.trainings import Trainings
from unslothd_server.errors import UnavailableError, UnslothdError
from unslothd_server.event_log import EventLogReader

S = Training.State
# What may follow in a log; recovery, succeeded, failed and cancelled are states as well.
ALLOWED: Mapping[int, Collection[int]] = {
    S.STATE_UNSPECIFIED: {S.STATE_QUEUED},
    S.STATE_QUEUED: {S.STATE_QUEUED, S.STATE_RUNNING, S.STATE_PAUSED, S.STATE_CANCELLED, S.STATE_FAILED}
    | {S.STATE_RECOVERING},
    S.STATE_RUNNING: {S.STATE_PAUSING, S.STATE_RECOVERING, *FINAL_STATES},
    S.STATE_PAUSING: {S.STATE_PAUSED, S.STATE_RECOVERING, *FINAL_STATES},
    S.STATE_PAUSED: {S.STATE_QUEUED, S.STATE_CANCELLED},
    S.STATE_RECOVERING: {S.STATE_RUNNING, S.STATE_RECOVERING, S.STATE_PAUSED, S.STATE_FAILED, S.STATE_CANCELLED},
    S.STATE_FAILED: {S.STATE_QUEUED},
    S.STATE_CANCELLED: {S.STATE_QUEUED},
    S.STATE_SUCCEEDED: (),
}
_TURNS = 60  # of the event loop, after which whatever happens by itself has happened
_picks = st.integers(0, 5)


class AppMachine(RuleBasedStateMachine):
    """Calls, deaths and restarts in any order."""

    def __init__(self) -> None:
        super().__init__()
        self._scratch = tempfile.TemporaryDirectory()
        self._folder = Path(self._scratch.name)
        write_model(self._folder / "roots" / "m")
        self._loop = asyncio.new_event_loop()
        self._callers: list[asyncio.Task[Any]] = []
        self._abandoned: set[asyncio.Task[Any]] = set()
        self._seen: dict[str, list[bytes]] = {}
        self._run(self._begin())

    # --- the app, and time ---

    async def _begin(self) -> None:
        self._app = AppInMemory(self._folder)
        self._host = self._app.host
        await self._app.start()

    @property
    def models(self) -> Models:
        return self._app.models

    @property
    def trainings(self) -> Trainings:
        return self._app.trainings

    def _run(self, work: Awaitable[Any]) -> Any:
        async def settle() -> Any:
            result = await work
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            return result

        return self._loop.run_until_complete(settle())

    def _call(self, call: Callable[[], Awaitable[Any]]) -> None:
        """A caller that may be refused, but never by a bug."""

        async def caller() -> None:
            try:
                await call()
            except UnslothdError as error:
                if error.reason == ErrorReason.ERROR_REASON_INTERNAL:
                    raise

        async def begin() -> None:
            self._callers.append(asyncio.create_task(caller(), name="caller"))

        self._run(begin())

    def _models(self) -> list[str]:
        return [model.model_id for model in self._run(self.models.describe_all())]

    def _all_runs(self) -> list[TrainingRun]:
        return list(self.trainings.all())

    def _training(self, pick: int) -> TrainingRun | None:
        runs = self._all_runs()
        return runs[pick % len(runs)] if runs else None

    def _active(self, pick: int) -> InMemoryTraining | None:
        active = [worker.active for worker in self._host.living if worker.active is not None]
        return active[pick % len(active)] if active else None

    def _do(self, deed: Callable[[], None]) -> None:
        async def done() -> None:
            deed()

        self._run(done())

    # --- what callers do ---

    @initialize()
    def a_prepared_model(self) -> None:
        self.load()
        self.prepare(0)

    @rule()
    def load(self) -> None:
        async def call() -> None:
            async for _ in self._app.lifecycle.load(LoadModelRequest(model_name="m")):
                pass

        self._call(call)

    @rule(pick=_picks)
    def prepare(self, pick: int) -> None:
        models = self._models()
        if models:
            request = PrepareForTrainingRequest(model_id=models[pick % len(models)])
            self._call(lambda: self._app.lifecycle.prepare(request))

    @rule(pick=_picks)
    def train(self, pick: int) -> None:
        models = self._models()
        if models:
            rows = DatasetSource(inline=InlineRows(data=b"{}"))
            request = TrainRequest(model_id=models[pick % len(models)], train_dataset=rows)

            async def call() -> None:
                self._app.acceptance.accept(request)

            self._call(call)

    @rule(pick=_picks, save=st.booleans())
    def cancel(self, pick: int, save: bool) -> None:
        run = self._training(pick)
        if run is not None:
            self._call(lambda: self._app.control.cancel(run.training_id, save_checkpoint=save))

    @rule(pick=_picks)
    def pause(self, pick: int) -> None:
        run = self._training(pick)
        if run is not None:
            self._call(lambda: self._app.control.pause(run.training_id))

    @rule(pick=_picks)
    def resume(self, pick: int) -> None:
        run = self._training(pick)
        if run is not None:

            async def call() -> None:
                self._app.control.resume(ResumeTrainingRequest(training_id=run.training_id))

            self._call(call)

    @rule(pick=_picks)
    def unload(self, pick: int) -> None:
        models = self._models()
        if models:
            model_id = models[pick % len(models)]

            async def call() -> None:
                await self._app.control.stop_all_on(model_id)
                await self._app.lifecycle.unload(model_id)

            self._call(call)

    # --- what happens by itself ---

    @rule(pick=_picks)
    def a_step(self, pick: int) -> None:
        training = self._active(pick)
        if training is not None:
            self._do(training.make_step)

    @rule(pick=_picks, well=st.booleans())
    def an_end(self, pick: int, well: bool) -> None:
        training = self._active(pick)
        if training is not None:
            self._do(training.succeed if well else training.fail)

    @rule(pick=_picks)
    def a_death(self, pick: int) -> None:
        living = self._host.living
        if living:
            self._do(living[pick % len(living)].die)

    @rule(pick=_picks, deaf=st.booleans())
    def a_worker_is_deaf_until_its_next_step(self, pick: int, deaf: bool) -> None:
        living = self._host.living
        if living:
            worker = living[pick % len(living)]
            self._do(worker.turn_deaf if deaf else worker.listen)

    @rule(go_on=st.booleans())
    def loads_take_long(self, go_on: bool) -> None:
        self._do(self._host.loads.set if go_on else self._host.loads.clear)

    @rule()
    def the_server_is_killed(self) -> None:
        self._run(self._kill())

    async def _kill(self) -> None:
        self._abandoned |= asyncio.all_tasks() - {asyncio.current_task()}
        self._callers.clear()
        await self._app.kill_and_start()

    @rule(leave=st.booleans())
    def the_server_is_stopped_and_started(self, leave: bool) -> None:
        self._run(self._stop(leave=leave))
        self._run(self._app.start())

    async def _stop(self, *, leave: bool) -> None:
        async with asyncio.timeout(30):
            await self._stop_in_order(leave=leave)

    async def _stop_in_order(self, *, leave: bool) -> None:
        self._host.loads.set()
        for worker in self._host.living:
            worker.listen()
        self.trainings.interrupt_watchers(UnavailableError(ErrorReason.ERROR_REASON_SERVER_STOPPING, "Stopping."))
        if not leave:
            await self._app.control.pause_running()
        self.models.refuse_new()
        await self._app.control.close(leave_running=leave)
        await self._app.lifecycle.close(leave_workers=leave)
        await asyncio.gather(*self._callers)
        self._callers.clear()
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - self._abandoned - {asyncio.current_task()}
        assert not left, left

    # --- what always holds ---

    @invariant()
    def callers_are_refused_with_reasons(self) -> None:
        for caller in [each for each in self._callers if each.done()]:
            self._callers.remove(caller)
            caller.result()

    @invariant()
    def every_log_goes_on_without_a_gap_and_only_as_it_may(self) -> None:
        for run in self._all_runs():
            events = [entry.event for entry in EventLogReader(run.store.event_log(run.training_id)).read()]
            frames = [event.SerializeToString() for event in events]
            before = self._seen.get(run.training_id, [])
            assert frames[: len(before)] == before, "an event that was written has changed"
            self._seen[run.training_id] = frames
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))
            self._check_transitions(events)
            assert run.training.last_sequence == len(events)

    def _check_transitions(self, events: list[TrainingEvent]) -> None:
        training = Training()
        for event in events:
            before = training.state
            apply(training, event)
            if training.state != before or event.HasField("state_changed"):
                names = (S.Name(before), S.Name(training.state))
                assert training.state in ALLOWED[before], f"{names[0]} is followed by {names[1]}"

    @invariant()
    def places_in_a_queue_are_all_different(self) -> None:
        queued = [
            (run.training.model_id, run.training.queue_position)
            for run in self._all_runs()
            if run.training.state == S.STATE_QUEUED
        ]
        assert len(set(queued)) == len(queued), queued

    @invariant()
    def one_worker_a_model(self) -> None:
        models = [worker.model_id for worker in self._host.living]
        assert len(set(models)) == len(models), models

    # --- the end ---

    def teardown(self) -> None:
        try:
            self._finish_everything()
            self._run(self._stop(leave=False))
        finally:
            for _ in range(5):  # a cancelled task may wait for something else on its way out
                for task in asyncio.all_tasks(self._loop):
                    task.cancel()
                self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()
            self._scratch.cleanup()

    def _finish_everything(self) -> None:
        self._do(self._host.loads.set)
        for _ in range(200):
            pending = [run for run in self._all_runs() if not is_final(run.training)]
            if not pending:
                break
            for run in pending:
                if run.is_paused:
                    self._go_on(run)
            self.an_end(0, True)
            self.callers_are_refused_with_reasons()
            self.every_log_goes_on_without_a_gap_and_only_as_it_may()
        assert not [run for run in self._all_runs() if not is_final(run.training)], "a training hangs"
        states = {model.state for model in self._run(self.models.describe_all())}
        assert states <= {Model.STATE_READY, Model.STATE_PREPARED, Model.STATE_FAILED, Model.STATE_SUSPENDED}

    def _go_on(self, run: TrainingRun) -> None:
        async def call() -> None:
            try:
                self._app.control.resume(ResumeTrainingRequest(training_id=run.training_id))
            except UnslothdError:  # its model's id is taken, or too many models are loaded
                await self._app.control.cancel(run.training_id, save_checkpoint=False)

        self._call(call)


TestApp = AppMachine.TestCase
TestApp.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
