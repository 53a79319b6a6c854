"""What Unsloth counts of recorded shapes is forgotten with them; what wraps the layer here is Unsloth's own."""

from typing import Any

import pytest
import torch

from support.engine_runs import Loaded
from unslothd_server.engine.recorded_passes import forget_recorded, shapes_counted


class Layer(torch.nn.Module):
    """As little as Unsloth's wrapper needs."""

    def forward(self, hidden_states: Any) -> Any:
        return hidden_states


@pytest.fixture
def recording(prepared: Loaded) -> Layer:
    """A layer whose class Unsloth has wrapped to record its launches."""
    from unsloth.models import _block_compile

    class Wrapped(Layer):
        pass

    _block_compile._wrap(Wrapped, {"triton.cudagraphs": True})
    return Wrapped()


def test_the_count_of_shapes_begins_anew_after_unsloth_has_given_up(recording: Layer):
    counted = shapes_counted(type(recording).forward)
    assert counted == (set(), [False])
    shapes, given_up = counted
    shapes.update((8, 64 * number, 2048) for number in range(1, 10))
    given_up[0] = True
    forget_recorded(torch.nn.Sequential(recording, torch.nn.Linear(2, 2)))
    assert shapes_counted(type(recording).forward) == (set(), [False])


@pytest.mark.parametrize("forward", [Layer.forward, torch.nn.Linear.forward, len])
def test_other_layers_count_nothing(forward: Any):
    assert shapes_counted(forward) is None
