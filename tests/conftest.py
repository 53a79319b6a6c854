"""What holds for every test: nothing of whoever runs them."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def no_settings_of_the_developer() -> Iterator[None]:
    """Takes away the variables that tell a developer's own clients and servers where to go."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("UNSLOTHD_")]:
            patch.delenv(name)
        yield
