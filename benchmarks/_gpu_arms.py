"""The arms of gpu.py: each holds its model in a process of its own, and trains a block of steps when it is told to."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from _common import HERE, Figures, environment, say

from support.calls import load, prepare, train
from support.running_server import RunningServer
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import TrainingConfig

ARM_SECONDS = 900
MAX_SEQ_LENGTH = 2048
# What tuning may spend depends on how long a training is. This one is cancelled after a block.
PLANNED_STEPS = 3000


@dataclass(frozen=True)
class Case:
    """What is trained.

    Args:
        shape: As in random_llama.
        load_in_4bit: 4-bit base weights.
        mixed: Rows of 20 to 1500 words, mean 313 tokens; else every row has the full length.
        steps: Of a block, for each arm; an arm that is not named is left out.
        alone: Tuned passes take what memory is free, so this arm has its turns before the others load their models.
    """

    shape: str
    load_in_4bit: bool
    mixed: bool
    steps: dict[str, int]
    alone: bool = False


@dataclass(frozen=True)
class Arm:
    """One way of training, with its model loaded.

    Args:
        block: Trains so many steps from the first row on.
        warm: Loads again, on a warm worker, and trains a few steps.
    """

    block: Callable[[int], Figures]
    warm: Callable[[], Figures] | None = None


class Script:
    """gpu_script.py in a process of its own, which answers in lines of JSON.

    Args:
        arm: As the program knows it.
        case: Tells whether weights are in 4 bits.
        model: Its folder.
        folder: Where it runs; its log is ARM.log in there.
        more: Further fields of its job.
    """

    def __init__(self, arm: str, case: Case, model: Path, folder: Path, **more: Any) -> None:
        job = {
            "arm": arm,
            "model": str(model),
            "load_in_4bit": case.load_in_4bit,
            "max_seq_length": MAX_SEQ_LENGTH,
            **more,
        }
        self._arm = arm
        self._log = folder / f"{arm}.log"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "gpu_script.py"), json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env=environment(UNSLOTH_DISABLE_STATISTICS="1", HF_HUB_OFFLINE="1"),
            )

    def ask(self, rows: Path, steps: int) -> None:
        """Has it train a block of so many steps, once it has loaded the model."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"rows": str(rows), "steps": steps}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Figures:
        """Waits for its next line; RuntimeError with the end of its log when it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the script {self._arm} ended:\n{self._log.read_text()[-3000:]}")
        return json.loads(line)

    def kill(self) -> None:
        """Ends it, also when it is stopped."""
        self.process.kill()
        self.process.wait()


@contextmanager
def script_arm(arm: str, case: Case, model: Path, rows: Path, folder: Path) -> Iterator[Arm]:
    """Starts a script, which loads while the others do."""
    script = Script(arm, case, model, folder)
    loaded: Figures = {}

    def train_block(steps: int) -> Figures:
        if not loaded:
            loaded.update(script.answer())
        script.ask(rows, steps)
        begin_block = time.time()
        taken = script.answer()
        first_step = taken["at"][0] - begin_block
        return taken | {
            "load_seconds": loaded["load_seconds"],
            "first_step_seconds": first_step,
            # As a user waits: imports included, without the turns of the other arms.
            "load_to_first_step_seconds": loaded["start_to_loaded_seconds"] + first_step,
        }

    try:
        yield Arm(train_block)
    finally:
        script.kill()


@contextmanager
def service_arm(arm: str, case: Case, model: Path, rows: Path, folder: Path) -> Iterator[Arm]:
    """Starts a server, which loads the model while the other arms do; "fixed" trains 2 x 4, "tuned" the defaults."""
    home = folder / f"{arm}-{case.shape}-{case.load_in_4bit}"
    home.mkdir(exist_ok=True)
    # The spare is for the last load; it has long been ready when blocks are timed.
    roots = ("--model-root", str(model.parent), "--model-root", str(rows.parent))
    arguments = (*roots, "--warm-workers", "1" if arm == "tuned" else "0")
    with ExitStack() as stack:
        server = stack.enter_context(RunningServer(home, arguments=arguments))
        stub = server.stub()
        config = training_config(fixed=arm == "fixed")

        def load_and_prepare() -> tuple[str, float, float]:
            begin = time.time()
            loaded = load(
                stub, str(model), max_seq_length=MAX_SEQ_LENGTH, load_in_4bit=case.load_in_4bit, dtype="bfloat16"
            )
            load_seconds = time.time() - begin
            prepare(stub, loaded.model_id, TrainingConfig())
            return loaded.model_id, load_seconds, time.time() - begin

        ready = stack.enter_context(ThreadPoolExecutor()).submit(load_and_prepare)

        def train_block(steps: int) -> Figures:
            model_id, load_seconds, ready_seconds = ready.result()
            block = first_steps(stub, model_id, rows, config, steps)
            return block | {
                "load_seconds": load_seconds,
                "load_to_first_step_seconds": ready_seconds + block["first_step_seconds"],
            }

        def warm() -> Figures:
            stub.UnloadModel(pb.UnloadModelRequest(model_id=ready.result()[0]))
            wait_until(lambda: stub.GetServerInfo(pb.GetServerInfoRequest()).warm_workers > 0, ARM_SECONDS)
            model_id, load_seconds, ready_seconds = load_and_prepare()
            block = first_steps(stub, model_id, rows, config, 2)
            stub.UnloadModel(pb.UnloadModelRequest(model_id=model_id))
            return {
                "warm_load_seconds": load_seconds,
                "warm_load_to_first_step_seconds": ready_seconds + block["first_step_seconds"],
            }

        try:
            yield Arm(train_block, warm if arm == "tuned" else None)
        except BaseException:
            say(server.log.read_text()[-3000:])
            raise


def training_config(*, fixed: bool) -> TrainingConfig:
    """What the arms of unslothd train with; 2 x 4 if fixed, else the defaults."""
    passes = {"batch_size": 2, "gradient_accumulation_steps": 4} if fixed else {}
    return TrainingConfig(
        max_steps=PLANNED_STEPS,
        warmup_steps=2,
        learning_rate=2e-4,
        # The same rates for blocks of any length, so that losses can be compared.
        lr_scheduler_type="constant_with_warmup",
        seed=42,
        save_steps=100_000,
        **passes,
    )


def first_steps(stub: UnslothServiceStub, model_id: str, rows: Path, config: TrainingConfig, steps: int) -> Figures:
    """The first steps of a training; the other arms come and go, so each takes the memory that is free now."""
    begin = time.time()
    events: list[TrainingEvent] = []
    try:
        for event in train(stub, model_id, DatasetSource(path=str(rows)), training_config=config):
            events.append(event)
            if event.HasField("step") and event.step.step == steps:
                stub.CancelTraining(pb.CancelTrainingRequest(training_id=event.training_id))
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.ABORTED or not events[-1].HasField("cancelled"):
            raise
    started = next(event for event in events if event.HasField("started")).started
    taken = [event for event in events if event.HasField("step")][:steps]
    at = [event.event_time.ToNanoseconds() / 1e9 for event in taken]
    return {
        "at": at,
        "losses": [event.step.loss for event in taken],
        "tokens": [event.step.tokens for event in taken],
        "peak_bytes": max(event.step.peak_memory_bytes for event in taken),
        "first_step_seconds": at[0] - begin,
        "passes": _told(started.plan.passes),
        "checkpointing": started.plan.config.use_gradient_checkpointing,
        "config": f"{started.plan.config.batch_size} x {started.plan.config.gradient_accumulation_steps}",
        "estimate_bytes": started.plan.memory_estimate_bytes,
        "warnings": list(started.plan.warnings),
    }


def _told(passes: Any) -> Figures:
    return {
        "max_tokens": passes.max_tokens,
        "joined": passes.joined,
        "checkpointing": passes.use_gradient_checkpointing,
        "step_seconds": round(passes.step_seconds, 4),
        "remembered": passes.remembered,
        "probe_seconds": round(passes.probe_seconds, 1),
        "costs": [str(cost).replace("\n", " ") for cost in passes.costs],
    }
