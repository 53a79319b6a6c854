"""A run of the fuzzer against a real server with scripted workers: many calls at a time, each judged."""

import asyncio
import itertools
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from fuzz.calls import Call, Caller, CallMaker, Outcome, as_text
from fuzz.health import Health
from fuzz.words import MODELS, ROWS, Known
from support.running_server import RunningServer
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

AT_A_TIME = 24
MAX_TRAININGS = 25  # a server keeps every training: after so many, requests are such that none is added
_LOOK_EVERY = 500
_PLENTY = 40
_OVERTAKEN = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
)
_SOURCES = str(Path(__file__).parents[2] / "server")
_MAX_FINDINGS = 20
# One heap for all threads, given back at once: what grows then is what is kept.
_STEADY_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass
class Report:
    """What a run found.

    Args:
        seed: Of the run.
        requests: Made.
        seconds: Taken.
        outcomes: Count of each (RPC, code, reason).
        kinds: Count of each kind of request.
        findings: What was not as promised, with the call; the first ones of each sort.
        bytes_a_request: Slope of the server's memory after the first quarter.
        files_before: Open files of the server before the run.
        files_after: And after it.
        exit_code: Of the server, ended in the ordinary way afterwards.
    """

    seed: int
    requests: int = 0
    seconds: float = 0.0
    outcomes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    bytes_a_request: float = 0.0
    files_before: int = 0
    files_after: int = 0
    exit_code: int | None = None


def run(folder: Path, *, seed: int, requests: int) -> Report:
    """Starts a server in `folder`, makes the requests, ends it, and returns what was found."""
    arguments = ("--max-loaded-models", "3")
    with RunningServer(folder, fake_workers=True, arguments=arguments, environment=_STEADY_MEMORY) as server:
        _furnish(server)
        try:
            report = asyncio.run(_Run(server, seed, requests).whole())
        except BaseException:
            print(server.errors_in_log(), file=sys.stderr)  # the folder goes, and with it what explains error ids
            raise
        report.exit_code = server.stop()
    return report


def _furnish(server: RunningServer) -> None:
    """Models, rows, and what must not be reached: links out of the roots, a pipe, a loop, a pickle."""
    root = server.model_root
    for name in MODELS:
        (root / name).mkdir()
        (root / name / "config.json").write_text("{}")
    (root / ROWS).write_text('{"text": "some text"}\n')
    (root / "rows.pkl").write_bytes(b"\x80\x04.")
    (root / "loop").symlink_to("loop")
    secret = root.parent / "secret"
    secret.mkdir()
    (secret / ROWS).write_text('{"text": "the secret"}\n')
    (root / "outside").symlink_to(secret)
    os.mkfifo(root / "pipe.jsonl")


class _Run:
    def __init__(self, server: RunningServer, seed: int, requests: int) -> None:
        self._server = server
        self._requests = requests
        self._known = Known()
        self._maker = CallMaker(seed, self._known)
        self._health = Health(server.process.pid)
        self._numbers = itertools.count()
        self._sorts: Counter[str] = Counter()
        self.report = Report(seed)

    async def whole(self) -> Report:
        started = time.monotonic()
        async with grpc.aio.insecure_channel(self._server.target) as channel:
            stub = UnslothServiceStub(channel)  # type: ignore[no-untyped-call]
            await self._keep_models(stub)
            self._health.look(0)
            caller = Caller(channel, (_SOURCES, str(self._server.home)))
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_A_TIME):
                    group.create_task(self._work(caller, stub))
            await self._settle(stub)
        self._health.look(self.report.requests)
        samples = self._health.samples
        self.report.seconds = time.monotonic() - started
        self.report.bytes_a_request = self._health.bytes_a_request(since=self._requests // 4)
        self.report.files_before, self.report.files_after = samples[0].files, samples[-1].files
        return self.report

    async def _work(self, caller: Caller, stub: UnslothServiceStub) -> None:
        while (number := next(self._numbers)) < self._requests:
            call = self._maker.make(number)
            outcome = await caller.make(call)
            self._note(call, outcome)
            if self.report.requests % _LOOK_EVERY == 0:
                self._health.look(self.report.requests)
                await self._keep_models(stub)

    def _note(self, call: Call, outcome: Outcome) -> None:
        report = self.report
        report.requests += 1
        report.kinds[call.kind] += 1
        report.outcomes[call.method.name, outcome.code, outcome.reason] += 1
        for problem in outcome.problems:
            sort = f"{call.method.name} {outcome.code} {outcome.reason}"
            self._sorts[sort] += 1
            if self._sorts[sort] <= 2 and len(report.findings) < _MAX_FINDINGS:
                report.findings.append(f"seed {report.seed}, request {call.number}: {problem}\n  {as_text(call)}")
        self._learn(outcome)

    def _learn(self, outcome: Outcome) -> None:
        """Ids of what there is, so that later requests can name it."""
        match outcome.answer:
            case pb.UploadDatasetResponse(dataset=dataset):
                _add(self._known.datasets, dataset.dataset_id)
            case pb.ExportModelResponse(artifact=artifact) if artifact.artifact_id:
                _add(self._known.artifacts, artifact.artifact_id)
            case pb.ListTrainingsResponse(trainings=trainings):
                for training in trainings:
                    _add(self._known.trainings, training.training_id)
            case _:
                pass

    async def _keep_models(self, stub: UnslothServiceStub) -> None:
        """There is a prepared model again when requests have unloaded it; and it is known what else there is."""
        models = (await stub.ListModels(pb.ListModelsRequest(), timeout=60)).models
        if not models:
            try:
                await self._load_models(stub)
            except grpc.RpcError as error:
                # Another request has unloaded one meanwhile, or loaded others; the next look loads it again.
                if error.code() not in _OVERTAKEN:
                    raise
        self._known.models[:] = [model.model_id for model in models] or self._known.models
        stored = (await stub.ListTrainings(pb.ListTrainingsRequest(page_size=1000), timeout=60)).trainings
        if self._known.may_store and len(stored) >= MAX_TRAININGS:
            self._known.may_store = False

    async def _load_models(self, stub: UnslothServiceStub) -> None:
        loaded: list[str] = []
        for name in MODELS:
            async for response in stub.LoadModel(pb.LoadModelRequest(model_name=name), timeout=60):
                if response.HasField("model"):
                    loaded.append(response.model.model_id)
        self._known.models.extend(loaded)
        await stub.PrepareForTraining(pb.PrepareForTrainingRequest(model_id=loaded[0]), timeout=60)

    async def _settle(self, stub: UnslothServiceStub) -> None:
        """Ends what runs, so that the last look sees a server at rest."""
        for training in (await stub.ListTrainings(pb.ListTrainingsRequest(page_size=1000), timeout=60)).trainings:
            await stub.CancelTraining(pb.CancelTrainingRequest(training_id=training.training_id), timeout=60)
            if training.state != training.STATE_PAUSED:
                async for _ in stub.WatchTraining(
                    pb.WatchTrainingRequest(training_id=training.training_id), timeout=60
                ):
                    pass


def _add(names: list[str], name: str) -> None:
    if name not in names and len(names) < _PLENTY:
        names.append(name)
