"""Uploads over gRPC: whole or not at all, checked on the way, stored once, kept while they are needed."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, CallError, error_of, prepared_model, train, watch
from support.running_server import RunningServer
from support.uploads import FORMATS, as_arrow, as_jsonl, as_parquet, chunks, header, id_of, upload
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.dataset_pb2 import DataFormat, DatasetSource
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import TrainingConfig

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(250)]
JSONL, CSV = DataFormat.DATA_FORMAT_JSONL, DataFormat.DATA_FORMAT_CSV
ARROW, PARQUET = DataFormat.DATA_FORMAT_ARROW_STREAM, DataFormat.DATA_FORMAT_PARQUET


def rows_of(word: str) -> bytes:
    """JSONL that no other test has."""
    return as_jsonl([{"text": f"{word} {number}"} for number in range(3)])


def refused(
    stub: UnslothServiceStub, data: bytes, data_format: DataFormat.ValueType = JSONL, **fields: str
) -> CallError:
    return error_of(lambda: upload(stub, data, data_format, **fields))


def folders(server: RunningServer) -> set[str]:
    return {path.name for path in (server.home / "datasets").iterdir()}


@pytest.fixture
def nothing_stays(server: RunningServer) -> Iterator[None]:
    """The test leaves no folder and no process behind that was not there before."""
    before = folders(server)
    yield
    assert folders(server) == before
    commands = [" ".join(child.cmdline()) for child in psutil.Process(server.process.pid).children(recursive=True)]
    assert not [command for command in commands if "row_check" in command]


# --- what is stored ---


@pytest.mark.parametrize("data_format", FORMATS)
def test_rows_of_every_format_are_stored_as_they_were_sent(
    data_format: DataFormat.ValueType, server: RunningServer, stub: UnslothServiceStub
):
    data = FORMATS[data_format](ROWS)
    response = upload(stub, data, data_format, name="questions", size=1000)
    dataset = response.dataset
    assert not response.already_present
    assert (dataset.dataset_id, dataset.name, dataset.format) == (id_of(data), "questions", data_format)
    assert (dataset.num_rows, dataset.num_bytes) == (250, len(data))
    assert list(dataset.columns) == ["prompt", "completion"]
    (rows,) = (server.home / "datasets" / dataset.dataset_id.removeprefix("sha256:")).glob("rows.*")
    assert rows.read_bytes() == data
    assert stub.GetDataset(pb.GetDatasetRequest(dataset_id=dataset.dataset_id)).dataset == dataset


def test_a_table_of_40_mib_arrives_whole(stub: UnslothServiceStub):
    data = as_arrow([{"text": f"{number} " + "lorem ipsum " * 80} for number in range(44_000)], batch_rows=5000)
    assert len(data) > 40 * 1024 * 1024
    dataset = upload(stub, data, ARROW, sha256=hashlib.sha256(data).hexdigest()).dataset
    assert (dataset.num_rows, dataset.num_bytes, dataset.dataset_id) == (44_000, len(data), id_of(data))


def test_known_bytes_are_answered_at_once_without_a_chunk(stub: UnslothServiceStub):
    data = rows_of("known")
    first = upload(stub, data, name="first").dataset
    waiting = threading.Event()

    def only_a_header() -> Iterator[pb.UploadDatasetRequest]:
        yield header(sha256=hashlib.sha256(data).hexdigest(), name="second")
        assert waiting.wait(CALL_SECONDS)

    response = stub.UploadDataset(only_a_header(), timeout=CALL_SECONDS)
    waiting.set()
    assert (response.dataset, response.already_present) == (first, True)


def test_known_bytes_are_answered_while_a_client_still_sends(stub: UnslothServiceStub):
    data = b"".join(rows_of(f"still sends {number}") for number in range(50_000))
    upload(stub, data)
    sha256 = hashlib.sha256(data).hexdigest()
    assert all(upload(stub, data, sha256=sha256).already_present for _ in range(20))


def test_equal_bytes_sent_twice_at_the_same_time_are_stored_once(stub: UnslothServiceStub):
    data = rows_of("twice")
    both_sent = threading.Barrier(2)

    def send() -> pb.UploadDatasetResponse:
        def requests() -> Iterator[pb.UploadDatasetRequest]:
            yield header()
            yield from chunks(data)
            both_sent.wait(CALL_SECONDS)

        return stub.UploadDataset(requests(), timeout=CALL_SECONDS)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: send(), range(2))
    assert one.dataset == other.dataset
    assert sorted([one.already_present, other.already_present]) == [False, True]


def test_bytes_that_are_stored_in_another_format_are_not_stored_again(stub: UnslothServiceStub):
    data = b'{"a":1}\n{"b":2}\n'  # also a CSV of one column
    assert upload(stub, data).dataset.num_rows == 2
    error = refused(stub, data, CSV)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "DATASET_DAMAGED")
    assert "jsonl" in error.message


# --- what is refused ---


@pytest.mark.usefixtures("nothing_stays")
def test_a_lying_sha256_is_refused(stub: UnslothServiceStub):
    error = refused(stub, rows_of("a lie"), sha256="0" * 64)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "DATASET_DAMAGED")
    assert "upload them again" in error.message


@pytest.mark.usefixtures("nothing_stays")
def test_one_bad_line_in_a_million_is_named(stub: UnslothServiceStub):
    lines = [b'{"text":"good"}'] * 1_000_000
    lines[765_432] = b'{"text":"bad'
    error = refused(stub, b"\n".join(lines))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "DATASET_ROW")
    assert (error.fields, error.metadata) == (["rows[765433]"], {"row": "765433"})
    assert "row 765433" in error.message


@pytest.mark.usefixtures("nothing_stays")
def test_the_first_20_bad_rows_are_named_and_the_rest_is_not_waited_for(stub: UnslothServiceStub):
    bad = b'{"text": 1}\n' + b"no JSON: \xff\xc3\xa9\n" * 30
    never = threading.Event()

    def endless() -> Iterator[pb.UploadDatasetRequest]:
        yield header()
        yield pb.UploadDatasetRequest(chunk=bad)
        while not never.wait(0.01):
            yield pb.UploadDatasetRequest(chunk=b"[]\n")

    error = error_of(lambda: stub.UploadDataset(endless(), timeout=CALL_SECONDS))
    never.set()
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "DATASET_ROW")
    assert error.fields == [f"rows[{number}]" for number in range(2, 22)]


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


DAMAGED = {
    "half a Parquet file": (lambda: _half(as_parquet(ROWS)), PARQUET, "cut off"),
    "half an Arrow stream": (lambda: _half(as_arrow(ROWS)), ARROW, "cut off"),
    "JSONL called Parquet": (lambda: as_jsonl(ROWS), PARQUET, "no Parquet file"),
    "JSONL called Arrow": (lambda: as_jsonl(ROWS), ARROW, "no Arrow IPC stream"),
    "Parquet called JSONL": (lambda: as_parquet(ROWS), JSONL, "a Parquet file"),
}


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_data_is_refused_with_what_to_do(name: str, stub: UnslothServiceStub):
    make, data_format, word = DAMAGED[name]
    error = refused(stub, make(), data_format)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "DATASET_DAMAGED")
    assert word in error.message


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("data_format", FORMATS)
def test_data_without_a_byte_is_empty(data_format: DataFormat.ValueType, stub: UnslothServiceStub):
    error = refused(stub, b"", data_format)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "DATASET_EMPTY")


MISUSED: dict[str, tuple[Callable[[], list[pb.UploadDatasetRequest]], str]] = {
    "no message": (list, "header"),
    "a chunk before the header": (lambda: [*chunks(b"{}"), header()], "header"),
    "two headers": (lambda: [header(), *chunks(b"{}"), header()], "header"),
    "an empty message": (lambda: [header(), pb.UploadDatasetRequest()], "part"),
    "a chunk of 2 MiB": (lambda: [header(), *chunks(b" " * 2 * 1024 * 1024, 2 * 1024 * 1024)], "chunk"),
    "no format": (lambda: [header(DataFormat.DATA_FORMAT_UNSPECIFIED)], "header.format"),
    "a sha256 that is none": (lambda: [header(sha256="abc")], "header.sha256"),
}


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("name", MISUSED)
def test_misuse_of_the_stream_names_the_field(name: str, stub: UnslothServiceStub):
    make, field = MISUSED[name]
    error = error_of(lambda: stub.UploadDataset(iter(make()), timeout=CALL_SECONDS))
    assert (error.code, error.reason, error.fields) == ("INVALID_ARGUMENT", "INVALID_FIELD", [field])


def test_a_dataset_beyond_the_limit_is_refused_with_the_limit(tmp_path: Path):
    limit = 3 * 1024 * 1024
    with RunningServer(tmp_path, fake_workers=True, environment={"UNSLOTHD_MAX_DATASET_BYTES": str(limit)}) as server:
        stub = server.stub()
        assert stub.GetServerInfo(pb.GetServerInfoRequest()).limits.max_dataset_bytes == limit
        error = refused(stub, b'{"a": 1}\n' * (limit // 8))
        assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "DATASET_TOO_LARGE")
        assert error.metadata == {"max_bytes": str(limit)}
        assert folders(server) == set()


# --- what breaks off ---


@pytest.mark.usefixtures("nothing_stays")
def test_a_cancelled_upload_leaves_nothing(server: RunningServer, stub: UnslothServiceStub):
    before = folders(server)
    go_on, sent = threading.Event(), threading.Event()

    def stuck() -> Iterator[pb.UploadDatasetRequest]:
        yield header()
        yield pb.UploadDatasetRequest(chunk=rows_of("cancelled"))
        sent.set()
        go_on.wait(CALL_SECONDS)

    call = stub.UploadDataset.future(stuck(), timeout=CALL_SECONDS)
    assert sent.wait(CALL_SECONDS)
    wait_until(lambda: folders(server) != before)
    call.cancel()
    go_on.set()
    wait_until(lambda: folders(server) == before)
    assert error_of(lambda: get(stub, id_of(rows_of("cancelled")))).reason == "DATASET_NOT_FOUND"


@pytest.mark.usefixtures("nothing_stays")
def test_an_upload_whose_client_dies_leaves_nothing(server: RunningServer):
    before = folders(server)
    with server.channel() as channel:
        go_on = threading.Event()

        def stuck() -> Iterator[pb.UploadDatasetRequest]:
            yield header()
            yield pb.UploadDatasetRequest(chunk=rows_of("dies"))
            go_on.wait(CALL_SECONDS)

        call = UnslothServiceStub(channel).UploadDataset.future(stuck())
        wait_until(lambda: folders(server) != before)
        assert not call.done()
    go_on.set()
    wait_until(lambda: folders(server) == before)


def test_what_a_killed_server_left_half_done_is_gone_at_the_next_start(tmp_path: Path):
    kept = rows_of("kept")
    with RunningServer(tmp_path, fake_workers=True) as server:
        stub = server.stub()
        dataset = upload(stub, kept, name="kept").dataset
        go_on = threading.Event()

        def stuck() -> Iterator[pb.UploadDatasetRequest]:
            yield header()
            yield pb.UploadDatasetRequest(chunk=rows_of("half"))
            go_on.wait(CALL_SECONDS)

        call = stub.UploadDataset.future(stuck())
        process = psutil.Process(server.process.pid)
        wait_until(lambda: len(folders(server)) == 2 and bool(process.children()))  # the folder comes first
        checks = process.children()
        server.kill()
        go_on.set()
        assert call.exception(CALL_SECONDS).code() == grpc.StatusCode.UNAVAILABLE
    gone, alive = psutil.wait_procs(checks, timeout=30)
    assert (len(gone), alive) == (1, [])
    with RunningServer(tmp_path, fake_workers=True) as server:
        assert folders(server) == {dataset.dataset_id.removeprefix("sha256:")}
        assert get(server.stub(), dataset.dataset_id) == dataset
        assert upload(server.stub(), kept).already_present


def test_a_server_that_stops_ends_an_upload_and_leaves_nothing_of_it(tmp_path: Path):
    with RunningServer(tmp_path, fake_workers=True) as server:
        go_on = threading.Event()

        def stuck() -> Iterator[pb.UploadDatasetRequest]:
            yield header()
            yield pb.UploadDatasetRequest(chunk=rows_of("stopped"))
            go_on.wait(CALL_SECONDS)

        with server.channel() as channel:
            call = UnslothServiceStub(channel).UploadDataset.future(stuck())
            process = psutil.Process(server.process.pid)
            wait_until(lambda: len(folders(server)) == 1 and bool(process.children()))  # the folder comes first
            checks = process.children()
            assert server.stop() == 0
            go_on.set()
            assert call.exception(CALL_SECONDS).code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert folders(server) == set()
        gone, alive = psutil.wait_procs(checks, timeout=30)
        assert (len(gone), alive) == (1, [])


# --- list, delete, use ---


def test_pages_show_every_dataset_newest_first(tmp_path: Path):
    with RunningServer(tmp_path, fake_workers=True) as server:
        stub = server.stub()
        ids = [upload(stub, rows_of(f"page {number}")).dataset.dataset_id for number in range(5)]
        seen, token = [], ""
        while True:
            page = stub.ListDatasets(pb.ListDatasetsRequest(page_size=2, page_token=token), timeout=CALL_SECONDS)
            seen.append([dataset.dataset_id for dataset in page.datasets])
            token = page.next_page_token
            if not token:
                break
        ids.reverse()
        assert seen == [ids[:2], ids[2:4], ids[4:]]


def test_a_deleted_dataset_is_gone_and_can_be_uploaded_again(server: RunningServer, stub: UnslothServiceStub):
    data = rows_of("deleted")
    dataset_id = upload(stub, data).dataset.dataset_id
    stub.DeleteDataset(pb.DeleteDatasetRequest(dataset_id=dataset_id), timeout=CALL_SECONDS)
    assert dataset_id.removeprefix("sha256:") not in folders(server)
    for call in (
        lambda: get(stub, dataset_id),
        lambda: stub.DeleteDataset(pb.DeleteDatasetRequest(dataset_id=dataset_id), timeout=CALL_SECONDS),
    ):
        error = error_of(call)
        assert (error.code, error.reason) == ("NOT_FOUND", "DATASET_NOT_FOUND")
    assert not upload(stub, data).already_present


def test_an_uploaded_dataset_is_trained_on_and_not_deleted_while_it_is_used(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path
):
    gate = StepGate(tmp_path / "gate")
    data = fake_row(steps=2, gate=str(gate)).encode()
    dataset_id = upload(stub, data).dataset.dataset_id
    delete = pb.DeleteDatasetRequest(dataset_id=dataset_id)
    with prepared_model(stub, "tiny") as model:
        events = train(stub, model.model_id, DatasetSource(dataset_id=dataset_id))
        training_id = next(events).training_id
        error = error_of(lambda: stub.DeleteDataset(delete, timeout=CALL_SECONDS))
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "DATASET_IN_USE")
        assert training_id in error.message
        gate.open_all()
        assert list(events)[-1].HasField("succeeded")
        training = stub.GetTraining(pb.GetTrainingRequest(training_id=training_id)).training
        assert training.train_dataset.dataset_id == dataset_id
    stub.DeleteDataset(delete, timeout=CALL_SECONDS)


def test_a_failed_training_does_not_hold_its_dataset_and_a_resume_without_it_is_refused(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path
):
    gate = StepGate(tmp_path / "gate")
    gate.open(1)
    data = fake_row(steps=2, gate=str(gate)).encode()
    dataset_id = upload(stub, data).dataset.dataset_id
    with prepared_model(stub, "tiny", TrainingConfig(save_steps=1)) as model:
        events = train(stub, model.model_id, DatasetSource(dataset_id=dataset_id))
        training_id = next(event.training_id for event in events if event.HasField("checkpoint_saved"))
        cancel = pb.CancelTrainingRequest(training_id=training_id)
        stub.CancelTraining(cancel, timeout=CALL_SECONDS)
        gate.open_all()
        written = len(list(watch(stub, training_id)))
        stub.DeleteDataset(pb.DeleteDatasetRequest(dataset_id=dataset_id), timeout=CALL_SECONDS)
        resume = pb.ResumeTrainingRequest(training_id=training_id)
        error = error_of(lambda: stub.ResumeTraining(resume, timeout=CALL_SECONDS))
        assert (error.code, error.reason) == ("NOT_FOUND", "DATASET_NOT_FOUND")
        assert "Upload the same bytes again, then resume" in error.message
        assert len(list(watch(stub, training_id))) == written
        upload(stub, data)
        stub.ResumeTraining(resume, timeout=CALL_SECONDS)
        assert list(watch(stub, training_id))[-1].HasField("succeeded")


def test_training_on_a_dataset_that_is_not_stored_is_refused(stub: UnslothServiceStub):
    with prepared_model(stub, "tiny") as model:
        rows = DatasetSource(dataset_id="sha256:" + "1" * 64)
        error = error_of(lambda: list(train(stub, model.model_id, rows)))
    assert (error.code, error.reason) == ("NOT_FOUND", "DATASET_NOT_FOUND")


def test_the_server_stays_small_while_100_mib_stream_through_it(tmp_path: Path):
    with RunningServer(tmp_path, fake_workers=True) as server:
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        upload(server.stub(), b'{"text":"%s"}\n' % (b"x" * 1_000_000) * 105)
        assert process.memory_info().rss - before < 64 * 1024 * 1024
        assert "pyarrow" not in Path(f"/proc/{process.pid}/maps").read_text()


def get(stub: UnslothServiceStub, dataset_id: str) -> object:
    return stub.GetDataset(pb.GetDatasetRequest(dataset_id=dataset_id), timeout=CALL_SECONDS).dataset
