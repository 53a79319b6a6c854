"""MB/s of an upload over the loopback for each format, beside a plain copy and a bare gRPC stream in the same run.

Real server, real client in this process, data of about 100 MB. Rounds go through all arms in turn, so that all meet the
same machine; the best and the median round of each are shown. An upload counts from the call to the answer: the client
hashes, the server writes, hashes, checks every row and brings all to the disk. "copy" reads a file, hashes it and
writes it with fsync, in one thread. "bare" sends the same bytes as the same messages to a server that drops them.
"""

import argparse
import asyncio
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pyarrow as pa
from _common import Figures, columns, environment, options_parser, run, say
from pyarrow import csv, parquet

import unslothd
from support.running_server import RunningServer
from support.uploads import as_jsonl
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import (
    UnslothServiceServicer,
    UnslothServiceStub,
    add_UnslothServiceServicer_to_server,
)

MIB = 1024 * 1024
ROW_CHARACTERS = 1000
BARE_SERVER = "--bare-server"


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--megabytes", type=int, default=100, help="size of the table, 10^6 bytes")
    options.add_argument("--rounds", type=int, default=7, help="uploads of each arm")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Figures of every arm."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(f"upload: making {options.megabytes} MB in four formats")
        table = _table(options.megabytes * 1_000_000)
        files = _files(table, folder)
        with (
            RunningServer(folder / "server", fake_workers=True) as server,
            unslothd.Client(server.target) as client,
            _bare_server() as stub,
        ):
            process = psutil.Process(server.process.pid)
            arms: dict[str, Callable[[], Figures]] = {
                "copy, sha256, fsync": lambda: _copied(files["jsonl"], folder / "copy"),
                "bare gRPC stream": lambda: _bare(stub, files["jsonl"]),
                "Arrow table": lambda: _uploaded(client, process, table),
                **{f"{kind} file": lambda path=path: _uploaded(client, process, path) for kind, path in files.items()},
            }
            results: dict[str, list[Figures]] = {arm: [] for arm in arms}
            for number in range(options.rounds):
                say(f"upload: round {number + 1} of {options.rounds}")
                for arm, once in arms.items():
                    results[arm].append(once())
    return {"megabytes": options.megabytes, "rounds": options.rounds, "arms": _summary(results)}


def _table(num_bytes: int) -> pa.Table:
    """Rows of text that no codec makes much smaller."""
    rows = num_bytes // ROW_CHARACTERS
    prompts = [f"{number} " + os.urandom(ROW_CHARACTERS // 4).hex() for number in range(rows)]
    answers = [prompt[::-1][: ROW_CHARACTERS // 2 - 10] for prompt in prompts]
    return pa.table({"prompt": prompts, "completion": answers})


def _files(table: pa.Table, folder: Path) -> dict[str, Path]:
    files = {kind: folder / f"rows.{kind}" for kind in ("jsonl", "csv", "parquet", "arrow")}
    files["jsonl"].write_bytes(as_jsonl(table.to_pylist()))
    csv.write_csv(table, files["csv"])
    parquet.write_table(table, files["parquet"])
    with pa.OSFile(str(files["arrow"]), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4000)
    return files


def _uploaded(client: unslothd.Client, server: psutil.Process, data: Any) -> Figures:
    own, before, started = time.process_time(), server.cpu_times(), time.perf_counter()
    dataset = client.upload_dataset(data)
    seconds, own, after = time.perf_counter() - started, time.process_time() - own, server.cpu_times()
    client.delete_dataset(dataset)  # so that the next round sends it again
    cpu = {
        "client": own,
        "server": after.user + after.system - before.user - before.system,
        "check": after.children_user + after.children_system - before.children_user - before.children_system,
    }
    return {"seconds": seconds, "bytes": dataset.num_bytes, "cpu_seconds": cpu}


def _copied(source: Path, target: Path) -> Figures:
    started, digest = time.perf_counter(), hashlib.sha256()
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
        while block := reading.read(MIB):
            digest.update(block)
            writing.write(block)
        os.fsync(writing.fileno())
    return {"seconds": time.perf_counter() - started, "bytes": source.stat().st_size}


def _bare(stub: UnslothServiceStub, source: Path) -> Figures:
    def requests() -> Iterator[pb.UploadDatasetRequest]:
        with source.open("rb", buffering=0) as file:
            while block := file.read(MIB):
                yield pb.UploadDatasetRequest(chunk=block)

    started = time.perf_counter()
    stub.UploadDataset(requests(), timeout=60)
    return {"seconds": time.perf_counter() - started, "bytes": source.stat().st_size}


class _Dropping(UnslothServiceServicer):
    async def UploadDataset(self, request: Any, context: Any) -> pb.UploadDatasetResponse:
        """Takes the chunks and drops them."""
        async for message in request:
            _ = message.chunk
        return pb.UploadDatasetResponse()


async def _serve_bare() -> None:
    server = grpc.aio.server(ThreadPoolExecutor(1))
    add_UnslothServiceServicer_to_server(_Dropping(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


@contextmanager
def _bare_server() -> Iterator[UnslothServiceStub]:
    process = subprocess.Popen(
        [sys.executable, __file__, BARE_SERVER], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert process.stdout is not None
        with grpc.insecure_channel(f"127.0.0.1:{int(process.stdout.readline())}") as channel:
            yield UnslothServiceStub(channel)
    finally:
        process.kill()
        process.wait(10)


def _summary(results: dict[str, list[Figures]]) -> Figures:
    arms: Figures = {}
    for arm, rounds in results.items():
        speeds = [each["bytes"] / each["seconds"] / 1e6 for each in rounds]
        arms[arm] = {
            "megabytes": round(rounds[0]["bytes"] / 1e6, 1),
            "best_mb_s": round(max(speeds)),
            "median_mb_s": round(statistics.median(speeds)),
        }
        if "cpu_seconds" in rounds[0]:
            arms[arm]["cpu_ms"] = {
                part: round(1000 * min(each["cpu_seconds"][part] for each in rounds))
                for part in ("client", "server", "check")
            }
    return arms


def table(figures: Figures) -> str:
    """For people."""
    head = ["arm", "MB", "best MB/s", "median MB/s", "CPU ms: client", "server", "check"]
    rows = []
    for arm, each in figures["arms"].items():
        cpu = each.get("cpu_ms", {})
        rows.append([arm, each["megabytes"], each["best_mb_s"], each["median_mb_s"]])
        rows[-1] += [cpu.get(part, "") for part in ("client", "server", "check")]
    return f"Uploads over the loopback ({figures['rounds']} rounds)\n" + columns(head, rows)


if __name__ == "__main__":
    if BARE_SERVER in sys.argv:
        asyncio.run(_serve_bare())
    else:
        run(measure, table, parser())
