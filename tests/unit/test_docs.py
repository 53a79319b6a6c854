"""What the docs say is what is there."""

import re
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason

ROOT = Path(__file__).parents[2]


def test_the_table_of_errors_has_every_reason_of_the_contract():
    listed = re.findall(r"^\| ([A-Z_]+) \|", (ROOT / "docs" / "errors.md").read_text(), re.M)
    reasons = [name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()]  # noqa: SIM118 - an enum wrapper
    assert listed == [reason for reason in reasons if reason != "UNSPECIFIED"]


def test_every_promise_names_a_test_that_is_there():
    promised = re.findall(r"`(tests/[^`]+)::([^`]+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert promised
    missing = [
        f"{path}::{name}"
        for path, name in promised
        if not re.search(rf"^(def {name}\(|{name} = )", (ROOT / path).read_text(), re.M)
    ]
    assert missing == []


def test_every_threat_names_tests_that_are_there():
    named = set(re.findall(r"`(tests/[^`]+)`", (ROOT / "docs" / "security.md").read_text()))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_link_between_our_pages_leads_somewhere():
    broken = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert broken == []
