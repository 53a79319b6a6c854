"""What doctor says of the host: driver, disks, file system, limits."""

import resource
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from unslothd_server.checks import host
from unslothd_server.checks.finding import Level
from unslothd_server.config import GIB
from unslothd_server.config_sources import load_settings

Usage = namedtuple("Usage", "total used free")
Mount = namedtuple("Mount", "mountpoint fstype")


def levels(findings: object) -> dict[str, Level]:
    return {finding.name: finding.level for finding in findings}


def test_a_host_without_a_driver_trains_on_the_cpu_which_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host, "_DRIVER_FILES", ("/nowhere",))
    (finding,) = host.driver_findings()
    assert (finding.level, "CPU" in finding.text, "--gpus all" in finding.mend) == (Level.WARNING, True, True)


def test_a_driver_that_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def mismatch() -> None:
        raise RuntimeError("Driver/library version mismatch")

    monkeypatch.setattr(host, "_DRIVER_FILES", (str(tmp_path),))
    monkeypatch.setattr(host.importlib, "import_module", lambda _name: SimpleNamespace(nvmlInit=mismatch))
    (finding,) = host.driver_findings()
    assert finding.level is Level.PROBLEM
    assert "version mismatch" in finding.text
    assert "nvidia-smi" in finding.mend


@pytest.mark.parametrize(("free", "level"), [(0.5, Level.PROBLEM), (5, Level.WARNING), (100, Level.OK)])
def test_little_free_space_is_a_warning_and_almost_none_a_problem(
    free: float, level: Level, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: Usage(200 * GIB, 0, int(free * GIB)))
    settings = load_settings({"home": tmp_path / "home", "output_root": tmp_path / "output"})
    found = list(host.disk_findings(settings))
    assert {finding.level for finding in found} == {level}
    assert f"{free:.1f} of 200.0 GiB free for home, output root" in found[0].text


@pytest.mark.parametrize(
    ("kind", "level"),
    [("nfs4", Level.WARNING), ("tmpfs", Level.WARNING), ("overlay", Level.WARNING), ("ext4", Level.OK)],
)
def test_a_home_on_the_network_or_on_what_passes_is_a_warning(
    kind: str, level: Level, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    mounts = [Mount("/", "xfs"), Mount(str(tmp_path), kind), Mount(str(tmp_path / "home-of-another"), "zfs")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    finding = host.file_system_finding(tmp_path / "home")
    assert (finding.level, kind in finding.text) == (level, True)


def test_a_home_that_others_read_is_a_warning_with_the_command_that_mends_it(tmp_path: Path):
    tmp_path.chmod(0o755)
    assert host.mode_finding(tmp_path).mend == f"chmod 700 {tmp_path}"
    tmp_path.chmod(0o700)
    assert host.mode_finding(tmp_path).level is Level.OK


def test_few_open_files_a_limit_on_files_and_little_locked_memory_for_several_gpus_are_warnings(
    monkeypatch: pytest.MonkeyPatch,
):
    limits = {resource.RLIMIT_NOFILE: 256, resource.RLIMIT_MEMLOCK: 65536, resource.RLIMIT_FSIZE: 10**6}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    warned = {"open files": Level.WARNING, "locked memory": Level.WARNING, "file size": Level.WARNING}
    assert levels(host.limit_findings(gpus=2)) == warned
    assert levels(host.limit_findings(gpus=1)) == warned | {"locked memory": Level.OK}
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert levels(host.limit_findings(gpus=2)) == {"open files": Level.OK, "locked memory": Level.OK}
