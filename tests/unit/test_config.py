"""Settings: precedence, and every problem at once."""

from pathlib import Path

import pytest

from unslothd_server.config import ConfigError, load_settings, split_address


def test_a_flag_wins_over_the_environment_and_that_over_the_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNSLOTHD_HOME", "/from/environment")
    assert load_settings().home == Path("/from/environment")
    assert load_settings(home=Path("/from/flag")).home == Path("/from/flag")
    assert load_settings().listen == "127.0.0.1:50051"


def test_model_roots_in_the_environment_are_separated_as_in_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNSLOTHD_MODEL_ROOTS", "/models/a:/models/b")
    assert load_settings().model_roots == (Path("/models/a"), Path("/models/b"))


def test_relative_folders_become_absolute():
    assert load_settings(output_root=Path("out")).output_root.is_absolute()


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load_settings(max_loaded_models=0, max_queued_trainings=-1, listen="127.0.0.1:1")
    assert "max_loaded_models" in str(caught.value)
    assert "max_queued_trainings" in str(caught.value)


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "192.168.1.5:50051", "gpu-host:50051", "[::]:50051"])
def test_an_address_that_others_reach_needs_consent(listen: str):
    with pytest.raises(ConfigError, match="allow-insecure-listen"):
        load_settings(listen=listen)
    assert load_settings(listen=listen, allow_insecure_listen=True).listen == listen


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:50051", "[::1]:50051"])
def test_loopback_needs_no_consent(listen: str):
    assert load_settings(listen=listen).listen == listen


@pytest.mark.parametrize("listen", ["", "localhost", "localhost:", ":50051", "localhost:99999", "localhost:http"])
def test_an_address_that_is_none_is_told_with_an_example(listen: str):
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:50051"):
        split_address(listen)
