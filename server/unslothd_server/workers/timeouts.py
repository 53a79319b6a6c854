"""Every bound on a worker's answers, in one block. A worker that does not answer is not dead: these are seconds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerTimeouts:
    """Seconds.

    Args:
        start: From the spawn to the first answer; takes 0.3 s on an idle host.
        import_libraries: From the first answer of a spare until its imports are done; takes 44 s on a slow disk.
        answer: GetStatus, TakeModel, CancelTraining, Shutdown; up to 0.3 s while it trains, more while it imports.
        start_training: Opening the log of a training that may have 100 000 events.
        prepare: Attaching an adapter to the largest model, behind a generation that runs.
        plan: Reading and rendering the largest dataset, and a probe.
        end_in_order: From Shutdown to the end of the process; a training step may have to end first.
        end_on_sigterm: From SIGTERM to the end of the process.
        end_on_sigkill: From SIGKILL to the end of the process; longer only in an uninterruptible driver call.
        death_after_broken_call: From a broken connection until the process is seen to be dead, else it is unresponsive.
    """

    start: float = 60.0
    import_libraries: float = 600.0
    answer: float = 15.0
    start_training: float = 60.0
    prepare: float = 900.0
    plan: float = 3600.0
    end_in_order: float = 30.0
    end_on_sigterm: float = 5.0
    end_on_sigkill: float = 20.0
    death_after_broken_call: float = 5.0
