"""What `pip install unslothd` puts on a machine: three packages of ours, a light client, nothing that trains."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 60_000_000
LIMIT_SECONDS = 240


def uv(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "uv", *map(str, arguments), "--quiet"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    uv("build", "--wheel", "--out-dir", out, ROOT)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def base_install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel and what it asks for, no extra."""
    environment = tmp_path_factory.mktemp("install") / "venv"
    uv("venv", "--python", sys.executable, environment)
    uv("pip", "install", "--python", environment / "bin" / "python", "--compile-bytecode", wheel)
    return environment


def answer(environment: Path, code: str) -> list[str]:
    """What a program prints there, as JSON; run outside the repository, so that nothing of it can be found."""
    command = [environment / "bin" / "python", "-I", "-c", f"import json; {code}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_wheel_holds_our_three_packages_and_no_other_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"unslothd", "unslothd_server", "unslothd_mcp"}
    assert len([top for top in tops if top.endswith(".dist-info")]) == 1


def test_the_wheel_holds_the_stubs_their_types_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"unslothd/v1/service_pb2.py", "unslothd/v1/service_pb2.pyi", "unslothd/py.typed"} <= set(names)
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_base_install_is_light(base_install: Path) -> None:
    (packages,) = base_install.glob("lib/python*/site-packages")
    size = sum(path.lstat().st_size for path in packages.rglob("*") if path.is_file())
    assert size < LIMIT_BYTES, f"{size / 1e6:.1f} MB"


def test_the_base_install_brings_nothing_that_trains(base_install: Path) -> None:
    names = answer(
        base_install,
        "from importlib.metadata import distributions; print(json.dumps([d.name for d in distributions()]))",
    )
    normalised = {name.lower().replace("_", "-") for name in names}
    assert normalised == {"unslothd", "grpcio", "protobuf", "googleapis-common-protos", "typing-extensions"}


def test_the_client_is_imported_without_extras(base_install: Path) -> None:
    loaded = answer(
        base_install,
        "import sys, unslothd; unslothd.Client; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))",
    )
    assert "unslothd" in loaded
    assert not {"torch", "transformers", "datasets", "pandas", "rich", "typer", "unslothd_server"} & set(loaded)


def test_the_base_install_loads_the_rules_under_our_own_name(base_install: Path) -> None:
    loaded = answer(
        base_install,
        "import sys; from unslothd._vendor.buf.validate import validate_pb2; print(json.dumps(list(sys.modules)))",
    )
    assert "buf" not in loaded
