"""Writes what is made from the MCP tools themselves: the table in docs/mcp.md, and the snapshot that reviews look at.

`mcp_page.py --check` writes nothing and fails when one of them is stale.
"""

import asyncio
import json
import re
import sys
from pathlib import Path

import unslothd
from unslothd_mcp.app import TOOLS, Adapter
from unslothd_mcp.catalogue import ToolSpec
from unslothd_mcp.session import Session
from unslothd_mcp.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "mcp.md"
SNAPSHOT = ROOT / "tests" / "unit" / "mcp" / "tools.json"
_BEGIN, _END = "<!-- tools: scripts/mcp_page.py -->\n", "<!-- end of tools -->\n"


def main() -> int:
    """Writes both files, or with --check compares them; returns the exit code."""
    begin, _, rest = PAGE.read_text().partition(_BEGIN)
    end = rest.partition(_END)[2]
    wanted = {PAGE: f"{begin}{_BEGIN}{table()}{_END}{end}", SNAPSHOT: snapshot()}
    stale = [file for file, text in wanted.items() if not file.exists() or file.read_text() != text]
    if "--check" in sys.argv:
        for file in stale:
            print(f"{file.relative_to(ROOT)} is stale: run .venv/bin/python scripts/mcp_page.py")
        return 1 if stale else 0
    for file in stale:
        file.write_text(wanted[file])
    return 0


def table() -> str:
    """Returns a row for each tool: what it does, its arguments (optional ones with ?), what it may do."""
    head = "| Tool | What it does | Arguments | Effects |\n| --- | --- | --- | --- |\n"
    schemas = {tool["name"]: tool["inputSchema"] for tool in _tools()}
    return head + "".join(_row(tool, schemas[tool.name]) for tool in TOOLS)


def _row(tool: ToolSpec, schema: dict) -> str:
    needed = set(schema.get("required", ()))
    arguments = ", ".join(f"`{name}`" + ("" if name in needed else "?") for name in schema.get("properties", {}))
    effects = [
        text
        for text, holds in (
            ("reads only", tool.read_only),
            ("may destroy, asks first", tool.destructive),
            ("repeatable", tool.idempotent),
            ("may reach the Hub", tool.open_world),
        )
        if holds
    ]
    purpose = re.sub(r"\s+", " ", tool.description.partition("\n\n")[0])
    return f"| `{tool.name}` | {purpose} | {arguments or '–'} | {', '.join(effects) or 'adds'} |\n"


def snapshot() -> str:
    """Returns the whole list of tools as hosts get it."""
    return json.dumps(_tools(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _tools() -> list[dict]:
    adapter = Adapter(Session(unslothd.AsyncClient("127.0.0.1:1"), Settings()))
    tools = asyncio.run(adapter.list_tools())
    return [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools]


if __name__ == "__main__":
    sys.exit(main())
