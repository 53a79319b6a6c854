"""The Hugging Face Hub: when it may be asked, downloads that report bytes, and its errors in our words."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import (
    DatasetError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnavailableError,
    UnslothdError,
)

# What a model needs: never pickles, never code.
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
REMOTE_CODE_FILES = [*MODEL_FILES, "*.py"]

# The operator's wish, read before this module ever changes the variable.
OPERATOR_OFFLINE = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}


@contextmanager
def offline() -> Iterator[None]:
    """No request to the Hub inside: what is on disk needs no network, and a missing one must not be waited for."""
    with _hub_mode(offline=True):
        yield


@contextmanager
def online() -> Iterator[None]:
    """Requests to the Hub are allowed inside, unless the operator has set HF_HUB_OFFLINE."""
    with _hub_mode(offline=OPERATOR_OFFLINE):
        yield


@contextmanager
def _hub_mode(*, offline: bool) -> Iterator[None]:
    # The libraries read the variable once, at import, into these constants; Unsloth reads the variable.
    from datasets import config as datasets_config
    from huggingface_hub import constants

    before = os.environ.get("HF_HUB_OFFLINE"), constants.HF_HUB_OFFLINE, datasets_config.HF_HUB_OFFLINE
    os.environ["HF_HUB_OFFLINE"] = "1" if offline else "0"
    constants.HF_HUB_OFFLINE = datasets_config.HF_HUB_OFFLINE = offline
    try:
        yield
    finally:
        variable, constants.HF_HUB_OFFLINE, datasets_config.HF_HUB_OFFLINE = before
        if variable is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = variable


def download_model(
    repository: str, *, revision: str, token: str, trust_remote_code: bool, report: Callable[[int, int], None]
) -> str:
    """Brings a model repository into the local cache. Returns its folder.

    Args:
        repository: Hub id.
        revision: Branch, tag or commit; empty = "main".
        token: Hub token; empty = the operator's, if any.
        trust_remote_code: Also fetch the repository's Python files.
        report: Called with bytes done and bytes in all (0 = unknown).

    Raises:
        NotFoundError, PermissionDeniedError, UnavailableError: As `translate` says.
    """
    from huggingface_hub import snapshot_download

    try:
        with online():
            return snapshot_download(
                repository,
                revision=revision or None,
                token=token or None,
                allow_patterns=REMOTE_CODE_FILES if trust_remote_code else MODEL_FILES,
                tqdm_class=_reporting_bar(report),
            )
    except Exception as error:
        raise translate(error, repository, what="model") from error


def _reporting_bar(report: Callable[[int, int], None]) -> type[Any]:
    from tqdm.auto import tqdm

    class ReportingBar(tqdm):  # type: ignore[misc]
        """Passes the bytes of the snapshot's bar on; draws nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._counts_bytes = kwargs.get("unit") == "B"
            kwargs["disable"] = False
            kwargs["file"] = _Nowhere()
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self._counts_bytes:
                report(int(self.n), int(self.total or 0))
            return shown

    return ReportingBar


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None


def translate(error: Exception, repository: str, *, what: str) -> UnslothdError:
    """Turns a Hub error into one of ours.

    Args:
        error: As raised by huggingface_hub, datasets or the HTTP library below them.
        repository: For the text.
        what: "model" or "dataset".
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors

    chain = list(_causes(error))
    reasons = {
        "model": ErrorReason.ERROR_REASON_MODEL_SOURCE_NOT_FOUND,
        "dataset": ErrorReason.ERROR_REASON_DATASET_NOT_FOUND,
    }
    text = str(error)
    if any(isinstance(cause, errors.GatedRepoError) or _status(cause) in (401, 403) for cause in chain):
        return PermissionDeniedError(
            ErrorReason.ERROR_REASON_HUB_ACCESS_DENIED,
            f"The Hub does not give access to the {what} {repository}. Check its name, accept its terms on its Hub "
            "page, and pass a token that may read it.",
        )
    if any(isinstance(cause, errors.RepositoryNotFoundError | errors.RevisionNotFoundError) for cause in chain):
        return NotFoundError(
            reasons[what], f"The Hub has no {what} {repository}, or not that revision. Check the name and the revision."
        )
    if any(_is_network_error(cause) for cause in chain):
        return UnavailableError(
            ErrorReason.ERROR_REASON_HUB_UNREACHABLE,
            f"The {what} {repository} is not on this host and the Hub cannot be reached. Give a path on the server, "
            "or try again when the server has network access.",
        )
    if isinstance(error, DatasetNotFoundError | FileNotFoundError):
        return NotFoundError(reasons[what], f"There is no {what} {repository} ({text}). Check the name.")
    if what == "dataset":
        return _unreadable_dataset(text, repository)
    return NotFoundError(reasons[what], f"The {what} {repository} cannot be fetched: {text}. Check the name.")


def _unreadable_dataset(text: str, repository: str) -> UnslothdError:
    if "script" in text:
        return PreconditionError(
            ErrorReason.ERROR_REASON_REMOTE_CODE_REFUSED,
            f"The dataset {repository} needs code of its own, which is not run. Use its Parquet version "
            '(revision "refs/convert/parquet").',
        )
    return DatasetError(
        ErrorReason.ERROR_REASON_DATASET_ROW,
        f"The dataset {repository} cannot be read: {text}. Check config, split and revision.",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_network_error(error: BaseException) -> bool:
    import httpx
    from huggingface_hub import errors

    network = (httpx.TransportError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError)
    return isinstance(error, (*network, TimeoutError))
