"""What packaging/ holds fits the server: the systemd unit, the settings beside it, the Containerfile."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from unslothd.cli.app import app
from unslothd_server.config import Settings
from unslothd_server.config_sources import flag_of, load_settings, variable_of

PACKAGING = Path(__file__).parents[2] / "packaging"
UNIT = PACKAGING / "systemd" / "unslothd.service"


def unit() -> dict[str, list[str]]:
    """Key → values of the unit, all sections together."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.M):
        found.setdefault(key, []).append(value)
    return found


def instructions(name: str) -> list[str]:
    """What follows an instruction of the Containerfile, lines joined."""
    text = (PACKAGING / "Containerfile").read_text().replace("\\\n", " ")
    return re.findall(rf"^{name} (.*)$", text, re.M)


def test_the_unit_starts_serve_with_flags_that_it_has():
    (line,) = unit()["ExecStart"]
    program, command, *arguments = shlex.split(line)
    used = {argument for argument in arguments if argument.startswith("-")}
    assert (program, command) == ("/opt/unslothd/bin/unslothd", "serve")
    assert used <= {"--config", *map(flag_of, Settings.model_fields)}
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_the_unit_leaves_workers_alone_and_does_not_start_again_on_wrong_settings():
    assert (unit()["KillMode"], unit()["OOMPolicy"]) == (["process"], ["continue"])
    assert unit()["RestartPreventExitStatus"] == ["2"]
    assert CliRunner().invoke(app, ["serve", "--listen", "nowhere"]).exit_code == 2


def test_the_unit_hides_no_gpu_and_forbids_no_compiled_kernel():
    assert not {"PrivateDevices", "ProtectClock", "DeviceAllow", "MemoryDenyWriteExecute", "ProcSubset"} & unit().keys()


def test_all_that_the_server_writes_is_below_what_the_unit_makes():
    (line,) = unit()["ExecStart"]
    arguments = shlex.split(line)
    variables = dict(value.split("=", 1) for value in unit()["Environment"])
    state = [f"/var/lib/{name}" for name in unit()["StateDirectory"][0].split()]
    assert arguments[arguments.index("--home") + 1] in state
    assert arguments[arguments.index("--output-root") + 1] in state
    assert variables["TMPDIR"] in state
    assert variables["HF_HOME"].startswith(f"/var/cache/{unit()['CacheDirectory'][0]}/")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_finds_nothing_wrong_in_the_unit(tmp_path: Path):
    here = tmp_path / "unslothd.service"
    here.write_text(UNIT.read_text().replace("/opt/unslothd/bin/unslothd", shutil.which("true") or "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(here)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_settings_beside_the_unit_can_be_used():
    settings = load_settings(config=PACKAGING / "server.toml")
    assert settings.source_of("model_roots").endswith("packaging/server.toml")


def test_what_the_containerfile_copies_is_there():
    sources = [source for line in instructions("COPY") if "--from" not in line for source in line.split()[:-1]]
    assert sources
    assert [source for source in sources if not (PACKAGING.parent / source).exists()] == []


def test_the_container_sets_variables_that_the_server_reads():
    (line,) = instructions("ENV")
    names = {part.partition("=")[0] for part in line.split() if part.startswith("UNSLOTHD_")}
    assert names
    assert names <= {variable_of(name) for name in Settings.model_fields}
    assert instructions("ENTRYPOINT") == ['["unslothd", "serve"]']


def test_packages_are_compiled_where_they_are_installed_for_a_user_that_cannot_write_there():
    page = (PACKAGING.parent / "docs" / "operations.md").read_text()
    installs = [each for each in [*instructions("RUN"), *page.splitlines()] if "uv pip install" in each]
    assert len(installs) == 3
    assert all("--compile-bytecode" in each for each in installs)
