"""Figures of steps that come otherwise than the device brings them: `service_trainer.Reading` is replaced by one."""

import itertools
from collections.abc import Collection
from typing import Any

from unslothd_server.engine.transfers import Reading


class Late(Reading):
    """Of a device that is behind until it is waited for."""

    @property
    def ready(self) -> bool:
        return False


class Soon(Reading):
    """Not there when their step ends, and there when they are next looked for."""

    def __init__(self, numbers: Any) -> None:
        super().__init__(numbers)
        self._looks = 0

    @property
    def ready(self) -> bool:
        self._looks += 1
        return self._looks > 1


def at_once(steps: Collection[int] | None = None) -> type[Reading]:
    """Waited for at the end of their step.

    Args:
        steps: Of which, counted from 1 as they are read; None = of all. Others come as the device brings them.
    """
    count = itertools.count(1)

    class AtOnce(Reading):
        def __init__(self, numbers: Any) -> None:
            super().__init__(numbers)
            self._step = next(count)

        @property
        def ready(self) -> bool:
            if steps is None or self._step in steps:
                self.made.wait()
            return super().ready

    return AtOnce
