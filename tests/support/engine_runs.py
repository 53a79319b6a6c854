"""Short words for what the engine's tests do: load, prepare, train, and look at what was told."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unslothd.v1.dataset_pb2 import DatasetSource, RowFormat
from unslothd.v1.model_pb2 import LoadProgress, LoraConfig, Model
from unslothd.v1.training_event_pb2 import TrainingCancelled, TrainingEvent, TrainingSucceeded
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap
from unslothd.worker.v1.worker_service_pb2 import LoadModelRequest, PrepareForTrainingRequest, StartTrainingRequest
from unslothd_server.engine.unsloth_engine import UnslothEngine
from unslothd_server.worker.ports import StopSignal, TrainingPaused

Row = dict[str, Any]


@dataclass
class Loaded:
    """An engine with a model, and short words for what tests do with it."""

    engine: UnslothEngine
    model: Model
    progress: list[LoadProgress]
    folder: Path

    def prepare(
        self,
        lora: LoraConfig | None = None,
        *,
        seed: int = 7,
        checkpointing: bool = False,
        weights_from: Path | None = None,
    ) -> Model:
        request = PrepareForTrainingRequest(seed=seed, use_gradient_checkpointing=checkpointing)
        request.weights_from = "" if weights_from is None else str(weights_from)
        if lora is not None:
            request.lora.CopyFrom(lora)
        return self.engine.prepare(request)

    def train(self, rows: list[Row] | Path, config: TrainingConfig | None = None, **options: Any) -> "Run":
        return train(self, rows, config or TrainingConfig(max_steps=2, warmup_steps=0), **options)

    @property
    def torch_model(self) -> Any:
        return self.engine._loaded.model  # type: ignore[union-attr]

    @property
    def tokenizer(self) -> Any:
        return self.engine._loaded.tokenizer  # type: ignore[union-attr]


@dataclass
class Run:
    """What a training did."""

    output_dir: Path
    events: list[TrainingEvent] = field(default_factory=list)
    result: TrainingSucceeded | TrainingCancelled | TrainingPaused | None = None
    kinds: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Any]:
        return [getattr(event, kind) for event in self.events if event.WhichOneof("kind") == kind]

    @property
    def plan(self) -> Any:
        return self.of("started")[0].plan

    @property
    def warnings(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for warning in self.of("warning"):
            found.setdefault(warning.reason, []).append(warning.message)
        return found

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.of("step")]


@dataclass
class Told:
    """Everything that several runs of one training told, but for times and memory."""

    steps: list[tuple[float, ...]]
    evaluations: list[tuple[float, ...]]

    @classmethod
    def by(cls, *runs: Run) -> "Told":
        steps = [step for run in runs for step in run.of("step")]
        evaluations = [evaluation for run in runs for evaluation in run.of("evaluation")]
        return cls(
            [(s.step, s.epoch, s.loss, s.grad_norm, s.learning_rate, s.tokens, s.total_steps) for s in steps],
            [(e.step, e.eval_loss, e.best) for e in evaluations],
        )

    def after(self, step: int) -> "Told":
        return Told([s for s in self.steps if s[0] > step], [e for e in self.evaluations if e[0] > step])


def weights(run: Run) -> str:
    """A sum over what a training learnt."""
    (file,) = (run.output_dir / "final").glob("*model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


LoadTiny = Callable[..., Loaded]
# Whether the input ids of a pass fit into the memory that is played.
Fits = Callable[[Loaded, Any], bool]


@contextmanager
def memory(loaded: Loaded, fits: Fits) -> Iterator[None]:
    """Raises what a GPU raises for passes with gradients that do not fit."""
    import torch

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if torch.is_grad_enabled() and not fits(loaded, ids):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    hook = loaded.torch_model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def load(source: Path | str, folder: Path, **options: Any) -> Loaded:
    """Loads a model into an engine of its own; what it trains goes below `folder`."""
    engine = UnslothEngine()
    progress: list[LoadProgress] = []
    options = {"max_seq_length": 128, "seed": 3, **options}
    request = LoadModelRequest(model_name="tiny", source=str(source), **options)
    bootstrap = WorkerBootstrap(device_map="auto", cache_dir=str(folder / "cache"))
    model = engine.load(bootstrap, request, progress.append)
    return Loaded(engine, model, progress, folder)


def train(
    loaded: Loaded,
    rows: list[Row] | Path,
    config: TrainingConfig,
    *,
    eval_rows: list[Row] | None = None,
    row_format: RowFormat | None = None,
    name: str = "out",
    stop: StopSignal | None = None,
    on_event: Callable[[TrainingEvent, StopSignal], None] | None = None,
    resume_from: Path | None = None,
    fallbacks: Sequence[Path] = (),
) -> Run:
    stop = stop or StopSignal(threading.Event())
    run = Run(loaded.folder / name)

    def emit(event: TrainingEvent) -> None:
        run.events.append(event)
        # Only a clock decides whether and how often a preparation is told.
        if not event.HasField("preparing"):
            run.kinds.append(str(event.WhichOneof("kind")))
        if on_event is not None:
            on_event(event, stop)

    training_dir = loaded.folder / "trainings" / name
    training_dir.mkdir(parents=True, exist_ok=True)
    request = StartTrainingRequest(
        training_id=name,
        training_dir=str(training_dir),
        config=config,
        train_dataset=as_source(loaded.folder / f"{name}-rows.jsonl", rows, row_format),
        output_dir=str(run.output_dir),
        resume_from_checkpoint="" if resume_from is None else str(resume_from),
        fallback_checkpoints=map(str, fallbacks),
    )
    if eval_rows is not None:
        request.eval_dataset.CopyFrom(as_source(loaded.folder / f"{name}-eval.jsonl", eval_rows, row_format))
    run.result = loaded.engine.train(request, emit, stop)
    return run


def as_source(path: Path, rows: list[Row] | Path, row_format: RowFormat | None) -> DatasetSource:
    if isinstance(rows, Path):
        path = rows
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = DatasetSource(path=str(path))
    if row_format is not None:
        source.row_format.CopyFrom(row_format)
    return source
