"""Evaluations and tries without a trace: what they do to random state and model, undone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

# Written by a trainer so that model and tokenizer agree.
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Random numbers drawn inside, by Python, numpy or torch, are not missed outside.

    Opening a DataLoader alone draws one, which would move all dropout after it.
    """
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def model_kept(model: Any) -> Iterator[None]:
    """Modes, hooks, wrapped methods and token ids of the model are afterwards as before, and gradients are gone.

    Weights are not copied: nothing inside may change them.
    """
    modules = [(module, dict(vars(module)), _hooks(module)) for module in model.modules()]
    configs = [config for config in (model.config, getattr(model, "generation_config", None)) if config is not None]
    tokens = [{name: getattr(config, name, None) for name in TOKEN_FIELDS} for config in configs]
    try:
        yield
    finally:
        for module, attributes, hooks in modules:
            _restore(vars(module), attributes)
            for name, known in hooks.items():
                _restore(vars(module)[name], known)
        for config, known in zip(configs, tokens, strict=True):
            for name, value in known.items():
                setattr(config, name, value)
        model.zero_grad(set_to_none=True)


def _hooks(module: Any) -> dict[str, dict[Any, Any]]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {name: dict(vars(module)[name]) for name in names if name in vars(module)}


def _restore(present: Any, known: dict[Any, Any]) -> None:
    for name in set(present) - set(known):
        del present[name]
    present.update(known)
