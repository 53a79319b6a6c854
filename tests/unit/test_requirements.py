"""What is pinned in requirements/dev.txt is what the extras of pyproject.toml need, and nothing else."""

import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKED_EXTRAS = ("cli", "server", "otel", "mcp", "dev")  # as scripts/lock.sh names them


def asked_for() -> list[Requirement]:
    """What pyproject.toml asks for, without the extras of our own that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for extra in LOCKED_EXTRAS for text in project["optional-dependencies"][extra]]
    asked = [Requirement(text) for text in (*project["dependencies"], *extras)]
    return [each for each in asked if each.name != "unslothd"]


def needs_of(requirement: Requirement) -> Iterator[Requirement]:
    """What an installed package needs on this system, with the extras that are asked for."""
    for text in metadata.requires(requirement.name) or []:
        needed = Requirement(text)
        extras = requirement.extras or {""}
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
            yield needed


def needed_here() -> set[str]:
    """Names of all packages that are needed on this system."""
    left, seen = asked_for(), set[tuple[str, frozenset[str]]]()
    while left:
        requirement = left.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            left.extend(needs_of(requirement))
    return {name for name, _ in seen}


def pinned_here() -> set[str]:
    """Names of all packages that are pinned for this system."""
    lines = (ROOT / "requirements" / "dev.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(each.name) for each in pinned if each.marker is None or each.marker.evaluate()}


def test_every_pinned_package_is_needed() -> None:
    assert pinned_here() - needed_here() == set(), "run: make lock"


def test_every_needed_package_is_pinned() -> None:
    assert needed_here() - pinned_here() == set(), "run: make lock"
