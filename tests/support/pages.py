"""The fenced blocks of a Markdown page, for tests that run what the page shows."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCED = re.compile(r"(?:^<!-- not run: (?P<why>.*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        language: As the fence names it.
        code: What stands in it.
        not_run: Why no test can run it, of the comment `<!-- not run: … -->` on the line above; empty = it can.
    """

    language: str
    code: str
    not_run: str = ""


def blocks(page: Path) -> list[Block]:
    """Returns the blocks of a page, in order."""
    return [Block(each["language"], each["code"], each["why"] or "") for each in _FENCED.finditer(page.read_text())]


def to_run(page: Path, language: str) -> list[str]:
    """Returns the code of the blocks in one language that a test can run; there must be some."""
    found = [each.code for each in blocks(page) if each.language == language and not each.not_run]
    assert found, f"{page} has no block in {language}"
    return found
