"""Bars on stderr for work that has parts: one a file or a phase, gone before results are printed."""

from types import TracebackType
from typing import Self

from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn

from unslothd.cli.session import Output


class Bars:
    """A bar for each part while a person looks; else a line when a part begins, and nothing with --json.

    Args:
        out: Where to.
        columns: What stands behind each bar.
    """

    def __init__(self, out: Output, *columns: ProgressColumn) -> None:
        self._out = out
        self._live = out.notes.is_terminal and not out.as_json
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), *columns, console=out.notes, transient=True
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def show(self, part: str, done: int, total: int) -> None:
        """Shows how far a part is; a total of 0 is unknown."""
        if part not in self._tasks:
            self._tasks[part] = self._progress.add_task(escape(part), total=total or None)
            if not self._live and not self._out.as_json:
                self._out.note(part)
        self._progress.update(self._tasks[part], completed=done, total=total or None)
