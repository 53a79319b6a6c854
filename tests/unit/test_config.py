"""Settings: where they come from, which wins, and every problem at once with its place."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from support.certificates import Authority
from unslothd_server.config import Settings, split_address
from unslothd_server.config_sources import ConfigError, flag_of, load_settings, variable_of
from unslothd_server.flags import default_text, with_setting_flags

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The home of nobody: no file of this machine is found."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("unslothd_server.config_sources.SYSTEM_FILE", tmp_path / "etc" / "server.toml")
    monkeypatch.delenv("UNSLOTHD_CONFIG", raising=False)
    return tmp_path


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def problems(flags: dict[str, object] | None = None, config: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(flags, config=config)
    return str(caught.value).splitlines()


def test_a_flag_wins_over_the_environment_that_over_the_file_and_that_over_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    file = written(tmp_path / "server.toml", 'home = "/from/file"\nmax_loaded_models = 3\nstall_seconds = 60')
    monkeypatch.setenv("UNSLOTHD_HOME", "/from/environment")
    monkeypatch.setenv("UNSLOTHD_MAX_LOADED_MODELS", "4")
    settings = load_settings({"home": "/from/flag"}, config=file)
    assert settings.home == Path("/from/flag")
    assert settings.max_loaded_models == 4
    assert settings.stall_seconds == 60
    assert settings.listen == "127.0.0.1:50051"
    assert [settings.source_of(name) for name in ("home", "max_loaded_models", "stall_seconds", "listen")] == [
        "--home",
        "UNSLOTHD_MAX_LOADED_MODELS",
        f"stall_seconds in {file}",
        "default",
    ]


def test_a_flag_can_take_back_a_yes_of_the_file(tmp_path: Path):
    file = written(tmp_path / "server.toml", "trust_remote_code = true")
    assert load_settings(config=file).trust_remote_code
    assert not load_settings({"trust_remote_code": False}, config=file).trust_remote_code


def test_one_file_is_read_the_named_one_else_the_users_else_the_systems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    written(tmp_path / "etc" / "server.toml", "max_loaded_models = 2\nstall_seconds = 60")
    assert load_settings().max_loaded_models == 2
    written(tmp_path / "xdg" / "unslothd" / "server.toml", "max_loaded_models = 3")
    assert (load_settings().max_loaded_models, load_settings().stall_seconds) == (3, 1800)
    monkeypatch.setenv("UNSLOTHD_CONFIG", str(written(tmp_path / "a.toml", "max_loaded_models = 4")))
    assert load_settings().max_loaded_models == 4
    assert load_settings(config=written(tmp_path / "b.toml", "max_loaded_models = 5")).max_loaded_models == 5
    monkeypatch.setenv("UNSLOTHD_CONFIG", "")
    assert load_settings().max_loaded_models == 8


def test_a_named_file_that_is_not_there_is_a_problem_not_a_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    missing = tmp_path / "missing.toml"
    assert problems(config=missing)[0].startswith(f"{missing}: cannot be read: No such file")
    monkeypatch.setenv("UNSLOTHD_CONFIG", str(missing))
    assert problems()[0].startswith(f"{missing}: cannot be read")


def test_a_file_that_is_no_toml_is_told_with_the_place_of_the_mistake(tmp_path: Path):
    assert "line 2" in problems(config=written(tmp_path / "server.toml", 'home = "/a"\nlisten = 127.0.0.1:1'))[0]


def test_folders_are_a_list_in_the_file_and_one_text_as_in_path_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    both = (Path("/models/a"), Path("/models/b"))
    assert (
        load_settings(config=written(tmp_path / "c.toml", 'model_roots = ["/models/a", "/models/b"]')).model_roots
        == both
    )
    monkeypatch.setenv("UNSLOTHD_MODEL_ROOTS", "/models/a:/models/b")
    assert load_settings().model_roots == both


def test_relative_folders_start_at_the_file_or_at_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    file = written(tmp_path / "conf" / "server.toml", 'output_root = "out"\nmodel_roots = ["models"]')
    assert load_settings(config=file).output_root == tmp_path / "conf" / "out"
    assert load_settings(config=file).model_roots == (tmp_path / "conf" / "models",)
    monkeypatch.chdir(tmp_path)
    assert load_settings({"output_root": "out"}, config=file).output_root == tmp_path / "out"


def test_sizes_may_have_units(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNSLOTHD_MAX_MESSAGE_BYTES", "20MiB")
    assert load_settings().max_message_bytes == 20 * 1024 * 1024


def test_every_problem_of_every_place_is_told_at_once_with_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = written(tmp_path / "server.toml", 'hoem = "/a"\nstall_seconds = 0\non_shutdown = "wait"')
    monkeypatch.setenv("UNSLOTHD_MAX_LOADED_MODELS", "0")
    monkeypatch.setenv("UNSLOTHD_MODEL_ROOT", "/models")
    told = "\n".join(problems({"max_queued_trainings": "-1", "listen": "0.0.0.0:5000"}, config=file))
    assert f"hoem in {file}: there is no such setting; did you mean home?" in told
    assert "UNSLOTHD_MODEL_ROOT: no setting has this variable; did you mean UNSLOTHD_MODEL_ROOTS?" in told
    assert f"stall_seconds in {file}: " in told
    assert f"on_shutdown in {file}: Input should be 'pause' or 'continue'" in told
    assert "UNSLOTHD_MAX_LOADED_MODELS: " in told
    assert "--max-queued-trainings: " in told
    assert "--listen: 0.0.0.0 can be reached" in told
    assert len(told.splitlines()) == 7


def test_a_port_alone_for_metrics_is_one_of_this_host_only():
    assert load_settings({"metrics_listen": "9464"}).metrics_listen == "127.0.0.1:9464"
    assert load_settings({"metrics_listen": "0.0.0.0:9464"}).metrics_listen == "0.0.0.0:9464"
    assert "is not HOST:PORT" in problems({"metrics_listen": "here"})[0]


def test_variables_of_clients_and_scripts_are_nobodys_business(monkeypatch: pytest.MonkeyPatch):
    for name in (
        "UNSLOTHD_TARGET",
        "UNSLOTHD_TOKEN",
        "UNSLOTHD_PROFILE",
        "UNSLOTHD_TLS",
        "UNSLOTHD_CA",
        "UNSLOTHD_CLIENT_KEY",
    ):
        monkeypatch.setenv(name, "x")
    assert load_settings().listen == "127.0.0.1:50051"


@pytest.fixture
def certificate(tmp_path: Path) -> dict[str, str]:
    """A certificate, its key and their authority, by setting."""
    authority = Authority(tmp_path / "authority")
    cert, key = authority.server()
    return {"tls_cert": str(cert), "tls_key": str(key), "tls_client_ca": str(authority.ca)}


def valid_text(name: str, files: dict[str, str]) -> str:
    if name in files:
        return files[name]
    if name == "metrics_listen":
        return "9464"
    default = Settings.model_fields[name].default
    return str(default).lower() if isinstance(default, bool) else default_text(Settings.model_fields[name]) or "/a"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_a_flag_a_variable_and_a_key_and_says_what_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certificate: dict[str, str]
):
    if name in certificate:  # which come together
        for other, path in certificate.items():
            if other != name:
                monkeypatch.setenv(variable_of(other), path)
    taken: dict[str, object] = {}
    app = typer.Typer()
    app.command()(with_setting_flags(lambda *, flags: taken.update(flags)))
    value = valid_text(name, certificate)
    done = CliRunner().invoke(app, [flag_of(name)] if value == "false" else [flag_of(name), value])
    assert done.exit_code == 0, done.output
    assert [each for each, given in taken.items() if given is not None] == [name]

    file = written(tmp_path / "server.toml", f"{name} = '{value}'")
    assert load_settings(config=file).source_of(name) == f"{name} in {file}"
    monkeypatch.setenv(variable_of(name), value)
    assert load_settings(config=file).source_of(name) == variable_of(name)

    description = Settings.model_fields[name].description
    assert description
    assert description.endswith(".")


def test_the_page_of_settings_is_fresh():
    script = str(ROOT / "scripts/configuration_page.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True)
    assert (ROOT / "docs/configuration.md").read_text() == done.stdout, (
        "run: .venv/bin/python scripts/configuration_page.py > docs/configuration.md"
    )


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "192.168.1.5:50051", "gpu-host:50051", "[::]:50051"])
def test_an_address_that_others_reach_needs_consent(listen: str):
    assert "--tls-cert" in problems({"listen": listen})[0]
    assert "--allow-insecure-listen" in problems({"listen": listen})[0]
    settings = load_settings({"listen": listen, "allow_insecure_listen": True})
    assert settings.listen == listen
    assert not settings.asks_who_calls


def test_a_certificate_makes_an_address_safe_that_others_reach_and_callers_are_asked_who_they_are(
    certificate: dict[str, str],
):
    tls = {name: certificate[name] for name in ("tls_cert", "tls_key")}
    exposed = {**tls, "listen": "0.0.0.0:50051"}
    assert load_settings(exposed).asks_who_calls
    assert not load_settings({**exposed, "require_identity": "no"}).asks_who_calls
    assert not load_settings(tls).asks_who_calls
    assert load_settings({**tls, "require_identity": "yes"}).asks_who_calls
    assert load_settings(certificate).asks_who_calls
    assert load_settings({"require_identity": "yes"}).asks_who_calls


def test_every_problem_of_certificate_and_key_is_told_at_once(tmp_path: Path):
    authority = Authority(tmp_path / "authority")
    old, _ = authority.server("old", starts_in=-timedelta(days=40))
    _, key = authority.server("open")
    key.chmod(0o644)
    told = problems({"tls_cert": str(old), "tls_key": str(key), "tls_client_ca": str(key), "listen": "0.0.0.0:1"})
    assert [line.partition(": ")[0] for line in told] == ["--tls-cert", "--tls-key", "--tls-client-ca"]
    assert "expired on" in told[0]
    assert "can be used by other users (mode 0644); chmod 600 it" in told[1]
    assert "holds no certificate in PEM form" in told[2]


def test_a_certificate_needs_its_key_and_a_key_its_certificate(certificate: dict[str, str], tmp_path: Path):
    cert, key, client_ca = certificate.values()
    other_cert, _ = Authority(tmp_path / "other").server()
    assert "go together" in problems({"tls_cert": cert})[0]
    assert "go together" in problems({"tls_key": key})[0]
    assert "need TLS" in problems({"tls_client_ca": client_ca})[0]
    assert "is not the key of" in problems({"tls_cert": str(other_cert), "tls_key": key})[0]


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:50051", "[::1]:50051"])
def test_loopback_needs_no_consent(listen: str):
    assert load_settings({"listen": listen}).listen == listen


@pytest.mark.parametrize("listen", ["", "localhost", "localhost:", ":50051", "localhost:99999", "localhost:http"])
def test_an_address_that_is_none_is_told_with_an_example(listen: str):
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:50051"):
        split_address(listen)
