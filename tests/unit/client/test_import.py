"""The package is light, its public names are fixed, and flows run without any connection."""

import json
import subprocess
import sys

import grpc
import pytest

import unslothd
from unslothd import _flows, _operations, errors
from unslothd._retry import Peer, Retry
from unslothd.v1 import service_pb2, training_event_pb2

HEAVY = [
    "torch",
    "unsloth",
    "transformers",
    "datasets",
    "pandas",
    "pyarrow",
    "numpy",
    "rich",
    "typer",
    "unslothd_server",
]


def modules_after(code: str) -> tuple[set[str], float]:
    program = (
        "import json, sys, time; begin = time.perf_counter()\n"
        f"{code}\n"
        "print(json.dumps([sorted(sys.modules), time.perf_counter() - begin]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    modules, seconds = json.loads(done.stdout)
    return set(modules), seconds


def test_importing_the_package_takes_less_than_0_4_seconds():
    assert min(modules_after("import unslothd")[1] for _ in range(3)) < 0.4


def test_using_the_client_imports_nothing_heavy():
    modules, _ = modules_after("import unslothd; unslothd.Client('127.0.0.1:1').stub; unslothd.dataset([{'a': 1}])")
    assert not modules & set(HEAVY)
    assert "grpc" in modules


def test_the_contract_alone_does_not_import_the_client():
    modules, _ = modules_after("import unslothd.v1.training_pb2")
    assert not {"unslothd._client", "grpc"} & modules


def test_the_public_names_are_these():
    assert unslothd.__all__ == [
        "Artifact",
        "AsyncClient",
        "AsyncTextStream",
        "AsyncTrainingRun",
        "Client",
        "Dataset",
        "DatasetLike",
        "DownloadProgress",
        "ExportProgress",
        "Finding",
        "GenerationOptions",
        "HubDataset",
        "LoadOptions",
        "LoadProgress",
        "LoraConfig",
        "LoraOptions",
        "Model",
        "ReceiptError",
        "ServerPath",
        "TextStream",
        "Training",
        "TrainingCancelled",
        "TrainingConfig",
        "TrainingEvent",
        "TrainingFailed",
        "TrainingMetrics",
        "TrainingOptions",
        "TrainingPlan",
        "TrainingRun",
        "UnslothdError",
        "UploadProgress",
        "UploadedDataset",
        "__version__",
        "dataset",
        "errors",
        "read_receipt",
        "row_format",
        "verify_receipt",
    ]
    for name in unslothd.__all__:
        assert getattr(unslothd, name) is not None
    assert set(unslothd.__all__) <= set(dir(unslothd))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        unslothd.Klient  # noqa: B018 - the access is under test


def test_both_clients_have_the_same_methods():
    sync = {name for name in dir(unslothd.Client) if not name.startswith("_")}
    assert sync == {name for name in dir(unslothd.AsyncClient) if not name.startswith("_")}


def lost() -> errors.Unavailable:
    return errors.Unavailable("gone", code=grpc.StatusCode.UNAVAILABLE)


def test_delays_grow_up_to_5_seconds_and_end_at_the_timeout():
    now = [0.0]
    retry = Retry(Peer(heard=True), 20.0, clock=lambda: now[0], jitter=lambda: 1.0)
    delays = []
    for _ in range(9):
        delays.append(retry.next_delay(lost()))
        now[0] += delays[-1]
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 3.7])
    now[0] = 20.0
    with pytest.raises(errors.Unavailable):
        retry.next_delay(lost())


def test_progress_starts_the_count_again():
    now = [0.0]
    retry = Retry(Peer(heard=True), 1.0, clock=lambda: now[0], jitter=lambda: 1.0)
    retry.next_delay(lost())
    now[0] = 0.9
    retry.progress()
    now[0] = 1.5
    assert retry.next_delay(lost()) == pytest.approx(0.1)


def test_a_server_that_never_answered_is_given_up_sooner():
    now = [0.0]
    retry = Retry(Peer(), 100.0, first_contact=2.0, clock=lambda: now[0])
    retry.next_delay(lost())
    now[0] = 2.5
    with pytest.raises(errors.Unavailable):
        retry.next_delay(lost())


def test_a_flow_says_what_to_do_and_does_nothing_itself():
    retry = Retry(Peer(), 10.0, jitter=lambda: 1.0)
    cursor = _flows.Cursor("t", 7)
    flow = _flows.watch(cursor, retry, 3.0)
    opened = next(flow)
    assert isinstance(opened, _operations.OpenStream)
    assert opened.request == service_pb2.WatchTrainingRequest(
        training_id="t", after_sequence=7, max_events=_flows.EVENTS_A_RESPONSE
    )
    assert flow.send(None) == _operations.Next()
    assert flow.throw(lost()) == _operations.Sleep(0.1)
    assert isinstance(flow.send(None), _operations.OpenStream)


def test_a_response_of_several_events_is_read_as_one_after_the_other():
    flow = _flows.watch(_flows.Cursor("t", 7), Retry(Peer(), 10.0), 3.0)
    assert isinstance(next(flow), _operations.OpenStream)
    assert flow.send(None) == _operations.Next()
    several = [training_event_pb2.TrainingEvent(sequence=sequence) for sequence in (7, 8, 9)]
    assert flow.send(service_pb2.WatchTrainingResponse(events=several)) == _operations.Emit(several[1])
    assert flow.send(None) == _operations.Emit(several[2])
    assert flow.send(None) == _operations.Next()
    one = training_event_pb2.TrainingEvent(sequence=10)
    assert flow.send(service_pb2.WatchTrainingResponse(event=one)) == _operations.Emit(one)
