"""One training while the server knows it: what is on disk, what its watchers see, and what was asked of it."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_event_pb2 import TrainingCancelled, TrainingEvent
from unslothd.v1.training_pb2 import Checkpoint, Training
from unslothd_server.app.event_feed import EventFeed
from unslothd_server.app.ports import Worker
from unslothd_server.app.training_figures import TrainingFigures
from unslothd_server.app.training_state import Recoveries, apply, is_final, now, reset, state_changed
from unslothd_server.app.training_store import StopWish, StoredTraining, TrainingStore
from unslothd_server.errors import NotFoundError, UnslothdError
from unslothd_server.event_log import EventLogReader, EventLogWriter

log = structlog.get_logger()


@dataclass
class TrainingRun:
    """A training.

    Args:
        stored: What `training.json` holds; its `training` is kept up to date with the event log.
        store: Where it is kept.
        feed: Its events for watchers.
        over: Set while it is over or paused.
        worker: The worker that has it; None while none does. Only then the server may write its log.
        recoveries: How often it was repaired since it last got further.
        figures: What it has done so far.
        queued_at: When it last entered the queue, in nanoseconds since 1970.
        unwritten: Events that were shown although the disk did not take them; they go into the log before the next one.
    """

    stored: StoredTraining
    store: TrainingStore
    feed: EventFeed
    over: asyncio.Event = field(default_factory=asyncio.Event)
    worker: Worker | None = None
    recoveries: Recoveries = field(default_factory=Recoveries)
    figures: TrainingFigures = field(default_factory=TrainingFigures)
    queued_at: int = 0
    unwritten: list[TrainingEvent] = field(default_factory=list[TrainingEvent])

    @classmethod
    def of(cls, stored: StoredTraining, store: TrainingStore) -> "TrainingRun":
        """Returns the run of a training on disk, brought up to date by its event log."""
        path = store.event_log(stored.training.training_id)
        run = cls(stored, store, EventFeed(stored.training, path))
        reset(stored.training)  # the log is the truth, not what was last saved beside it
        for entry in EventLogReader(path).read():
            run._apply(entry.event)
        if run.is_halted:
            run.over.set()
        return run

    @property
    def training(self) -> Training:
        """The training as it is now."""
        return self.stored.training

    @property
    def training_id(self) -> str:
        """Its id."""
        return self.stored.training.training_id

    @property
    def is_paused(self) -> bool:
        """True when it stands still until ResumeTraining."""
        return self.training.state == Training.STATE_PAUSED

    @property
    def is_halted(self) -> bool:
        """True when nothing happens by itself any more."""
        return self.is_paused or is_final(self.training)

    @property
    def has_begun(self) -> bool:
        """True once a worker has taken it."""
        return self.training.HasField("start_time")

    @property
    def wish(self) -> StopWish:
        """How it was asked to stop."""
        return self.stored.wish

    def ask(self, wish: StopWish) -> None:
        """Keeps on disk how it is to stop, so that a restart does not forget it. A cancel is not taken back."""
        if self.stored.wish.weight < wish.weight:
            self.stored.wish = wish
            self.keep()

    def halt(self) -> None:
        """Ends or pauses it, as it was asked, while no worker has it."""
        if self.wish.is_cancel:
            self.append(TrainingEvent(cancelled=TrainingCancelled(step=self.training.step)))
        else:
            self.append(state_changed(Training.STATE_PAUSED))
        self.keep()

    def requeue(self, place: int) -> None:
        """Takes back how it was asked to stop; it waits again, behind so many others.

        Raises:
            UnslothdError: The disk takes no more (DISK_FULL, NOT_WRITABLE).
        """
        self.stored.wish = StopWish.NONE
        self.save()  # first: a wish that a restart finds beside QUEUED would be carried out
        self.append(state_changed(Training.STATE_QUEUED, place))

    async def tell_worker(self) -> None:
        """Tells the worker that has it how it is to stop, if it is. Repeatable.

        Raises:
            UnslothdError: The worker is dead or does not answer.
        """
        if self.worker is None or self.wish is StopWish.NONE:
            return
        if self.wish is StopWish.PAUSE:
            await self.worker.pause(self.training_id)
        else:
            await self.worker.cancel(self.training_id, save_checkpoint=self.wish is StopWish.CANCEL_SAVING)

    def checkpoints_on_disk(self) -> list[Checkpoint]:
        """Its checkpoints whose folders are still there, newest first."""
        found = [each for each in self.training.checkpoints if Path(each.path).is_dir()]
        return sorted(found, key=lambda each: each.step, reverse=True)

    def checkpoint(self, step: int = 0) -> Checkpoint:
        """Returns its checkpoint of a step, or the newest (step 0).

        Raises:
            NotFoundError: It is not on disk (CHECKPOINT_NOT_FOUND).
        """
        on_disk = self.checkpoints_on_disk()
        for checkpoint in on_disk:
            if step in {0, checkpoint.step}:
                return checkpoint
        there = ", ".join(str(each.step) for each in reversed(on_disk))
        which = f"of step {step}" if step else "to go on from"
        hint = f"There are those of the steps {there}." if there else "Start it again with Train."
        raise NotFoundError(
            ErrorReason.ERROR_REASON_CHECKPOINT_NOT_FOUND,
            f'Training "{self.training_id}" has no checkpoint {which} on disk. {hint}',
        )

    def newest_weights(self) -> Path | None:
        """Folder of what it has taught its model: the final adapter, else the newest checkpoint; None = nothing yet."""
        final, checkpoints = self.training.output_dir, self.checkpoints_on_disk()
        if final and Path(final).is_dir():
            return Path(final)
        return Path(checkpoints[0].path) if checkpoints else None

    # --- its log ---

    def log_bytes(self) -> int:
        """Size of its event log."""
        try:
            return self.store.event_log(self.training_id).stat().st_size
        except OSError:  # removed by hand
            return 0

    def append(self, event: TrainingEvent) -> None:
        """Writes an event of the server's own; only while no worker has the training.

        Raises:
            UnslothdError: The disk takes no more (DISK_FULL, NOT_WRITABLE). Nothing was shown.
        """
        self._number(event)
        with contextlib.closing(EventLogWriter(self.store.event_log(self.training_id))) as writer:
            while self.unwritten:
                writer.append(self.unwritten[0], fsync=True)
                self.unwritten.pop(0)
            writer.append(event, fsync=True)
        self.take(event)

    def show_unwritten(self, event: TrainingEvent) -> None:
        """Shows an event that the disk does not take, so that watchers and the queue are not kept waiting for it."""
        self._number(event)
        self.unwritten.append(event)
        self.take(event)

    def _number(self, event: TrainingEvent) -> None:
        event.sequence = self.training.last_sequence + 1
        event.training_id = self.training_id
        event.event_time.CopyFrom(now())

    def take(self, event: TrainingEvent) -> None:
        """Shows the next event; one that was shown before is skipped."""
        if event.sequence <= self.training.last_sequence:
            return
        self._apply(event)
        if event.HasField("started"):
            self.stored.resume_at_most = 0  # the checkpoints after the chosen one are gone
        self.feed.publish(event, in_log=not self.unwritten)
        if self.is_halted:
            self.over.set()
        else:
            self.over.clear()

    def _apply(self, event: TrainingEvent) -> None:
        was_queued = self.training.state == Training.STATE_QUEUED
        apply(self.training, event)
        self.recoveries.see(event)
        self.figures.see(event)
        if self.training.state == Training.STATE_QUEUED and not was_queued:
            self.queued_at = event.event_time.ToNanoseconds()

    def catch_up(self) -> None:
        """Takes what a worker that is gone wrote into the log and was not seen."""
        for entry in EventLogReader(self.store.event_log(self.training_id)).read(self.training.last_sequence):
            self.take(entry.event)

    def save(self) -> None:
        """Keeps everything but the log, which keeps itself.

        Raises:
            UnslothdError: The disk takes no more (DISK_FULL, NOT_WRITABLE).
        """
        self.store.save(self.stored)

    def keep(self) -> None:
        """As `save`, where nobody can be refused any more: what cannot be written now is written with the next save."""
        try:
            self.save()
        except (UnslothdError, OSError) as error:
            log.warning("a training's state cannot be written", training_id=self.training_id, error=str(error))
