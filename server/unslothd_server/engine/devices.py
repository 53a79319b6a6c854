"""Where a model computes, which its first parameter does not tell: that may lie in RAM for want of device memory."""

from typing import Any


def compute_device(model: Any) -> Any:
    """The torch.device that a model's layers run on.

    Where a card is nearly full, Unsloth leaves the input embedding in RAM and sends only the rows that are looked up.
    """
    first = next(model.parameters()).device
    if first.type != "cpu":
        return first
    return next((each.device for each in model.parameters() if each.device.type != "cpu"), first)


def on_gpu(model: Any) -> bool:
    """True when a model's layers run on a GPU."""
    return bool(compute_device(model).type == "cuda")


def device_name(model: Any) -> str:
    """The device as a user names it: "cuda:0" or "cpu"."""
    device = compute_device(model)
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"


def device_title(model: Any) -> str:
    """Device and product name, e.g. "cuda:0 (NVIDIA H100 80GB HBM3)"; "cpu" for the CPU."""
    import torch

    name = device_name(model)
    return f"{name} ({torch.cuda.get_device_name(name)})" if name.startswith("cuda") else name


def bytes_in_ram(model: Any) -> int:
    """Bytes of parameters that lie in RAM while the layers run elsewhere."""
    device = compute_device(model)
    parameters = () if device.type == "cpu" else model.parameters()
    return sum(each.numel() * each.element_size() for each in parameters if each.device.type == "cpu")
