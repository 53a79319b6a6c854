"""A whole job in a network namespace that holds nothing but loopback; run it by `in_namespace(folder)`.

The kernel counts what finds no route there, so that an attempt to reach any other host shows, also one that nobody
waits for: a name server, the Hub, statistics.
"""

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

_SIOCSIFFLAGS, _UP_LOOPBACK_RUNNING = 0x8914, 1 | 8 | 64
_AS_ROOT, _AS_USER = ("unshare", "--net"), ("unshare", "--user", "--map-root-user", "--net")
# What would make a silent network a matter of the operator's settings.
_UNSET = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "UNSLOTH_DISABLE_STATISTICS", "HF_TOKEN")


def namespace() -> tuple[str, ...] | None:
    """What starts a program without a network here; None where that is not permitted."""
    for command in (_AS_ROOT, _AS_USER):
        try:
            done = subprocess.run([*command, "true"], capture_output=True, timeout=30, check=False)
        except OSError:
            return None
        if done.returncode == 0:
            return command
    return None


def in_namespace(command: tuple[str, ...], job: str, folder: Path, limit_seconds: float) -> dict[str, Any]:
    """Runs one of the jobs below there and returns what it tells, with `sent`: packets that found no route."""
    environment = {name: value for name, value in os.environ.items() if name not in _UNSET}
    done = subprocess.run(
        [*command, sys.executable, "-m", "support.without_network", job, str(folder)],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=limit_seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def reach_out(_folder: Path) -> dict[str, Any]:
    """What must not happen: an address of documentation, and a name."""
    for address in (("192.0.2.1", 443), ("2001:db8::1", 443), ("hub.example", 443)):
        try:
            socket.create_connection(address, timeout=5).close()
        except OSError:
            continue
        raise AssertionError("there is a network")
    return {}


def whole_job(folder: Path) -> dict[str, Any]:
    """The demo's flow with real Unsloth on a tiny model: load, generate, train, generate, export, download."""
    import unslothd
    from support.running_server import RunningServer
    from support.tiny_model import build_tiny_llama

    rows = [{"prompt": f"What is {number} plus {number}?", "completion": f" {2 * number}"} for number in range(16)]
    with RunningServer(folder) as server, unslothd.Client(server.target) as client:
        build_tiny_llama(server.model_root / "tiny")
        model = client.load_model("tiny", max_seq_length=128)
        before = client.generate(model, "What is 2 plus 2?", max_new_tokens=4).text()
        client.prepare(model, lora={"r": 8}, learning_rate=2e-3)
        run = client.train(model, rows, max_steps=2)
        kinds = [event.WhichOneof("kind") for event in run]
        after = client.generate(model, "What is 2 plus 2?", max_new_tokens=4).text()
        client.download(run, folder / "adapter")
        client.unload_model(model)
    return {"kinds": kinds, "texts": [before, after]}


def _raise_loopback() -> None:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _UP_LOOPBACK_RUNNING))


def _without_route() -> int:
    """Packets of both IP versions that found no route in this namespace."""
    names, values = (line.split() for line in Path("/proc/net/snmp").read_text().splitlines()[:2])
    counts = dict(zip(names, values, strict=True))
    counts |= dict(line.split() for line in Path("/proc/net/snmp6").read_text().splitlines())
    return int(counts["OutNoRoutes"]) + int(counts["Ip6OutNoRoutes"])


if __name__ == "__main__":
    _raise_loopback()
    told = {"reach_out": reach_out, "whole_job": whole_job}[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps({**told, "sent": _without_route()}))
