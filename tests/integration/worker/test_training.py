"""Commands on a living worker: it loads, trains and generates, and answers while it does."""

import asyncio
from pathlib import Path

import pytest

from doubles.gates import StepGate
from integration.worker.harness import LOAD, Home, at_step, bounded, events_of, kinds, raised_by, until
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import LoadProgress, Model
from unslothd.v1.service_pb2 import GenerateRequest
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd.worker.v1 import worker_service_pb2 as messages
from unslothd_server.errors import AlreadyExistsError, NotFoundError, PreconditionError, UnexpectedError
from unslothd_server.event_log import EventLogReader


def test_the_socket_answers_before_the_import_is_done(home: Home, tmp_path: Path):
    async def test() -> None:
        gate = tmp_path / "import-may-end"
        worker = await home.launcher(import_gate=gate).launch("m", device_map="cpu")
        status = await worker.status()
        assert status.pid == worker.pid
        assert not status.HasField("model")

        load = worker.load(LOAD)
        first = await anext(load)
        assert first.progress.phase == LoadProgress.PHASE_STARTING_WORKER
        gate.touch()
        rest = [response async for response in load]
        assert [response.WhichOneof("result") for response in rest] == ["progress", "model"]
        assert rest[-1].model.state == Model.STATE_READY
        assert rest[-1].model.device_map == "cpu"
        await worker.stop()

    bounded(test())


def test_a_training_is_told_from_running_to_succeeded_without_a_gap(home: Home):
    async def test() -> None:
        worker = await home.prepared()
        config = TrainingConfig(max_steps=4, save_steps=2)
        request = home.training(config=config)
        await worker.start_training(request)

        events = await events_of(worker)

        assert [event.sequence for event in events] == list(range(1, 10))
        steps = ["step", "step", "checkpoint_saved"]
        assert kinds(events) == ["state_changed", "started", *steps, *steps, "succeeded"]
        log = [entry.event for entry in EventLogReader(Path(request.training_dir) / "events.binpb").read()]
        assert events == log
        status = await worker.status()
        assert (status.training_active, status.last_sequence) == (False, len(events))
        assert status.model.state == Model.STATE_PREPARED
        await worker.stop()

    bounded(test())


def test_five_watchers_early_and_late_all_see_every_event_once(home: Home, tmp_path: Path):
    async def test() -> None:
        gate = StepGate(tmp_path / "gate")
        worker = await home.prepared()
        await worker.start_training(home.training(steps=50, gate=str(gate)))
        early = [asyncio.create_task(events_of(worker)) for _ in range(2)]
        gate.open(*range(1, 26))
        await at_step(worker, 25)
        late = [asyncio.create_task(events_of(worker)) for _ in range(2)]
        half = asyncio.create_task(events_of(worker, after=20))
        gate.open_all()

        everything = [await watcher for watcher in [*early, *late]]
        assert [event.sequence for event in everything[0]] == list(range(1, 55))
        assert everything == [everything[0]] * 4
        assert await half == everything[0][20:]
        assert await events_of(worker) == everything[0]
        await worker.stop()

    bounded(test())


def test_a_flood_of_events_arrives_whole(home: Home):
    async def test() -> None:
        worker = await home.prepared()
        await worker.start_training(home.training(flood=20_000, steps=1))

        events = await events_of(worker)

        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert kinds(events).count("warning") == 20_000
        await worker.stop()

    bounded(test())


def test_a_busy_worker_answers_and_refuses_other_work(home: Home, tmp_path: Path):
    async def test() -> None:
        gate = StepGate(tmp_path / "gate")
        worker = await home.prepared()
        await worker.start_training(home.training(step_gate=str(gate), steps=2))
        await until(lambda: gate.is_reached(1))

        status = await worker.status()
        assert (status.training_id, status.training_active) == ("t", True)
        assert (status.model.state, status.model.active_training_id) == (Model.STATE_TRAINING, "t")
        generation = messages.GenerateRequest(request=GenerateRequest(prompt="hello"))
        for refused in [
            await raised_by(worker.prepare(messages.PrepareForTrainingRequest())),
            await raised_by(anext(worker.generate(generation))),
            await raised_by(worker.start_training(home.training("other"))),
        ]:
            assert isinstance(refused, PreconditionError)
            assert refused.reason == ErrorReason.ERROR_REASON_MODEL_BUSY
            assert refused.metadata == {"training_id": "t"}
        gate.open_all()
        assert kinds(await events_of(worker))[-1] == "succeeded"
        await worker.stop()

    bounded(test())


@pytest.mark.parametrize("save_checkpoint", [False, True])
def test_a_cancel_acts_at_the_next_step_boundary(home: Home, tmp_path: Path, save_checkpoint: bool):
    async def test() -> None:
        gate = StepGate(tmp_path / "gate")
        worker = await home.prepared()
        await worker.start_training(home.training(step_gate=str(gate), steps=100))
        gate.open(1)
        await until(lambda: gate.is_reached(2))
        await worker.cancel("t", save_checkpoint=save_checkpoint)
        gate.open_all()

        events = await events_of(worker)

        assert [event.step.step for event in events if event.HasField("step")] == [1, 2]
        assert events[-1].cancelled.step == 2
        assert events[-1].cancelled.output_dir.endswith("/final") == save_checkpoint
        assert ("checkpoint_saved" in kinds(events)) == save_checkpoint
        await worker.cancel("t", save_checkpoint=False)
        await worker.stop()

    bounded(test())


def test_a_training_that_fails_leaves_the_worker_fit_for_the_next(home: Home):
    async def test() -> None:
        worker = await home.prepared()
        await worker.start_training(home.training("bug", die_at_step=2, die="raise"))
        failed = (await events_of(worker, "bug"))[-1].failed.error
        assert failed.code == 13
        assert "secret" not in str(failed)
        error_id = failed.message.split()[-1].rstrip(".")
        assert error_id in home.log_of()
        assert "RuntimeError: the secret inside of a bug" in home.log_of()

        await worker.start_training(home.training("oom", die_at_step=1, die="out_of_memory"))
        assert (await events_of(worker, "oom"))[-1].failed.error.message == "Out of memory. Take a smaller batch_size."
        await worker.start_training(home.training("good", steps=1))
        assert kinds(await events_of(worker, "good"))[-1] == "succeeded"
        assert kinds(await events_of(worker, "oom"))[-1] == "failed"
        await worker.stop()

    bounded(test())


def test_handing_a_training_over_twice_runs_it_once(home: Home):
    async def test() -> None:
        worker = await home.prepared()
        request = home.training(steps=2)
        await worker.start_training(request)
        await worker.start_training(request)
        assert kinds(await events_of(worker)).count("started") == 1
        await worker.start_training(request)

        request.output_dir += "-2"
        refused = await raised_by(worker.start_training(request))
        assert isinstance(refused, AlreadyExistsError)
        await worker.stop()

    bounded(test())


def test_calls_at_the_wrong_moment_name_it(home: Home):
    async def test() -> None:
        worker = await home.launcher().launch("m", device_map="auto")
        unloaded = await raised_by(worker.prepare(messages.PrepareForTrainingRequest()))
        assert isinstance(unloaded, PreconditionError)
        assert unloaded.reason == ErrorReason.ERROR_REASON_MODEL_NOT_READY
        assert [response async for response in worker.load(LOAD)]
        unprepared = await raised_by(worker.start_training(home.training()))
        assert isinstance(unprepared, PreconditionError)
        assert unprepared.reason == ErrorReason.ERROR_REASON_MODEL_NOT_PREPARED
        assert isinstance(await raised_by(anext(worker.load(LOAD))), PreconditionError)
        assert isinstance(await raised_by(anext(worker.watch("never", 0))), NotFoundError)
        assert isinstance(await raised_by(worker.cancel("never", save_checkpoint=False)), NotFoundError)
        await worker.stop()

    bounded(test())


def test_a_bug_in_a_call_is_internal_and_the_worker_goes_on(home: Home):
    async def test() -> None:
        worker = await home.loaded(model={"prepare": "raise"})
        error = await raised_by(worker.prepare(messages.PrepareForTrainingRequest()))
        assert isinstance(error, UnexpectedError)
        assert error.metadata["error_id"] in home.log_of()
        assert (await worker.status()).model.state == Model.STATE_READY
        await worker.stop()

    bounded(test())


def test_text_streams_and_ends_with_its_summary(home: Home):
    async def test() -> None:
        worker = await home.loaded()
        request = messages.GenerateRequest(request=GenerateRequest(prompt="one two", max_new_tokens=3))

        parts = [part async for part in worker.generate(request)]

        assert [part.text for part in parts[:-1]] == ["one ", "two ", "one "]
        assert parts[-1].summary.completion_tokens == 3
        await worker.stop()

    bounded(test())


def test_a_caller_that_goes_away_stops_its_generation(home: Home, tmp_path: Path):
    async def test() -> None:
        notes = tmp_path / "notes"
        notes.mkdir()
        worker = await home.loaded(model={"token_seconds": 0.005, "notes": str(notes)})
        request = messages.GenerateRequest(request=GenerateRequest(prompt="word", max_new_tokens=60_000))
        stream = worker.generate(request)
        await anext(stream)
        await stream.aclose()

        await until((notes / "generation_cancelled").exists)
        short = messages.GenerateRequest(request=GenerateRequest(prompt="word", max_new_tokens=1))
        assert len([part async for part in worker.generate(short)]) == 2
        await worker.stop()

    bounded(test())
