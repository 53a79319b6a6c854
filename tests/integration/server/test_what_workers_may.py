"""What the operator allows reaches the workers, those that are started for a model and those that stood ready."""

from pathlib import Path

import pytest

from support.calls import load
from support.running_server import RunningServer, a_model
from support.waiting import wait_until
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap


def told_to(server: RunningServer) -> list[WorkerBootstrap]:
    files = (server.home / "workers").glob("*/bootstrap.binpb")
    return [WorkerBootstrap.FromString(file.read_bytes()) for file in files]


@pytest.mark.parametrize(
    ("spares", "flags", "allowed"), [(1, (), False), (0, ("--trust-remote-code",), True)], ids=["default", "flag"]
)
def test_workers_run_a_models_code_only_by_the_operators_wish_and_read_it_only_in_the_roots(
    tmp_path: Path, spares: int, flags: tuple[str, ...], allowed: bool
):
    arguments = (*flags, "--warm-workers", str(spares))
    with RunningServer(tmp_path, fake_workers=True, arguments=arguments) as server:
        a_model(server, "tiny")
        wait_until(lambda: len(told_to(server)) == spares)
        with server.channel() as channel:
            load(UnslothServiceStub(channel), "tiny")
        told = told_to(server)
    assert any(each.model_id == "tiny-unsloth" for each in told)
    assert {each.trust_remote_code for each in told} == {allowed}
    roots = (server.model_root, server.output_root, server.home / "cache")
    assert {tuple(each.model_roots) for each in told} == {tuple(map(str, roots))}
