"""No use of the network that is not told (docs/operations.md): a whole job where there is none, and nobody tries."""

from pathlib import Path

import pytest

from support.without_network import in_namespace, namespace

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def command() -> tuple[str, ...]:
    found = namespace()
    if found is None:
        pytest.skip("network namespaces are not permitted here (unshare --net)")
    return found


def test_an_attempt_to_reach_another_host_is_seen(command: tuple[str, ...], tmp_path: Path):
    assert in_namespace(command, "reach_out", tmp_path, 60)["sent"] >= 2


def test_a_whole_job_on_a_local_model_runs_without_a_network_and_tries_to_reach_nobody(
    command: tuple[str, ...], tmp_path: Path
):
    told = in_namespace(command, "whole_job", tmp_path, 300)
    assert told["kinds"][-1] == "succeeded"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert told["sent"] == 0
