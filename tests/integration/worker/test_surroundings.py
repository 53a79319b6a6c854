"""Where a worker lives: its own session, folder, environment and log; and nothing heavy on the server's side of it."""

import os
import subprocess
import sys
from pathlib import Path

from doubles.fake_worker import fake_worker_command
from integration.worker.harness import Home, bounded
from unslothd_server.workers.bundle import Bundle
from unslothd_server.workers.launcher import LocalLauncher


def test_a_worker_has_its_own_session_folder_and_log_and_no_secret(home: Home):
    async def test() -> None:
        environ = {**os.environ, "HF_TOKEN": "hf_secret", "UNSLOTHD_TOKENS": "t", "UNSLOTH_AUTO_INSTALL": "1"}
        launcher = LocalLauncher(home.path, command=fake_worker_command(), environ=environ)
        worker = await launcher.launch("m", device_map="auto")
        process = Path(f"/proc/{worker.pid}")
        directory = home.path / "workers" / "m"

        assert os.getsid(worker.pid) == worker.pid != os.getsid(0)
        assert (process / "cwd").readlink() == directory / "cwd"
        assert (process / "fd/0").readlink() == Path(os.devnull)
        assert (process / "fd/1").readlink() == (process / "fd/2").readlink() == directory / "worker.log"
        told = dict(line.split("=", 1) for line in (process / "environ").read_text().split("\0") if line)
        assert told.keys() & {"HF_TOKEN", "UNSLOTHD_TOKENS"} == set()
        assert told["UNSLOTH_AUTO_INSTALL"] == "0"
        assert Bundle.open(directory).socket_path.is_socket()
        assert (directory / "worker.log").stat().st_mode & 0o777 == 0o600
        await worker.stop()

    bounded(test())


def test_a_home_with_a_long_path_works_too(home: Home):
    async def test() -> None:
        launcher = LocalLauncher(home.path / ("x" * 100), command=fake_worker_command())
        worker = await launcher.launch("m", device_map="auto")
        assert (await worker.status()).pid == worker.pid
        await worker.stop()

    bounded(test())


def test_two_workers_live_side_by_side(home: Home):
    async def test() -> None:
        first, second = await home.prepared("first"), await home.prepared("second")
        assert first.pid != second.pid
        await first.stop()
        assert (await second.status()).model.model_id == "second"
        await second.stop()

    bounded(test())


def test_neither_side_imports_torch_or_unsloth_by_itself():
    modules = ["workers.launcher", "workers.devices", "event_log", "worker.process", "engine.unsloth_engine"]
    code = "\n".join(
        [
            "import sys",
            *(f"import unslothd_server.{module}" for module in modules),
            "print({'torch', 'unsloth', 'transformers', 'trl', 'datasets'} & set(sys.modules))",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout == "set()\n"
