"""What Prometheus scrapes of a real server: names, labels and values, and the page and the dashboard that use them."""

import http.client
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, error_of, inline, prepared_model, train, watch
from support.running_server import RunningServer, a_model
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "monitoring.md"
DASHBOARD = ROOT / "packaging" / "grafana" / "unslothd.json"
Samples = dict[tuple[str, str], float]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    arguments = ("--metrics-listen", "0", "--heartbeat-seconds", "0.1")
    with RunningServer(tmp_path_factory.mktemp("server"), fake_workers=True, arguments=arguments) as running:
        a_model(running, "tiny")
        yield running


def metrics_address(server: RunningServer) -> str:
    """HOST:PORT, as the newest server on this home has logged it."""
    return re.findall(r"http://([\d.:]+)/metrics", server.log.read_text())[-1]


def answer(server: RunningServer, path: str = "/metrics") -> tuple[int, str]:
    connection = http.client.HTTPConnection(metrics_address(server), timeout=CALL_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def scrape(server: RunningServer) -> Samples:
    """Values by name and labels ("a=1,b=2"); buckets of histograms are left out."""
    _, text = answer(server)
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    return {
        (each.name, ",".join(f"{key}={value}" for key, value in sorted(each.labels.items()))): each.value
        for each in samples
        if not each.name.endswith("_bucket")
    }


def test_calls_are_counted_by_rpc_and_code_and_timed(server: RunningServer, stub: UnslothServiceStub):
    before = scrape(server)
    stub.ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS)
    error_of(lambda: stub.GetModel(pb.GetModelRequest(model_id="none"), timeout=CALL_SECONDS))
    after = scrape(server)

    def grown(name: str, labels: str) -> float:
        return after[name, labels] - before.get((name, labels), 0)

    assert grown("unslothd_rpcs_total", "code=OK,rpc=ListModels") == 1
    assert grown("unslothd_rpcs_total", "code=NOT_FOUND,rpc=GetModel") == 1
    assert grown("unslothd_rpc_duration_seconds_count", "rpc=ListModels") == 1
    assert after["unslothd_rpcs_in_progress", "rpc=ListModels"] == 0


def test_unexpected_errors_are_counted_from_0_so_that_the_first_is_an_increase(server: RunningServer):
    found, rpcs = scrape(server), pb.DESCRIPTOR.services_by_name["UnslothService"].methods_by_name
    assert {found["unslothd_rpcs_total", f"code=INTERNAL,rpc={rpc}"] for rpc in rpcs} == {0}


def test_a_training_its_watchers_and_the_queue_behind_it_are_seen_while_it_runs(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path
):
    gate = StepGate(tmp_path / "gate")
    before = scrape(server)
    with prepared_model(stub, "tiny") as model:
        running = train(stub, model.model_id, inline([fake_row(steps=3, gate=str(gate))]))
        training_id = next(running).training_id
        waiting = train(stub, model.model_id, inline([fake_row(steps=1)]))
        next(waiting)
        watcher = watch(stub, training_id)
        gate.open(1, 2)
        for event in watcher:
            if event.step.step == 2:
                break
        wait_until(lambda: scrape(server)["unslothd_watchers", ""] == 3)
        during = scrape(server)
        gate.open_all()
        list(running), list(waiting), list(watcher)
    assert during["unslothd_trainings", "state=running"] == 1
    assert during["unslothd_queue_length", ""] == during["unslothd_trainings", "state=queued"] == 1
    assert during["unslothd_models", "state=training"] == 1
    assert during["unslothd_tokens_per_second", ""] == 1000
    assert during["unslothd_optimizer_steps_total", ""] - before["unslothd_optimizer_steps_total", ""] == 2
    assert during["unslothd_trained_tokens_total", ""] - before["unslothd_trained_tokens_total", ""] == 200
    assert during["unslothd_rpcs_in_progress", "rpc=Train"] == 2
    after = scrape(server)
    assert after["unslothd_tokens_per_second", ""] == after["unslothd_watchers", ""] == 0
    assert after["unslothd_event_log_bytes", ""] == sum(
        log.stat().st_size for log in server.home.glob("trainings/*/events.binpb")
    )


def test_a_repair_is_counted_and_so_are_the_steps_of_both_workers(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path
):
    before = scrape(server)
    with prepared_model(stub, "tiny") as model:
        row = fake_row(steps=3, die_at_step=2, die_once=str(tmp_path / "died"))
        list(train(stub, model.model_id, inline([row])))
    after = scrape(server)
    assert after["unslothd_recoveries_total", ""] - before["unslothd_recoveries_total", ""] == 1
    # Step 1 was not saved, so it was done twice.
    assert after["unslothd_optimizer_steps_total", ""] - before["unslothd_optimizer_steps_total", ""] == 4


def test_what_was_done_before_a_restart_still_counts(tmp_path: Path):
    seen: list[Samples] = []
    for restart in (False, True):
        with RunningServer(tmp_path, fake_workers=True, arguments=("--metrics-listen", "0")) as server:
            if not restart:
                a_model(server, "tiny")
                with server.channel() as channel, prepared_model(UnslothServiceStub(channel), "tiny") as model:
                    list(train(UnslothServiceStub(channel), model.model_id, inline([fake_row(steps=2)])))
            seen.append(scrape(server))
    counted = [
        (each["unslothd_optimizer_steps_total", ""], each["unslothd_trainings", "state=succeeded"]) for each in seen
    ]
    assert counted == [(2, 1), (2, 1)]


def test_devices_and_the_process_are_there(server: RunningServer):
    found = scrape(server)
    assert (
        0
        < found["unslothd_device_memory_used_bytes", "device=cpu"]
        < found["unslothd_device_memory_bytes", "device=cpu"]
    )
    assert 0 <= found["unslothd_device_utilization_ratio", "device=cpu"] <= 1
    assert found["process_resident_memory_bytes", ""] > 10 * 1024 * 1024


def test_no_label_holds_what_a_caller_chose_or_what_comes_and_goes(server: RunningServer, stub: UnslothServiceStub):
    with prepared_model(stub, "tiny") as model:
        list(train(stub, model.model_id, inline([fake_row(steps=1)])))
        _, text = answer(server)
    labels = {
        name for family in text_string_to_metric_families(text) for each in family.samples for name in each.labels
    }
    assert labels == {"rpc", "code", "le", "state", "device", "version"}
    assert model.model_id not in text


def test_nothing_but_metrics_is_served_there(server: RunningServer):
    assert answer(server, "/")[0] == 404
    assert answer(server, "/metrics/..")[0] == 404


def test_that_other_hosts_can_read_them_is_a_warning_in_the_log(server: RunningServer, tmp_path: Path):
    told = "other hosts can read the metrics; they need neither TLS nor a token"
    with RunningServer(tmp_path, fake_workers=True, arguments=("--metrics-listen", "0.0.0.0:0")) as exposed:
        assert told in exposed.log.read_text()
    assert told not in server.log.read_text()


def test_without_the_setting_only_calls_are_listened_for(tmp_path: Path):
    with RunningServer(tmp_path, fake_workers=True) as server:
        sockets = psutil.Process(server.process.pid).net_connections("tcp")
        listening = [each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN]
        assert listening == [int(server.target.rpartition(":")[2])]


def test_an_address_that_is_taken_ends_the_start_and_says_so(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RuntimeError, match=f"cannot serve metrics on {address}"):
            RunningServer(tmp_path, fake_workers=True, arguments=("--metrics-listen", address))


def test_a_server_that_cannot_listen_for_calls_ends_although_it_serves_metrics(server: RunningServer, tmp_path: Path):
    arguments = ("--listen", server.target, "--metrics-listen", "0")
    with pytest.raises(RuntimeError, match="cannot listen on"):
        RunningServer(tmp_path, fake_workers=True, arguments=arguments)


# --- what uses them ---


def names_of_ours(text: str) -> set[str]:
    """Names as PromQL has them: those of a histogram end in _bucket, _sum, _count."""
    return set(re.findall(r"\b(?:unslothd|process)_[a-z_]+", text))


@pytest.fixture(scope="module")
def scraped_names(server: RunningServer, stub: UnslothServiceStub) -> set[str]:
    stub.ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS)
    _, text = answer(server)
    samples = {each.name for family in text_string_to_metric_families(text) for each in family.samples}
    return {name for name in samples if not name.endswith("_created")}


def test_every_metric_of_the_dashboard_is_scraped(scraped_names: set[str]):
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(queries) > 10
    used = {name for query in queries for name in names_of_ours(query)}
    assert used - scraped_names == set()


def test_every_metric_of_ours_stands_on_the_page_and_nothing_else(scraped_names: set[str]):
    listed = set(re.findall(r"^\| `(unslothd_[a-z_]+)", PAGE.read_text(), re.M))
    base = {re.sub(r"_(bucket|sum|count)$", "", name) for name in scraped_names if name.startswith("unslothd_")}
    assert listed == base
