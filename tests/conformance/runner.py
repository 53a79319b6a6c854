"""Runs one case with one language's adapter: a server, a proxy, the steps, and what is expected of each."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import grpc
import yaml
from google.protobuf.json_format import MessageToDict, ParseDict

from conformance.adapter_process import AdapterProcess
from conformance.certificates import Certificates
from conformance.languages import Language
from conformance.words import handler
from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.cutting_proxy import CuttingProxy
from support.running_server import RunningServer
from support.scripted_server import TRAINING, ScriptedServer
from support.waiting import wait_until
from unslothd.v1.training_event_pb2 import TrainingEvent

Data = dict[str, Any]
# Larger than gRPC lets through by default, and larger than the server does ("{}\n" in base64, again and again).
EIGHT_MEGABYTES = "a long text".ljust(8_000_000, ".")
TWELVE_MEGABYTES = "e30K" * 4_000_000
# Three chunks of an upload.
ROWS = 200_000
_NOT_SENT = {"expect", "save", "at", "stop_at", "do", "until"}


def all_cases() -> list[Data]:
    """Every case of every file in cases/."""
    files = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
    return [case for file in files for case in yaml.safe_load(file.read_text())]


@dataclass
class Surroundings:
    """What a case can use besides its adapter."""

    folder: Path
    proxy: CuttingProxy
    gate: StepGate
    names: Data
    scripted: ScriptedServer | None = None

    def do(self, action: str) -> None:
        """Carries out an action of a case."""
        match action.split():
            case ["cut"]:
                self.proxy.cut()
            case ["open", "all"]:
                self.gate.open_all()
            case ["open", step]:
                self.gate.open(int(step))
            case ["wait", step]:
                wait_until(lambda: self.gate.is_reached(int(step)))
            case _:
                raise ValueError(f"there is no action {action!r}")

    def filled(self, value: Any) -> Any:
        """Returns a value of a case with the names in it replaced."""
        if isinstance(value, dict):
            return {key: self.filled(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self.filled(each) for each in value]
        return Template(value).substitute(self.names) if isinstance(value, str) and "$" in value else value


def run(case: Data, language: Language, server: RunningServer, folder: Path) -> None:
    """Runs a case; fails with the first thing that is not as expected."""
    with surroundings(case, server, folder) as around:
        options = {"target": around.proxy.target, **around.filled(case.get("client", {}))}
        with AdapterProcess(language, options, folder / "adapter.log") as adapter:
            for step in case["steps"]:
                _Step(around.filled(step), adapter, around).run()
        if around.scripted is not None:
            _check_requests(case.get("requests", {}), around.scripted)
            _check_headers(around.filled(case.get("headers", [])), around.scripted)


@contextmanager
def surroundings(case: Data, server: RunningServer, folder: Path) -> Iterator[Surroundings]:
    """Makes what the case needs: a scripted server if it has a script, else the real one; always behind a proxy."""
    with ExitStack() as stack:
        certificates = Certificates(folder / "certificates", server)
        scripted = ScriptedServer(certificates.server(case.get("tls", ""))) if "script" in case else None
        target = server.target if scripted is None else scripted.target
        if scripted is not None:
            stack.callback(scripted.stop)
        gate = StepGate(folder / "gate")
        stack.callback(gate.open_all)  # what a failed case leaves behind runs to its end
        proxy = stack.enter_context(CuttingProxy(target))
        names = {"training": TRAINING, "folder": str(folder)}
        names |= {"eight_megabytes": EIGHT_MEGABYTES, "twelve_megabytes": TWELVE_MEGABYTES}
        names |= certificates.names() if "tls" in case else {}
        around = Surroundings(folder, proxy, gate, names, scripted)
        names["dataset"] = _dataset(case.get("dataset", {}), server, gate, folder)
        (folder / "rows.jsonl").write_text(f'{{"text": "{folder}"}}\n' + '{"text": "a row"}\n' * (ROWS - 1))
        for method, turns in around.filled(case.get("script", {})).items():
            assert scripted is not None
            scripted.script.on(method, *(handler(method, turn) for turn in turns))
        yield around


def _dataset(knobs: Data, server: RunningServer, gate: StepGate, folder: Path) -> str:
    name = f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.jsonl"
    told = {**knobs, "gate": str(gate)} if knobs.get("gate") else knobs
    (server.model_root / name).write_text(fake_row(**told))
    return name


class _Step:
    """One call of a case, from the command to the last thing that is expected of it."""

    def __init__(self, step: Data, adapter: AdapterProcess, around: Surroundings) -> None:
        self._step = step
        self._adapter = adapter
        self._around = around
        self._events: list[TrainingEvent] = []
        self._progress: list[Data] = []

    def run(self) -> None:
        """Makes the call, once or until it has the expected result, and compares."""
        for action in self._step.get("do", ()):
            self._around.do(action)
        if "until" in self._step:
            wait_until(lambda: _matches(self._called()["result"], self._step["expect"]["result"]))
        else:
            self._compare(self._called())

    def _called(self) -> Data:
        self._adapter.send({key: value for key, value in self._step.items() if key not in _NOT_SENT})
        return self._outcome()

    def _compare(self, outcome: Data) -> None:
        expected = self._step.get("expect", {})
        self._check_events(expected)
        what = next((key for key in ("error", "stopped") if key in expected), "result")
        assert what in outcome, f"{self._step['call']}: expected a {what}, got {_short(outcome)}"
        if what == "error":
            _check_error(expected["error"], outcome["error"])
        elif what == "result":
            _contains(outcome["result"], expected.get("result", {}), self._step["call"])
            for name, key in self._step.get("save", {}).items():
                self._around.names[name] = outcome["result"][key]

    def _outcome(self) -> Data:
        while True:
            line = self._adapter.hear()
            if "event" in line:
                event = ParseDict(line["event"], TrainingEvent(), ignore_unknown_fields=True)
                self._events.append(event)
                self._around.names["training"] = event.training_id
                self._react(event.sequence)
            elif "progress" in line:
                self._progress.append(line["progress"])
            elif "text" not in line or len(line) > 1:
                return line
            else:
                self._react("text")

    def _react(self, at: int | str) -> None:
        for action in self._step.get("at", {}).get(at, ()):
            self._around.do(action)
        if self._step.get("stop_at") == at:
            self._adapter.send({"stop": True})

    def _check_events(self, expected: Data) -> None:
        if "progress" in expected:
            assert (len(self._progress) > 0) is expected["progress"], f"progress: {self._progress}"
        if "events" not in expected:
            return
        kinds = [event.WhichOneof("kind") or "unknown" for event in self._events]
        assert kinds == expected["events"], f"events: {kinds}"
        first = expected.get("first_sequence", 1)
        sequences = [event.sequence for event in self._events]
        assert sequences == list(range(first, first + len(kinds))), f"sequences: {sequences}"


def _check_error(expected: Data, error: Data) -> None:
    code = grpc.StatusCode[expected["code"]].value[0]
    assert (error["kind"], error["code"]) == (expected["kind"], code), error
    assert error["reason"] == expected.get("reason", ""), error
    assert sorted(error["fields"]) == sorted(expected.get("fields", [])), error
    if "retry_after" in expected:
        assert error["retry_after"] == expected["retry_after"], error
    for name in expected.get("metadata", []):
        assert name in error["metadata"], error
    for text in expected.get("says", []):
        assert text in error["message"], error


def _check_requests(expected: Data, server: ScriptedServer) -> None:
    for method, wanted in expected.items():
        got = [MessageToDict(each) for each in server.script.calls(method)]
        if wanted == "same":
            assert len(got) > 1, f"{method} was called {len(got)} times"
            assert all(each == got[0] and each.get("requestId") for each in got), f"{method}: {got}"
        else:
            assert len(got) == len(wanted), f"{method}: {got}"
            for one, other in zip(got, wanted, strict=True):
                _contains(one, other, method)


def _check_headers(expected: list[Data], server: ScriptedServer) -> None:
    if expected:
        for got, wanted in zip(server.script.metadata, expected, strict=True):
            _contains(got, wanted, "headers")


def _contains(got: Any, expected: Any, where: str) -> None:
    """Every field that is expected is there, and equal; lists have the same length."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert key in got, f"{where} has no {key}: {_short(got)}"
            _contains(got[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), f"{where}: {_short(got)}"
        for number, (one, other) in enumerate(zip(got, expected, strict=True)):
            _contains(one, other, f"{where}[{number}]")
    else:
        assert got == expected, f"{where}: expected {_short(expected)}, got {_short(got)}"


def _matches(got: Any, expected: Any) -> bool:
    try:
        _contains(got, expected, "")
    except AssertionError:
        return False
    return True


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 500 else f"{text[:500]}… ({len(text)} characters)"
