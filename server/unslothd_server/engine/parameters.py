"""Logical parameter counts: what a model has, not how its weights happen to be packed."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ParameterCounts:
    """Counts of a model.

    Args:
        total: Parameters of the base model; adapters are not in it, a shared weight counts once.
        trainable: Parameters that require gradients, adapters included.
    """

    total: int
    trainable: int


def count_parameters(model: Any) -> ParameterCounts:
    """Counts the parameters of a torch module, with or without a PEFT adapter; meta tensors are fine.

    A weight that modules_to_save copied counts once in `total`: the copy is part of the adapter.
    """
    total = trainable = 0
    # named_parameters() names a tied weight once.
    for name, parameter in model.named_parameters():
        count = logical_size(parameter)
        if not is_adapter_parameter(name):
            total += count
        if parameter.requires_grad:
            trainable += count
    return ParameterCounts(total, trainable)


def logical_size(parameter: Any) -> int:
    """Number of weights that a parameter stands for: two or more in a byte when it is quantised."""
    state = getattr(parameter, "quant_state", None)
    shape = getattr(state, "shape", None)
    if shape is not None:
        count = 1
        for size in shape:
            count *= int(size)
        return count
    if type(parameter).__name__ == "Params4bit" and getattr(parameter, "bnb_quantized", False):
        # Packed before its state was kept: two values in every byte of the storage type.
        return int(parameter.numel()) * int(parameter.element_size()) * 2
    return int(parameter.numel())


def is_adapter_parameter(name: str) -> bool:
    """True for the name of a parameter that PEFT added."""
    return "lora_" in name or ".modules_to_save." in name
