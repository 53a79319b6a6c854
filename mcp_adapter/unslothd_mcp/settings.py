"""What the person who installs the adapter decides: what agents may do, and how much of it."""

import uuid
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Limits of what agents may do.

    Args:
        read_only: Offer only the tools that change nothing.
        max_gpu_minutes: Minutes that the trainings started here may run, all together; None = no limit.
        max_steps: Most optimizer steps of a training; None = no limit.
        allowed_roots: Folders of this machine whose files may be uploaded; empty = none.
        budget_name: Marks the trainings that count against max_gpu_minutes, on the server.
    """

    read_only: bool = False
    max_gpu_minutes: float | None = None
    max_steps: int | None = None
    allowed_roots: tuple[Path, ...] = ()
    budget_name: str = field(default_factory=lambda: uuid.uuid4().hex)
