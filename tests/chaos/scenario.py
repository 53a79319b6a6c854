"""One training of real Unsloth on a tiny model, with a server and workers that are killed as a plan says."""

import contextlib
import hashlib
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import unslothd
from support.running_server import RunningServer
from support.tiny_model import build_tiny_llama
from unslothd.v1.training_pb2 import Training

WAIT_SECONDS = 300.0
# A server is away for a second or two, in which its workers train on: steps have to be slow, and there have to be many,
# or most kills would come after the end.
STEPS_A_KILL = 10
ROWS = [
    {"text": f"The quick brown fox number {number} jumps over {'many ' * (number % 50)}lazy dogs."}
    for number in range(200)
]


@dataclass(frozen=True)
class Kill:
    """Kill one process once the watcher has seen a step.

    Args:
        step: Optimizer step.
        victim: "server" or "worker".
    """

    step: int
    victim: str


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Args:
        losses: Of each step, the last time that it was done.
        adapter: SHA-256 of the adapter's weights.
    """

    losses: tuple[float, ...]
    adapter: str


@dataclass
class Report:
    """One training under kills.

    Args:
        seed: Of the training.
        server_kills: Done while it ran.
        worker_kills: Done while it ran.
        events: In its log.
        recoveries: In its log.
        seconds: From Train to the end.
        problems: What should not be; empty when all is well.
    """

    seed: int
    server_kills: int = 0
    worker_kills: int = 0
    events: int = 0
    recoveries: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def plan_kills(random_source: random.Random, server_kills: int, worker_kills: int) -> list[Kill]:
    """Draws at which steps who is killed."""
    victims = ["server"] * server_kills + ["worker"] * worker_kills
    random_source.shuffle(victims)
    # None in the last steps, which might be over while a server is away.
    last = steps_for(server_kills, worker_kills) - 2 * STEPS_A_KILL
    steps = sorted(random_source.sample(range(1, last), len(victims)))
    return [Kill(step, victim) for step, victim in zip(steps, victims, strict=True)]


def steps_for(server_kills: int, worker_kills: int) -> int:
    """Optimizer steps of a training with so many kills."""
    return STEPS_A_KILL * (server_kills + worker_kills + 4)


class Arena:
    """Folders, a port that every server takes, and the server of the moment.

    Args:
        folder: Empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        build_tiny_llama(folder / "models" / "tiny")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._server = self._start()

    def _start(self) -> RunningServer:
        return RunningServer(self._folder, arguments=("--listen", f"127.0.0.1:{self._port}"))

    @property
    def target(self) -> str:
        """Where every server of this arena listens."""
        return f"127.0.0.1:{self._port}"

    def kill_server(self) -> None:
        """kill -9 for the server, then a new one."""
        self._server.kill()
        self._close_pipe()
        self._server = self._start()

    def kill_worker(self) -> bool:
        """kill -9 for the model's worker; False when there is none at the moment."""
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if "unslothd_server.worker" in command and str(self._folder) in command[-1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                    return True
        return False

    def close(self) -> None:
        """Unloads the models and ends the server."""
        with unslothd.Client(self.target) as client:
            for model in client.list_models():
                client.unload_model(model, force=True)
        self._server.__exit__(None, None, None)

    def show_log(self) -> None:
        """Prints the warnings and errors of all servers; their folder will be gone."""
        print(self._server.errors_in_log(), file=sys.stderr)

    def _close_pipe(self) -> None:
        if self._server.process.stdout is not None:
            self._server.process.stdout.close()

    # --- trainings ---

    def run(self, seed: int, steps: int, kills: list[Kill]) -> tuple[Report, Outcome | None]:
        """Trains, kills on the way, and checks what must hold whatever was killed."""
        report = Report(seed)
        began = time.monotonic()
        with unslothd.Client(self.target, reconnect_timeout=WAIT_SECONDS) as client:
            model = client.load_model("tiny", max_seq_length=128)
            client.prepare(model, lora={"r": 8, "lora_dropout": 0.1}, seed=seed)
            run = client.train(
                model,
                ROWS,
                ROWS[:3],
                max_steps=steps,
                warmup_steps=2,
                learning_rate=5e-3,
                batch_size=4,
                gradient_accumulation_steps=4,
                save_steps=7,
                save_total_limit=3,
                eval_steps=50,
            )
            watcher = _Watcher(run)
            watcher.start()
            for kill in kills:
                if watcher.wait_for_step(kill.step) and not _is_over(client, run.training_id):
                    self._carry_out(kill, report)
                    watcher.forget_steps()  # the next one is killed at work, not while it comes back
            all_along = watcher.finish()
            report.seconds = time.monotonic() - began
            late = list(client.watch(run.training_id))
            outcome = _check(report, steps, all_along, late)
            client.unload_model(model)
        return report, outcome

    def _carry_out(self, kill: Kill, report: Report) -> None:
        if kill.victim == "server":
            self.kill_server()
            report.server_kills += 1
        elif self.kill_worker():
            report.worker_kills += 1


def _is_over(client: unslothd.Client, training_id: str) -> bool:
    """What a watcher sees may be old: after a server's absence it gets many steps at once."""
    return client.get_training(training_id).state in (Training.STATE_SUCCEEDED, Training.STATE_FAILED)


class _Watcher(threading.Thread):
    """Reads a training from its first event to its end, over all that happens to the server."""

    def __init__(self, run: unslothd.TrainingRun) -> None:
        super().__init__(name="watcher", daemon=True)
        self._run = run
        self._events: list[unslothd.TrainingEvent] = []
        self._moved = threading.Condition()
        self._furthest = 0
        self._over = False
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            for event in self._run:
                with self._moved:
                    self._events.append(event)
                    self._furthest = max(self._furthest, event.step.step)
                    self._moved.notify_all()
        except Exception as error:  # noqa: BLE001 - the main thread tells it
            self._error = error
        with self._moved:
            self._over = True
            self._moved.notify_all()

    def forget_steps(self) -> None:
        """Only steps that are seen from now on count."""
        with self._moved:
            self._furthest = 0

    def wait_for_step(self, step: int) -> bool:
        """Returns once the step or a later one was seen; False when the training is over."""
        with self._moved:
            if not self._moved.wait_for(lambda: self._furthest >= step or self._over, WAIT_SECONDS):
                raise TimeoutError(f"step {step} did not come; the last was {self._furthest}")
            return not self._over

    def finish(self) -> list[unslothd.TrainingEvent]:
        self.join(WAIT_SECONDS)
        if self.is_alive():
            raise TimeoutError(f"the training did not end; its last step was {self._furthest}")
        if self._error is not None:
            raise self._error
        return self._events


def _check(
    report: Report, steps: int, all_along: list[unslothd.TrainingEvent], late: list[unslothd.TrainingEvent]
) -> Outcome | None:
    report.events = len(late)
    report.recoveries = sum(event.HasField("recovery") for event in late)
    for who, events in (("all along", all_along), ("late", late)):
        if [event.sequence for event in events] != list(range(1, len(events) + 1)):
            report.problems.append(f"the watcher that came {who} did not see 1 to {len(events)} once each")
    if report.recoveries != report.worker_kills:
        report.problems.append(f"{report.worker_kills} killed workers, but {report.recoveries} recoveries in the log")
    if all_along != late:
        report.problems.append("the two watchers saw different events")
    if not late[-1].HasField("succeeded"):
        report.problems.append(f"it ended with {late[-1].WhichOneof('kind')}")
        return None
    by_step = {event.step.step: event.step.loss for event in late if event.HasField("step")}
    if sorted(by_step) != list(range(1, steps + 1)):
        report.problems.append("steps are missing")
    weights = Path(late[-1].succeeded.output_dir) / "adapter_model.safetensors"
    return Outcome(tuple(by_step[step] for step in sorted(by_step)), hashlib.sha256(weights.read_bytes()).hexdigest())


def campaign(
    folder: Path, *, seed: int, trainings: int, server_kills: int, worker_kills: int, seeds: int
) -> Iterator[Report]:
    """Runs trainings under kills and compares each with an unbroken one of the same seed.

    Args:
        folder: Empty.
        seed: Of the plan; the same seed kills at the same steps.
        trainings: Trainings under kills.
        server_kills: In each training.
        worker_kills: In each training.
        seeds: Different seeds of trainings, each with one unbroken run.
    """
    random_source = random.Random(seed)
    steps = steps_for(server_kills, worker_kills)
    arena = Arena(folder)
    unbroken: dict[int, Outcome | None] = {}
    try:
        for number in range(trainings):
            training_seed = 100 + number % seeds
            if training_seed not in unbroken:
                _, unbroken[training_seed] = arena.run(training_seed, steps, [])
            report, outcome = arena.run(training_seed, steps, plan_kills(random_source, server_kills, worker_kills))
            expected = unbroken[training_seed]
            if outcome is not None and expected is not None:
                if outcome.losses != expected.losses:
                    report.problems.append("the losses are not those of the unbroken run")
                if outcome.adapter != expected.adapter:
                    report.problems.append("the adapter is not that of the unbroken run")
            yield report
    except Exception:
        arena.show_log()
        raise
    finally:
        arena.close()
