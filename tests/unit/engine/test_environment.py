"""The heavy import refuses an order in which Unsloth patches nothing."""

import sys
from types import ModuleType

import pytest

from unslothd_server.engine.environment import PATCHED_PACKAGES, import_libraries


@pytest.mark.parametrize("name", PATCHED_PACKAGES)
def test_what_unsloth_patches_may_not_be_imported_before_it(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    for other in PATCHED_PACKAGES:
        monkeypatch.delitem(sys.modules, other, raising=False)
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(RuntimeError, match=f"^{name} must not be imported before unsloth"):
        import_libraries()
