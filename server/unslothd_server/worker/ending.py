"""How a worker ends itself: asked by Shutdown, by SIGTERM, or because the folder that it lives in is gone.

Only a training is worth waiting for; an import, a load or a generation is dropped. The process ends by os._exit:
the interpreter's own teardown can hang in CUDA or gRPC, and there is nothing left that it would save.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from threading import Event, Lock, Thread

import grpc

from unslothd_server.worker.exit_record import exit_now
from unslothd_server.worker.holder import ModelHolder
from unslothd_server.worker.layout import BundleLayout
from unslothd_server.worker.training_run import TrainingRun

EXIT_ORPHANED = 3

_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger(__name__)
_LAST_EVENTS_S = 2.0  # for watchers to get the end of a training; an unread one is in the log
_UNREAD_S = 0.3  # for clients to read what their streams ended with: a connection that is closed takes it along
_LAST_ANSWER_S = 0.2  # for the answer of Shutdown; a load under way is dropped after it
_MISSES_BEFORE_ORPHANED = 2  # one failed look may be a hiccup of a network file system


class Ending:
    """Ends the process, once.

    Args:
        holder: Its training is waited for.
        server: Gets a moment to send its last answers.
        bundle: Where the exit record goes.
    """

    def __init__(self, holder: ModelHolder, server: grpc.Server, bundle: BundleLayout) -> None:
        self._holder = holder
        self._server = server
        self._bundle = bundle
        self._lock = Lock()
        self._begun = False

    def begin(self, reason: str, *, save_checkpoint: bool) -> None:
        """Begins to end the process and returns. A training stops at its next step boundary. Repeatable.

        One that stops already does so as it was asked: a pause stays one.
        """
        self._holder.refuse_new_work()
        run = self._holder.active_run()
        if run is not None and not run.stop.requested.is_set():
            run.cancel(save_checkpoint=save_checkpoint)
        with self._lock:
            if self._begun:
                return
            self._begun = True
        _log.info("ending: %s", reason)
        Thread(target=self._end, args=(reason, run), name="ending", daemon=True).start()

    def _end(self, reason: str, run: TrainingRun | None) -> None:
        if run is not None:
            run.wait_over()
            Event().wait(_UNREAD_S)
        self._server.stop(_LAST_ANSWER_S if run is None else _LAST_EVENTS_S).wait()
        exit_now(self._bundle.exit_record, 0, reason)


def end_on_signals(ending: Ending) -> None:
    """Makes SIGTERM and SIGINT end the process in order. Call it on the main thread.

    The signal's number comes through a pipe to a thread of its own, because the main thread may be deep in a kernel
    for a whole step. Forked children get the default handlers back: a pool's terminate() would otherwise hang. They
    are born with the signals blocked, because one that came before that would go through the shared pipe and end the
    worker in place of the child.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in _ENDING_SIGNALS:
        signal.signal(number, _only_wake)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    forking = _Forking()
    os.register_at_fork(before=forking.before, after_in_parent=forking.in_parent, after_in_child=forking.in_child)
    Thread(target=_obey_signals, args=(reader, ending), name="signals", daemon=True).start()


def end_when_orphaned(
    bundle: BundleLayout, server_home: Path, has_lost_server: Callable[[], bool], every_s: float
) -> None:
    """Ends the process and what it forked soon after its folder or the server's home is gone.

    Args:
        bundle: Its folder.
        server_home: Home of the server.
        has_lost_server: True when it cannot live without its server, and that is gone.
        every_s: Seconds between two looks.
    """
    identity = _identity(bundle.lock)

    def is_orphaned() -> bool:
        return _identity(bundle.lock) != identity or not server_home.is_dir() or has_lost_server()

    Thread(target=_watch_home, args=(bundle, is_orphaned, every_s), name="orphan", daemon=True).start()


def _only_wake(_number: int, _frame: object) -> None:
    """Does nothing: the wake-up descriptor has the number already."""


class _Forking(threading.local):
    """What happens to signals around a fork, for each thread that forks."""

    _mask: set[signal.Signals | int]

    def before(self) -> None:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING_SIGNALS)

    def in_parent(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def in_child(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in _ENDING_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)


def _obey_signals(reader: int, ending: Ending) -> None:
    while True:
        number = os.read(reader, 1)[0]
        if number in _ENDING_SIGNALS:
            ending.begin(f"asked by {signal.Signals(number).name}", save_checkpoint=False)


def _watch_home(bundle: BundleLayout, is_orphaned: Callable[[], bool], every_s: float) -> None:
    never = Event()
    misses = 0
    while misses < _MISSES_BEFORE_ORPHANED:
        never.wait(every_s)
        misses = misses + 1 if is_orphaned() else 0
    _log.error("ending: the server of %s, its home or this folder is gone", bundle.directory)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # with everything that was forked: nobody else is left to end it
    os._exit(EXIT_ORPHANED)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
