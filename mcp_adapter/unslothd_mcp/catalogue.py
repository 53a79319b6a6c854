"""How a tool is described: its function, a title, and what hosts are told about its effects."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mcp_types import ToolAnnotations

# Parameters that the SDK fills: the context, and the user's answer to a question.
_INJECTED = frozenset({"ctx", "asked"})


@dataclass(frozen=True)
class ToolSpec:
    """A tool of the adapter; its name is the function's, its description the docstring.

    Args:
        function: Does it.
        title: For people.
        read_only: It changes nothing.
        destructive: It may remove what cannot be had back.
        idempotent: Calling it again changes nothing more.
        open_world: It may reach the Hugging Face Hub.
    """

    function: Callable[..., Any]
    title: str
    read_only: bool = False
    destructive: bool = False
    idempotent: bool = False
    open_world: bool = False

    @property
    def name(self) -> str:
        """Name of the tool."""
        return self.function.__name__

    @property
    def description(self) -> str:
        """What agents read."""
        return inspect.getdoc(self.function) or ""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of what agents may pass."""
        return tuple(name for name in inspect.signature(self.function).parameters if name not in _INJECTED)

    @property
    def annotations(self) -> ToolAnnotations:
        """What hosts are told."""
        return ToolAnnotations(
            title=self.title,
            read_only_hint=self.read_only,
            destructive_hint=self.destructive,
            idempotent_hint=self.idempotent or self.read_only,
            open_world_hint=self.open_world,
        )
