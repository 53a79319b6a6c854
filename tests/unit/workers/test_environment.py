"""A worker's environment: nothing secret, nothing of the server's own, and what Unsloth needs."""

import os
from pathlib import Path

import pytest

from unslothd_server.workers.environment import worker_environment


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "WANDB_API_KEY",
        "DB_PASSWORD",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "UNSLOTHD_TOKENS",
        "UNSLOTHD_HOME",
        "OTEL_EXPORTER_OTLP_HEADERS",
        "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION",
        "hf_token",
        "SOMETHING_NOBODY_THOUGHT_OF",
        "SSH_AUTH_SOCK",
        "KUBERNETES_SERVICE_HOST",
    ],
)
def test_secrets_and_the_servers_settings_are_not_handed_on(name: str):
    assert name not in worker_environment({name: "x"})


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "HOME",
        "CUDA_VISIBLE_DEVICES",
        "HF_HOME",
        "HTTPS_PROXY",
        "TOKENIZERS_PARALLELISM",
        "OMP_NUM_THREADS",
        "https_proxy",
    ],
)
def test_what_a_training_needs_is_handed_on(name: str):
    assert worker_environment({name: "x"})[name] == "x"


def test_unsloth_installs_nothing_and_reports_nothing_unless_told():
    assert worker_environment({"UNSLOTH_AUTO_INSTALL": "1"})["UNSLOTH_AUTO_INSTALL"] == "0"
    assert worker_environment({})["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert worker_environment({"UNSLOTH_DISABLE_STATISTICS": "0"})["UNSLOTH_DISABLE_STATISTICS"] == "0"


def test_a_relative_import_path_stays_right_in_another_working_directory():
    paths = worker_environment({"PYTHONPATH": f"server{os.pathsep}/abs"})["PYTHONPATH"]

    assert paths == f"{Path('server').absolute()}{os.pathsep}/abs"
