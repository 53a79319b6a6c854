"""The audit log: a line for every call, bounded, tight, and never in the way."""

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from unslothd.v1.server_info_pb2 import Scope
from unslothd_server.access.audit import AuditLog, CallRecord, calls_of_tokens
from unslothd_server.access.callers import of_certificate, of_token
from unslothd_server.access.tokens import Token

ALICE, BOB = of_certificate("CN=alice", Scope.SCOPE_READ), of_certificate("CN=bob", Scope.SCOPE_READ)


def record(**fields: Any) -> CallRecord:
    return CallRecord(**{"rpc": "GetModel", "address": "ipv4:10.0.0.7:5", "caller": ALICE, **fields})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_who_did_what_on_which_and_how_it_ended(tmp_path: Path):
    audit = AuditLog(tmp_path / "audit.jsonl", 1 << 20, 2)
    told = record(rpc="Train", ids={"model_id": "m"}, call_id="c")
    audit.begun(told)
    told.code, told.reason, told.ms = "NOT_FOUND", "MODEL_NOT_FOUND", 1.5
    audit.ended(told)
    begun, ended = lines(tmp_path / "audit.jsonl")
    assert begun.pop("time") <= ended.pop("time")
    call = {
        "call_id": "c",
        "caller": "CN=alice",
        "kind": "certificate",
        "address": "ipv4:10.0.0.7:5",
        "rpc": "Train",
        "model_id": "m",
    }
    assert begun == {"event": "begun", **call}
    assert ended == {"event": "ended", **call, "code": "NOT_FOUND", "reason": "MODEL_NOT_FOUND", "ms": 1.5}


def test_names_cannot_forge_a_line(tmp_path: Path):
    audit = AuditLog(tmp_path / "audit.jsonl", 1 << 20, 2)
    audit.ended(record(caller=of_certificate('CN=x"\n{"event": "ended"}', Scope.SCOPE_READ)))
    (line,) = lines(tmp_path / "audit.jsonl")
    assert line["caller"] == 'CN=x"\n{"event": "ended"}'


def test_it_is_turned_over_and_bounded_and_only_its_user_reads_it(tmp_path: Path):
    audit = AuditLog(tmp_path / "audit.jsonl", 2000, 2)
    for number in range(100):
        audit.ended(record(ids={"model_id": str(number)}))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(file.stat().st_size <= 2000 for file in files)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert lines(files[0])[-1]["model_id"] == "99"


def test_it_goes_on_where_an_earlier_server_stopped_and_ends_its_torn_line(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    path.write_text('{"whole": 1}\n{"tor')
    AuditLog(path, 1 << 20, 2).ended(record())
    first, torn, last = path.read_text().splitlines()
    assert (first, torn) == ('{"whole": 1}', '{"tor')
    assert json.loads(last)["rpc"] == "GetModel"


def test_a_full_disk_stops_nothing_and_the_lines_that_it_cost_are_told(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path, 1 << 20, 2)
    path.symlink_to("/dev/full")
    for _ in range(3):
        audit.ended(record())
    path.unlink()
    audit.ended(record(code="CANCELLED"))
    audit.ended(record())
    told, last, next_one = lines(path)
    assert (told, last["code"], next_one["code"]) == ({"lost_lines": 3}, "CANCELLED", "OK")


def test_a_flood_of_refused_calls_is_one_line_a_second_and_caller(tmp_path: Path):
    audit = AuditLog(tmp_path / "audit.jsonl", 1 << 20, 2)
    for _ in range(50):
        audit.ended(record(code="RESOURCE_EXHAUSTED", reason="TOO_MANY_REQUESTS"))
        audit.ended(record(code="RESOURCE_EXHAUSTED", reason="TOO_MANY_REQUESTS", caller=BOB))
    audit.ended(record(code="OK"))
    found = lines(tmp_path / "audit.jsonl")
    assert len(found) <= 5
    assert {line["caller"] for line in found} == {"CN=alice", "CN=bob"}
    assert found[-1]["code"] == "OK"


def test_what_was_written_is_read_back_from_all_files(tmp_path: Path):
    path, started = tmp_path / "audit.jsonl", datetime.now(UTC) - timedelta(milliseconds=1)
    assert calls_of_tokens(path) == (None, {})
    audit = AuditLog(path, 1, 5)  # a file a line
    token = Token("bob's token", "0" * 64, Scope.SCOPE_READ, started, None)
    audit.ended(record(caller=of_token(token)))
    audit.ended(record())
    oldest, newest = calls_of_tokens(path)
    assert oldest is not None
    assert started <= oldest <= datetime.now(UTC)
    assert newest == {"bob's token": oldest}
