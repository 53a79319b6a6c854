"""What the host gives: driver, disks, file system of the home, limits of the process, llama.cpp."""

import importlib
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from unslothd_server.checks.finding import Finding, ok, problem, warning
from unslothd_server.config import GIB, Settings
from unslothd_server.llama_cpp import FOLDER_VARIABLE, find_llama_cpp
from unslothd_server.workers.devices import HostDevices

# Below it nothing can be trained; the merged weights of a model of 7 B parameters are 15 GB.
_LEAST_FREE_BYTES, _FEW_FREE_BYTES = GIB, 20 * GIB
_FEW_FREE_FILES = 10_000
# A call is a socket; each worker, watcher and log is a few files.
_FEW_OPEN_FILES = 4096
_FEW_LOCKED_BYTES = 64 * 1024 * 1024
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia")
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs", "fuse.sshfs"}
_PASSING = {
    "tmpfs": "until a restart",
    "ramfs": "until a restart",
    "overlay": "as long as its container",
}


def driver_findings() -> Iterator[Finding]:
    """Driver and GPUs, as NVML tells them."""
    if not any(Path(file).exists() for file in _DRIVER_FILES):
        mend = "Fine for small models. Else install the NVIDIA driver; in a container: run it with --gpus all."
        yield warning("driver", "no NVIDIA driver: models are trained on the CPU", mend)
        return
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        version, cuda = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlSystemGetCudaDriverVersion_v2()
    except Exception as error:  # noqa: BLE001 - NVML's errors and those of a broken library alike
        mend = "See whether nvidia-smi works; after an update of the driver the host has to be restarted."
        yield problem("driver", f"the NVIDIA driver does not answer: {error}", mend)
        return
    yield ok("driver", f"NVIDIA {version}, for CUDA up to {cuda // 1000}.{cuda % 1000 // 10}")
    gpus = [device for device in HostDevices().list() if device.device != "cpu"]
    if not gpus:
        yield warning("devices", "the driver shows no GPU", "See nvidia-smi, and the variable CUDA_VISIBLE_DEVICES.")
    for gpu in gpus:
        free, total = gpu.free_memory_bytes / GIB, gpu.total_memory_bytes / GIB
        yield ok(gpu.device, f"{gpu.name}, {free:.1f} of {total:.1f} GiB free")


def disk_findings(settings: Settings) -> Iterator[Finding]:
    """Free space and free files of each disk that is written to; a disk once, whatever lies on it."""
    places = {
        "home": settings.home,
        "output root": settings.output_root,
        "Hub cache": _hub_cache(),
        "temporary": Path(tempfile.gettempdir()),
    }
    disks: dict[int, list[str]] = {}
    for name, place in places.items():
        disks.setdefault(_existing(place).stat().st_dev, []).append(name)
    for names in disks.values():
        yield _disk(", ".join(names), _existing(places[names[0]]))


def file_system_finding(home: Path) -> Finding:
    """Whether the home lies on a disk of this host that stays."""
    kind = _file_system(_existing(home).resolve())
    if kind in _NETWORK:
        mend = "Put the home on a disk of this host with --home; the output root may stay on the network."
        return warning("file system", f"{home} lies on {kind}, where locks and flushes cannot be relied on", mend)
    if kind in _PASSING:
        mend = "Put the home on a disk, or in a container on a volume, if trainings shall outlive that."
        return warning("file system", f"{home} lies on {kind} and is there only {_PASSING[kind]}", mend)
    return ok("file system", f"{home} lies on {kind or 'a file system that is not told'}")


def mode_finding(home: Path) -> Finding:
    """Whether others can look into the home: rows of trainings are in it."""
    mode = home.stat().st_mode & 0o777 if home.exists() else 0o700
    if mode & 0o077:
        return warning("home mode", f"{home} can be read by other users (mode {mode:03o})", f"chmod 700 {home}")
    return ok("home mode", f"only its owner reads {home}")


def limit_findings(gpus: int) -> Iterator[Finding]:
    """Limits of this process, which a server started the same way has too.

    Args:
        gpus: How many there are; several talk through locked memory.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < _FEW_OPEN_FILES:
        yield warning("open files", f"at most {files}", f"ulimit -n {_FEW_OPEN_FILES}, or LimitNOFILE= of systemd.")
    else:
        yield ok("open files", f"at most {_limit_text(files)}")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if 0 <= locked < _FEW_LOCKED_BYTES and gpus > 1:
        mend = "ulimit -l unlimited, or LimitMEMLOCK=infinity of systemd."
        yield warning("locked memory", f"at most {locked} bytes, which several GPUs may find too little", mend)
    else:
        yield ok("locked memory", f"at most {_limit_text(locked)}{' bytes' if locked >= 0 else ''}")
    size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size >= 0:
        mend = "ulimit -f unlimited, or LimitFSIZE=infinity of systemd."
        yield warning("file size", f"no file may exceed {size} bytes: weights and logs will be cut off", mend)


def llama_cpp_finding() -> Finding:
    """Whether models can be exported as GGUF; nobody needs it for anything else."""
    found = find_llama_cpp()
    if found is None:
        return ok("llama.cpp", f"not found: no export to GGUF (set {FOLDER_VARIABLE} to have it)")
    quantizer = "quantizer too" if found.quantizer else "no llama-quantize: only unquantised types and q8_0"
    return ok("llama.cpp", f"{found.converter} ({quantizer})")


def _disk(names: str, place: Path) -> Finding:
    usage, files = shutil.disk_usage(place), os.statvfs(place)
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free for {names}"
    mend = "Free some space (docs/operations.md says what may go), or choose folders on a larger disk."
    if usage.free < _LEAST_FREE_BYTES:
        return problem("disk", text, mend)
    if files.f_files and files.f_favail < _FEW_FREE_FILES:
        return warning("disk", f"{text}, but only {files.f_favail} more files", mend)
    return warning("disk", text, mend) if usage.free < _FEW_FREE_BYTES else ok("disk", text)


def _hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads; as it is documented, for the library is no part of the server."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def _existing(place: Path) -> Path:
    return next(each for each in (place, *place.parents) if each.exists())


def _file_system(place: Path) -> str:
    mounts = [each for each in psutil.disk_partitions(all=True) if place.is_relative_to(each.mountpoint)]
    return max(mounts, key=lambda each: len(each.mountpoint)).fstype if mounts else ""


def _limit_text(limit: int) -> str:
    return "as many as wished" if limit < 0 else str(limit)
