"""Whether the Hugging Face Hub answers, and whether the clock is right by its own."""

import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

from unslothd_server.checks.finding import Finding, ok, problem, warning

_DEFAULT_HUB = "https://huggingface.co"
_TRUE = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads it
_MOST_CLOCK_SECONDS = 60.0


def hub_and_clock_findings(home: Path, timeout_seconds: float = 10.0) -> Iterator[Finding]:
    """Asks the Hub once, without a token, unless HF_HUB_OFFLINE says not to; and compares the clock with the answer.

    Args:
        home: Home of the server; its files must not be of the future.
        timeout_seconds: Bound of it all, name resolution too.
    """
    hub = os.environ.get("HF_ENDPOINT") or _DEFAULT_HUB
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
        yield ok("Hub", "not asked: HF_HUB_OFFLINE is set, only models and datasets of this host are used")
        yield clock_finding(home, None)
        return
    answer = _ask(hub, timeout_seconds)
    if isinstance(answer, str):
        mend = (
            "Models and datasets of this host can be used. For those of the Hub see HTTPS_PROXY, HF_ENDPOINT and "
            "SSL_CERT_FILE; to live without it set HF_HUB_OFFLINE=1, so that nobody waits for it."
        )
        yield warning("Hub", f"offline: {hub} does not answer ({answer})", mend)
        yield clock_finding(home, None)
        return
    token = "with a token of this host" if os.environ.get("HF_TOKEN") else "no HF_TOKEN: public repositories only"
    yield ok("Hub", f"{hub} answers ({token})")
    yield clock_finding(home, answer)


def clock_finding(home: Path, their_date: float | None) -> Finding:
    """Whether the clock is right.

    Args:
        home: Home of the server.
        their_date: Seconds since 1970 by another host's clock; None = not told.
    """
    now = time.time()
    mend = "Let the clock be kept by NTP: timedatectl set-ntp true. Ids and times of trainings depend on it."
    trainings = home / "trainings"
    newest = max((each.stat().st_mtime for each in trainings.iterdir()), default=now) if trainings.is_dir() else now
    if newest > now + _MOST_CLOCK_SECONDS:
        return problem("clock", f"the newest training is {newest - now:.0f} s in the future: the clock went back", mend)
    if their_date is None:
        return ok("clock", "behind none of the home's files; nobody else's clock to compare it with")
    if abs(their_date - now) > _MOST_CLOCK_SECONDS:
        return warning("clock", f"{abs(their_date - now):.0f} s off the Hub's", mend)
    return ok("clock", "agrees with the Hub's")


def _ask(url: str, timeout_seconds: float) -> float | str:
    """Returns the date of an answer, whatever its status; or in words why there is none."""
    answers: queue.Queue[float | str] = queue.Queue()

    def ask() -> None:
        answers.put(_date_of(url, timeout_seconds))

    # Nothing bounds the resolution of a name; the thread may outlive this call, not the process.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=timeout_seconds)
    except queue.Empty:
        return f"nothing in {timeout_seconds:g} s"


def _date_of(url: str, timeout_seconds: float) -> float | str:
    if not url.startswith(("http://", "https://")):
        return "no web address"
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - checked above
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as response:  # noqa: S310 - checked above
            headers = response.headers
    except urllib.error.HTTPError as error:
        headers = error.headers  # it answers; what the root page says does not matter
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    try:
        return parsedate_to_datetime(headers["Date"]).timestamp()
    except (TypeError, ValueError):
        return time.time()
