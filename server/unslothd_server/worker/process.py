"""The life of a worker process, from its bootstrap file to its exit record. The engine works on the main thread."""

import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NoReturn

import grpc
from google.protobuf.message import DecodeError

from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap
from unslothd.worker.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server
from unslothd_server.hardening import harden_process
from unslothd_server.worker.commands import CommandQueue
from unslothd_server.worker.ending import Ending, end_on_signals, end_when_orphaned
from unslothd_server.worker.exit_record import exit_now
from unslothd_server.worker.holder import ModelHolder
from unslothd_server.worker.layout import BOOTSTRAP_VERSION, BundleLayout
from unslothd_server.worker.lock import take_lock
from unslothd_server.worker.ports import Engine
from unslothd_server.worker.service import WorkerService

EXIT_FAILED = 1
EXIT_BAD_BOOTSTRAP = 64
EXIT_LOCKED = 65

_RPC_THREADS = 32  # a watch, a load and a generation hold one each; the server is the only caller
_ORPHAN_CHECK_S = 2.0
_UNLIMITED = -1

_log = logging.getLogger(__name__)


def run(bundle_dir: Path, engine: Engine, *, orphan_check_s: float = _ORPHAN_CHECK_S) -> NoReturn:
    """Is a worker until the process ends. Call it on the main thread.

    Args:
        bundle_dir: The worker's folder; its bootstrap file says the rest.
        engine: Not used before the socket is open.
        orphan_check_s: Seconds between two looks whether the folder is still there.
    """
    _log_to_stderr()
    harden_process()
    bundle = BundleLayout(bundle_dir.resolve())
    bootstrap = _read_bootstrap(bundle)
    if not take_lock(bundle.lock):
        # Nothing is written in the folder: it belongs to the other worker.
        _log.error("another worker lives in %s; stop it first", bundle.directory)
        os._exit(EXIT_LOCKED)
    try:
        commands = CommandQueue()
        _serve(bundle, bootstrap, engine, commands, orphan_check_s)
        versions = engine.import_libraries()
        _log.info("imported %s", ", ".join(f"{name} {version}" for name, version in versions.items()))
        commands.run_forever()
    except BaseException as error:  # noqa: BLE001 - whatever it was, the log and the exit record say so
        _log.exception("the worker failed")
        exit_now(bundle.exit_record, EXIT_FAILED, f"{type(error).__name__}: {error}")
    raise AssertionError("unreachable: a worker ends by os._exit")


def _serve(
    bundle: BundleLayout, bootstrap: WorkerBootstrap, engine: Engine, commands: CommandQueue, orphan_check_s: float
) -> None:
    holder = ModelHolder(engine, bootstrap)
    service = WorkerService(holder, commands)
    options = [("grpc.max_receive_message_length", _UNLIMITED), ("grpc.max_send_message_length", _UNLIMITED)]
    server = grpc.server(ThreadPoolExecutor(_RPC_THREADS, thread_name_prefix="rpc"), options=options)
    add_WorkerServiceServicer_to_server(service, server)
    service.ending = Ending(holder, server, bundle)
    end_on_signals(service.ending)
    end_when_orphaned(bundle, Path(bootstrap.server_home), partial(_has_lost_server, holder, bootstrap), orphan_check_s)
    Path(bootstrap.socket_path).unlink(missing_ok=True)  # of a dead predecessor: this process holds the lock
    server.add_insecure_port(f"unix:{bootstrap.socket_path}")
    server.start()
    name = "spare worker" if holder.is_spare else f"worker of model {holder.model_id}"
    _log.info("%s, process %d, listens", name, os.getpid())


def _has_lost_server(holder: ModelHolder, bootstrap: WorkerBootstrap) -> bool:
    """True for a spare whose server is gone: it holds nothing that another server could go on with."""
    return holder.is_spare and os.getppid() != bootstrap.server_pid


def _read_bootstrap(bundle: BundleLayout) -> WorkerBootstrap:
    try:
        bootstrap = WorkerBootstrap.FromString(bundle.bootstrap.read_bytes())
    except (OSError, DecodeError) as error:
        _log.error("cannot read %s: %s", bundle.bootstrap, error)
        os._exit(EXIT_BAD_BOOTSTRAP)
    if bootstrap.bootstrap_version != BOOTSTRAP_VERSION:
        _log.error(
            "%s has version %d, this worker knows version %d; server and worker must be of one release",
            bundle.bootstrap,
            bootstrap.bootstrap_version,
            BOOTSTRAP_VERSION,
        )
        os._exit(EXIT_BAD_BOOTSTRAP)
    return bootstrap


def _log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
