"""What is said about a worker that ended: the cause, what to do, the end of its log, and no secret."""

from pathlib import Path

import pytest

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.app.worker_exit import WorkerExit, worker_died
from unslothd_server.status import to_status
from unslothd_server.worker.exit_record import ExitRecord
from unslothd_server.workers.exit_report import MAX_TAIL_BYTES, mask_secrets, read_tail, worker_exit


def ended(returncode: int | None, tmp_path: Path, record: ExitRecord | None = None) -> WorkerExit:
    return worker_exit(returncode, record, tmp_path / "worker.log", asked=False)


def test_a_kill_is_named_by_its_signal_with_the_end_of_the_log(tmp_path: Path):
    (tmp_path / "worker.log").write_text("one\ntwo\n")

    error = worker_died("llama", ended(-9, tmp_path))

    assert error.reason == ErrorReason.ERROR_REASON_WORKER_DIED
    assert error.metadata == {"model_id": "llama", "signal": "SIGKILL"}
    assert error.message == (
        'The worker process of model "llama" was ended by SIGKILL '
        "(mostly the kernel's out-of-memory killer, or "
        "somebody's kill -9). Unload the model and load it again. Last lines of its log:\none\ntwo"
    )


def test_an_exit_code_is_named(tmp_path: Path):
    error = worker_died("llama", ended(7, tmp_path))

    assert error.metadata == {"model_id": "llama", "exit_code": "7"}
    assert "ended by itself with exit code 7" in error.message


def test_a_real_time_signal_without_a_name_is_told_by_its_number(tmp_path: Path):
    assert ended(-40, tmp_path).signal == "signal 40"


def test_the_exit_record_speaks_for_a_process_that_was_not_our_child(tmp_path: Path):
    assert ended(None, tmp_path, ExitRecord(1, 3, "why")).exit_code == 3
    assert ended(None, tmp_path) == WorkerExit(exit_code=None, signal=None, log_tail="", asked=False)
    assert "nobody saw how it ended" in worker_died("llama", ended(None, tmp_path)).message


def test_the_tail_is_bounded_in_lines_and_bytes_and_whole_text(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(10_000)))
    assert read_tail(log).split("\n") == [f"line {number}" for number in range(9985, 10_000)]

    log.write_text("é█" * 50_000)
    tail = read_tail(log)
    assert MAX_TAIL_BYTES - 4 < len(tail.encode()) <= MAX_TAIL_BYTES
    assert set(tail) == {"é", "█"}


def test_the_worst_tail_fits_into_the_trailers_of_a_call(tmp_path: Path):
    (tmp_path / "worker.log").write_text("█" * 50_000)
    error = worker_died("m" * 64, ended(-11, tmp_path))

    percent_encoded = sum(1 if 32 <= byte < 127 else 3 for byte in error.message.encode())
    base64 = len(to_status(error).SerializeToString()) * 4 // 3

    assert percent_encoded + base64 < 8192


def test_of_a_progress_bar_only_the_last_drawing_stays_and_colours_go(tmp_path: Path):
    log = tmp_path / "log"
    log.write_bytes(b"start\n 10%|#   |\r 50%|##  |\r100%|####|\r\n\x1b[31mred\x1b[0m \xff\n")

    assert read_tail(log) == "start\n100%|####|\nred �"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("token hf_abcdefghijklmnop.", "token hf_***."),
        ("Authorization: Bearer abcdef.ghi-jkl", "Authorization: Bearer ***"),
        ("HF_TOKEN=verysecret next", "HF_TOKEN=*** next"),
        ("{'api_key': 'abcdefgh'}", "{'api_key': '***'}"),
        ("https://me:pass@host/x", "https://me:***@host/x"),
        ("tokens: 128, tokenizer loaded", "tokens: 128, tokenizer loaded"),
    ],
)
def test_what_looks_like_a_secret_is_masked(text: str, masked: str):
    assert mask_secrets(text) == masked


def test_of_a_crash_the_cause_and_the_stack_of_its_thread_are_shown(tmp_path: Path):
    others = "".join(f"Thread 0x{number:x}:\n  File x in wait\n" for number in range(50))
    stack = "".join(f"  File frame{number}\n" for number in range(30))
    (tmp_path / "log").write_text(
        f"loading\nFatal Python error: Segmentation fault\n\n{others}Current thread 0xff:\n{stack}"
    )

    tail = read_tail(tmp_path / "log").split("\n")

    assert tail[:4] == ["loading", "Fatal Python error: Segmentation fault", "Current thread 0xff:", "  File frame0"]
    assert len(tail) <= 15


def test_a_missing_log_is_an_empty_tail(tmp_path: Path):
    assert read_tail(tmp_path / "none") == ""
