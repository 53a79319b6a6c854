"""A scripted Engine: no torch, milliseconds a step, and told to misbehave by the knobs of `fake_worker.py`."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

from unslothd.v1.artifact_pb2 import Artifact, ExportProgress
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.generation_pb2 import GenerateSummary
from unslothd.v1.model_pb2 import LoadProgress, Model
from unslothd.v1.service_pb2 import GenerateRequest
from unslothd.v1.training_event_pb2 import (
    Evaluation,
    StepProgress,
    TrainingCancelled,
    TrainingEvent,
    TrainingPreparing,
    TrainingStarted,
    TrainingSucceeded,
    TrainingWarning,
)
from unslothd.v1.training_pb2 import Checkpoint, RenderedRow, TrainingMetrics, TrainingPlan
from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap
from unslothd.worker.v1.worker_service_pb2 import (
    ExportModelRequest,
    LoadModelRequest,
    PlanTrainingRequest,
    PrepareForTrainingRequest,
    StartTrainingRequest,
)
from unslothd_server.errors import DatasetError, ExhaustedError, NotFoundError
from unslothd_server.export_folder import appearing_whole, hashed_files
from unslothd_server.worker.ports import StopSignal, TrainingPaused

TOTAL_PARAMS = 1_000_000
MEMORY_BYTES = 123_456_789
POLL_S = 0.002

Script = dict[str, Any]


class FakeEngine:
    """An engine that follows a script."""

    def __init__(self, import_gate: str = "", model_script: Script | None = None) -> None:
        self._import_gate = import_gate
        self._model_script = model_script or {}
        self._model = Model()
        self._source = ""

    def import_libraries(self) -> dict[str, str]:
        """Waits for the import gate, if there is one."""
        _wait_for_file(self._import_gate)
        return {"unsloth": "fake"}

    def load(
        self, bootstrap: WorkerBootstrap, request: LoadModelRequest, report: Callable[[LoadProgress], None]
    ) -> Model:
        """Loads nothing."""
        self._source = request.source
        self._model_script |= _script_in_folder(Path(request.source))
        report(LoadProgress(phase=LoadProgress.PHASE_LOADING_WEIGHTS))
        _wait_for_file(self._model_script.get("load_gate", ""))
        _misbehave(self._model_script.get("load", ""))
        self._model = Model(
            model_name=request.model_name,
            max_seq_length=request.max_seq_length,
            dtype=request.dtype or "float32",
            device_map=bootstrap.device_map,
            device="cpu",
            total_params=TOTAL_PARAMS,
            full_finetuning=request.full_finetuning,
        )
        return _copy(self._model)

    def prepare(self, request: PrepareForTrainingRequest) -> Model:
        """Attaches nothing; trainable_params is 1000 times the rank."""
        _misbehave(self._model_script.get("prepare", ""))
        lora = request.lora
        lora.r = lora.r if lora.HasField("r") else 16
        lora.lora_alpha = lora.lora_alpha if lora.HasField("lora_alpha") else lora.r
        self._model.lora.CopyFrom(lora)
        self._model.trainable_params = 1000 * lora.r
        return _copy(self._model)

    def train(
        self, request: StartTrainingRequest, emit: Callable[[TrainingEvent], None], stop: StopSignal
    ) -> TrainingSucceeded | TrainingCancelled | TrainingPaused:
        """Follows the script in the first row of train_dataset."""
        return FakeTraining(request, emit, stop).run()

    def plan(self, request: PlanTrainingRequest, cancelled: Event) -> TrainingPlan:
        """Counts the rows; shows as many of them as were asked for."""
        training = request.training
        rows, script = _rows_and_script(training)
        _misbehave(script.get("plan", ""))
        shown = [RenderedRow(text=f"row {number}", num_tokens=2) for number in range(1, rows + 1)]
        plan = TrainingPlan(
            config=training.config,
            num_rows=rows,
            num_tokens=2 * rows,
            total_steps=int(script.get("steps", training.config.max_steps or 3)),
            trainable_params=self._model.trainable_params,
            memory_measured=request.measure,
            preview=shown[: request.preview_rows],
        )
        if request.measure:
            plan.tokens_per_second = 1000.0
        return plan

    def export(
        self, request: ExportModelRequest, report: Callable[[ExportProgress], None], cancelled: Event
    ) -> Artifact:
        """Writes two files of a few bytes, each of which names the source."""
        report(ExportProgress(phase="merging", total=2))
        folder = Path(request.output_dir)
        with appearing_whole(folder) as work:
            (work / "config.json").write_text(json.dumps({"source": self._source, "format": request.format}))
            self._note("exporting")
            _wait_for_file(self._model_script.get("export_gate", ""))
            _misbehave(self._model_script.get("export", ""))
            (work / "model.safetensors").write_bytes(b"exported " * 300_000)
            return Artifact(path=str(folder), files=hashed_files(work), format=request.format)

    def generate(self, request: GenerateRequest, cancelled: Event) -> Iterator[str | GenerateSummary]:
        """Yields the prompt's words back, again and again, up to max_new_tokens of them."""
        words = (request.prompt or request.chat.messages[-1].content).split() or ["…"]
        wanted = request.max_new_tokens if request.HasField("max_new_tokens") else len(words)
        made = 0
        for made in range(1, wanted + 1):
            if cancelled.is_set():
                self._note("generation_cancelled")
                return
            yield words[(made - 1) % len(words)] + " "
            time.sleep(self._model_script.get("token_seconds", 0))
        yield GenerateSummary(prompt_tokens=len(words), completion_tokens=made, finish_reason="length")

    def memory_bytes(self) -> int:
        """Always the same."""
        return MEMORY_BYTES

    def _note(self, what: str) -> None:
        folder = self._model_script.get("notes", "")
        if folder:
            (Path(folder) / what).touch()


class FakeTraining:
    """One scripted training."""

    def __init__(self, request: StartTrainingRequest, emit: Callable[[TrainingEvent], None], stop: StopSignal) -> None:
        self._request = request
        self._emit = emit
        self._stop = stop
        self._rows, self._script = _rows_and_script(request)
        self._steps = int(self._script.get("steps", request.config.max_steps or 3))
        self._first = _first_step(request)
        self._output = Path(request.output_dir)
        self._saved_step = self._first - 1
        self._first_began = 0.0

    def run(self) -> TrainingSucceeded | TrainingCancelled | TrainingPaused:
        """Runs to the end or to the step boundary after a stop."""
        if not self._rows:
            raise DatasetError(ErrorReason.ERROR_REASON_DATASET_EMPTY, "The dataset holds no rows. Give at least one.")
        for number in range(1, int(self._script.get("preparing", 0)) + 1):
            rows = TrainingPreparing(phase=TrainingPreparing.PHASE_READING_ROWS, done=1000 * number)
            self._emit(TrainingEvent(preparing=rows))
        self._output.mkdir(parents=True, exist_ok=True)
        self._start()
        self._fork_children()
        width = int(self._script.get("flood_bytes", 0))
        for number in range(int(self._script.get("flood", 0))):
            self._emit(TrainingEvent(warning=TrainingWarning(reason="FLOOD", message=str(number).zfill(width))))
        for step in range(self._first, self._steps + 1):
            self._wait_gate("gate", step, heeds_stop=True)
            self._keep_pace(step)
            if self._stop.requested.is_set():
                return self._halted(step - 1)
            self._run_step(step)
        if self._stop.requested.is_set():
            return self._halted(self._steps)
        return self._succeeded()

    def _start(self) -> None:
        plan = TrainingPlan(config=self._request.config, num_rows=self._rows, total_steps=self._steps)
        started = TrainingStarted(
            plan=plan,
            engine="fake",
            device="cpu",
            resumed=self._first > 1,
            first_step=self._first,
            tensorboard_dir=str(self._output / "runs"),
        )
        self._emit(TrainingEvent(started=started))

    def _fork_children(self) -> None:
        for _ in range(int(self._script.get("fork", 0))):
            if os.fork() == 0:
                signal.pause()  # like a DataLoader worker that nobody tells about the end
                os._exit(0)

    def _run_step(self, step: int) -> None:
        self._wait_gate("step_gate", step, heeds_stop=False)
        if step == self._script.get("die_at_step") and self._is_to_die():
            _misbehave(self._script.get("die", "SIGKILL"))
        progress = StepProgress(
            step=step,
            total_steps=self._steps,
            epoch=step / self._steps,
            loss=2.0 / step,
            grad_norm=1.0,
            learning_rate=self._request.config.learning_rate,
            tokens=100 * step,
            tokens_per_second=1000.0,
            step_seconds=0.1,
            eta_seconds=0.1 * (self._steps - step),
            memory_bytes=MEMORY_BYTES,
            peak_memory_bytes=MEMORY_BYTES,
        )
        self._emit(TrainingEvent(step=progress))
        if self._request.config.save_steps and step % self._request.config.save_steps == 0:
            self._save(step)
        if self._request.config.eval_steps and step % self._request.config.eval_steps == 0:
            self._emit(TrainingEvent(evaluation=Evaluation(step=step, eval_loss=2.0 / step, perplexity=1.0)))

    def _is_to_die(self) -> bool:
        marker = self._script.get("die_once")
        if marker is None:
            return True
        died_before = Path(marker).exists()
        Path(marker).touch()
        return not died_before

    def _wait_gate(self, knob: str, step: int, *, heeds_stop: bool) -> None:
        if knob not in self._script:
            return
        folder = Path(self._script[knob])
        (folder / f"at-{step}").touch()
        while not ((folder / str(step)).exists() or (folder / "all").exists()):
            if heeds_stop and self._stop.requested.is_set():
                return
            time.sleep(POLL_S)

    def _keep_pace(self, step: int) -> None:
        if step == self._first:
            self._first_began = time.monotonic()
        due = self._first_began + (step - self._first) * float(self._script.get("step_seconds", 0))
        time.sleep(max(0.0, due - time.monotonic()))

    def _save(self, step: int) -> None:
        folder = self._output / f"checkpoint-{step}"
        folder.mkdir(exist_ok=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        checkpoint = Checkpoint(step=step, path=str(folder))
        checkpoint.create_time.GetCurrentTime()
        self._emit(TrainingEvent(checkpoint_saved=checkpoint))
        self._saved_step = step

    def _save_final(self) -> str:
        final = self._output / "final"
        final.mkdir(exist_ok=True)
        (final / "adapter_config.json").write_text("{}")
        return str(final)

    def _halted(self, step: int) -> TrainingCancelled | TrainingPaused:
        if not self._stop.pause:
            return self._cancelled(step)
        if step and self._saved_step != step:
            self._save(step)
        return TrainingPaused(step)

    def _cancelled(self, step: int) -> TrainingCancelled:
        if not self._stop.save_checkpoint or step == 0:
            return TrainingCancelled(step=step)
        if self._saved_step != step:
            self._save(step)
        return TrainingCancelled(step=step, output_dir=self._save_final())

    def _succeeded(self) -> TrainingSucceeded:
        if self._saved_step != self._steps:
            self._save(self._steps)
        metrics = TrainingMetrics(
            train_runtime=0.1 * self._steps, train_loss=1.0, epoch=1.0, train_tokens=100 * self._steps
        )
        return TrainingSucceeded(metrics=metrics, output_dir=self._save_final())


def _misbehave(how: str) -> None:
    if not how:
        return
    print(f"misbehaving as told: {how}", flush=True)
    if how.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[how])
        signal.pause()
    elif how.startswith("exit:"):
        os._exit(int(how.removeprefix("exit:")))
    elif how == "hang":
        Event().wait()
    elif how == "sys.exit":
        sys.exit(7)
    elif how == "raise":
        raise RuntimeError("the secret inside of a bug")
    elif how == "out_of_memory":
        raise ExhaustedError(ErrorReason.ERROR_REASON_OUT_OF_MEMORY, "Out of memory. Take a smaller batch_size.")
    elif how == "disk_full":
        raise ExhaustedError(ErrorReason.ERROR_REASON_DISK_FULL, "The disk is full. Free some space.")
    else:
        raise ValueError(f"the fake engine does not know {how!r}")


def _script_in_folder(source: Path) -> Script:
    path = source / "fake.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _rows_and_script(request: StartTrainingRequest) -> tuple[int, Script]:
    source = request.train_dataset
    if source.WhichOneof("origin") != "path":
        return 1, {}
    path = Path(source.path)
    if not path.is_file():
        raise NotFoundError(
            ErrorReason.ERROR_REASON_DATASET_NOT_FOUND, f"There is no dataset at {path}. Check the path."
        )
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        first = json.loads(lines[0]) if lines and lines[0].startswith("{") else {}
    except ValueError as error:  # not UTF-8, not JSON
        raise DatasetError(ErrorReason.ERROR_REASON_DATASET_ROW, f"Row 1 cannot be used: {error}. Mend it.") from None
    return len(lines), first.get("fake", {})


def _first_step(request: StartTrainingRequest) -> int:
    if not request.resume_from_checkpoint:
        return 1
    state = json.loads((Path(request.resume_from_checkpoint) / "trainer_state.json").read_text())
    return state["global_step"] + 1


def _wait_for_file(path: str) -> None:
    while path and not Path(path).exists():
        time.sleep(POLL_S)


def _copy(model: Model) -> Model:
    copy = Model()
    copy.CopyFrom(model)
    return copy
