"""Passes whose launches Unsloth records as CUDA graphs: which those are, and how they are forgotten.

Unsloth counts the shapes of all passes that a layer class ever had, and records nothing more once there are eight. A
second training of other widths would get there, so the count begins anew when what was recorded is forgotten.
"""

import gc
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from unslothd_server.engine.devices import on_gpu

# Where Unsloth's compiled forward keeps its count: variables of the function `run` inside it. Should they go away, the
# count goes on.
INSIDE, SHAPES, GIVEN_UP = "run", "graph_shapes", "graphs_off"


def may_have_recorded(trainer: Any) -> bool:
    """True when a trainer's passes are of the kind whose launches are recorded."""
    return bool(trainer.passes.split.has_few_shapes) and on_gpu(trainer.model)


def forget_recorded(model: Any) -> None:
    """Gives back the memory that recorded launches of padded passes keep; they are recorded anew when they come."""
    import torch

    model.zero_grad(set_to_none=True)
    torch.compiler.reset()
    for forward in {type(module).forward for module in model.modules()}:
        counted = shapes_counted(forward)
        if counted is not None:
            shapes, given_up = counted
            shapes.clear()
            given_up[0] = False
    gc.collect()
    torch.cuda.empty_cache()


def shapes_counted(forward: Callable[..., Any]) -> tuple[set[tuple[int, ...]], list[bool]] | None:
    """What Unsloth counts for a class of layers: the shapes, and in a list whether it has given up to record.

    None where this is not the forward of layers that Unsloth compiles.
    """
    inside = _variables(forward).get(INSIDE)
    counts = _variables(inside)
    shapes, given_up = counts.get(SHAPES), counts.get(GIVEN_UP)
    return (shapes, given_up) if isinstance(shapes, set) and given_up in ([True], [False]) else None


def _variables(function: Any) -> dict[str, Any]:
    """Variables that a function has from the one around it, those that have no value yet left out."""
    found: dict[str, Any] = {}
    if inspect.isfunction(function):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):
                found[name] = cell.cell_contents
    return found
