"""Gates that let a scripted training (see `fake_worker.py`) go on step by step, so that tests need no sleeps."""

from pathlib import Path


class StepGate:
    """A folder in which files stand for open gates.

    Args:
        folder: Made when it does not exist; its path goes into the knob "gate" or "step_gate".
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return str(self.folder)

    def open(self, *steps: int) -> None:
        """Lets these steps go on."""
        for step in steps:
            (self.folder / str(step)).touch()

    def open_all(self) -> None:
        """Lets every step go on."""
        (self.folder / "all").touch()

    def is_reached(self, step: int) -> bool:
        """Tells whether the training waits, or has waited, at this step."""
        return (self.folder / f"at-{step}").exists()
