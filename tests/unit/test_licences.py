"""Every pinned package has a licence that is known and compatible with ours."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def licences(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    return import_module("licences_page")


def test_the_page_of_licences_is_fresh(licences):
    assert (ROOT / "docs/licences.md").read_text() == licences.page(), (
        "look at what changed, then run: .venv/bin/python scripts/licences_page.py > docs/licences.md"
    )


@pytest.mark.parametrize(
    "expression",
    ["MIT", "Apache-2.0 AND MIT", "GPL-3.0-only OR MIT", "Apache-2.0 WITH LLVM-exception", "LGPL-3.0-or-later"],
)
def test_these_are_compatible(licences, expression: str):
    assert licences.is_compatible(expression)


@pytest.mark.parametrize(
    "expression", ["", "GPL-3.0-or-later", "AGPL-3.0-only", "MIT AND GPL-2.0-only", "Some License of Ours"]
)
def test_these_are_not(licences, expression: str):
    assert not licences.is_compatible(expression)


def test_a_new_package_with_another_licence_ends_the_page_with_its_name(licences, monkeypatch: pytest.MonkeyPatch):
    real = licences.licence_of
    monkeypatch.setattr(licences, "licence_of", lambda name: "AGPL-3.0-only" if name == "click" else real(name))
    with pytest.raises(SystemExit, match=r"click: AGPL-3\.0-only"):
        licences.page()
