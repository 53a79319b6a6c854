"""Layers that Unsloth compiles and records: compiled once, forgotten whole. What wraps them here is Unsloth's own."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from support.engine_runs import Loaded
from unslothd_server.engine.recorded_passes import forget_recorded, of_few_widths, shapes_counted


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


@pytest.mark.parametrize(
    ("within", "compilations"),
    # Should Unsloth need one by itself some day, of_few_widths has a purpose less.
    [(of_few_widths, 1), (nullcontext, 2)],
)
def test_layers_are_compiled_once_for_all_widths(
    prepared: Loaded, monkeypatch: pytest.MonkeyPatch, within: Callable[[], Any], compilations: int
):
    from unsloth.models import _block_compile

    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(16))

        def forward(self, hidden_states: Any, attention_mask: Any) -> Any:
            return hidden_states * self.weight * attention_mask[..., None]

    compiled, compile_really = [], torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    def compile_with_it(function: Any, *, fullgraph: bool, dynamic: bool | None, options: Any, **others: Any) -> Any:
        return compile_really(function, fullgraph=fullgraph, dynamic=dynamic, backend=backend, **others)

    monkeypatch.setattr(torch, "compile", compile_with_it)
    _block_compile._wrap(Product, {"triton.cudagraphs": True})
    layer = Product()
    for width in (64, 32, 48, 64):
        with within():
            layer(torch.ones(8, width, 16, requires_grad=True), attention_mask=torch.ones(8, width)).sum().backward()
    assert len(compiled) == compilations


@pytest.mark.parametrize("forward", [Layer.forward, torch.nn.Linear.forward, len])
def test_other_layers_count_nothing(forward: Any):
    assert shapes_counted(forward) is None
