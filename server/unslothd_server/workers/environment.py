"""The environment of a worker: what a training needs of the server's, no secret, and what makes Unsloth behave."""

import os
from collections.abc import Mapping
from pathlib import Path

# All that is handed on, by the first part of the name: a variable that nobody thought of stays with the server.
_NEEDED = (
    # the system
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_", "TZ", "TMPDIR", "TERM", "XDG_", "LD_", "LIBRARY_PATH"),
    # Python, and compilers that kernels are built with
    *("PYTHON", "VIRTUAL_ENV", "CONDA_", "CC", "CXX", "CPATH", "MAX_JOBS", "COVERAGE_"),
    # devices
    *("CUDA", "NVIDIA_", "NCCL_", "CUBLAS", "CUDNN", "HIP_", "ROCR_", "HSA_", "GPU_"),
    # what trains
    *("UNSLOTH_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "DATASETS_", "ACCELERATE_", "TRL_", "PEFT_"),
    *("TORCH", "PYTORCH_", "TRITON_", "BNB_", "BITSANDBYTES_", "XFORMERS_", "SAFETENSORS_", "TENSORBOARD_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "GRPC_"),
    # the way to the Hub
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
# Parts of a variable's name, between underscores, that say that its value is a secret.
_SECRET_PARTS = frozenset(
    {"TOKEN", "TOKENS", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "APIKEY"}
)
_SECRET_ENDINGS = ("_KEY", "_API_KEY", "_AUTH")
# The server's own settings, which may hold tokens, and where it sends traces, with the headers for that.
_OWN_PREFIXES = ("UNSLOTHD_", "OTEL_")
_ALWAYS = {
    "UNSLOTH_AUTO_INSTALL": "0",  # Unsloth's GGUF export would clone, pip-install and apt-install
    "GRPC_ENABLE_FORK_SUPPORT": "0",  # forks by datasets or a DataLoader would crash or hang
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that "cuda:0" is the device that NVML lists first
    "PYTHONUNBUFFERED": "1",  # the log of a killed worker is whole
    "PYTHONFAULTHANDLER": "1",  # the log of a crashed one says where
}
_UNLESS_SET = {
    "UNSLOTH_DISABLE_STATISTICS": "1",
    # OpenMP threads that spin while they wait make workers that share a CPU many times slower; threads that never
    # spin make one alone a third slower. A short spin does neither: docs/decisions/0006-short-spins.md has figures.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
}
# `import unsloth` sets it to "python" for child processes, which makes protobuf slow.
_NEVER = frozenset({"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"})


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment for a worker.

    Args:
        environ: The server's environment.
    """
    kept = {name: value for name, value in environ.items() if _is_needed(name) and not _is_secret(name)}
    if "PYTHONPATH" in kept:
        # A worker has another working directory.
        parts = [str(Path(part).absolute()) for part in kept["PYTHONPATH"].split(os.pathsep) if part]
        kept["PYTHONPATH"] = os.pathsep.join(parts)
    return {**_UNLESS_SET, **kept, **_ALWAYS}


def _is_needed(name: str) -> bool:
    return name.upper().startswith(_NEEDED) and name not in _NEVER


def _is_secret(name: str) -> bool:
    upper = name.upper()
    return (
        upper.startswith(_OWN_PREFIXES)
        or not _SECRET_PARTS.isdisjoint(upper.split("_"))
        or upper.endswith(_SECRET_ENDINGS)
    )
