"""The weights of a model with its adapter merged in, each made only when it is asked for; the model is only read."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.engine.readback import weights_dtype
from unslothd_server.export_formats import export_unsupported

_QUANTISED = ("Params4bit", "Int8Params")
_MATRIX = 2


@dataclass(frozen=True)
class Weight:
    """One weight of the merged model.

    Args:
        module: The module of the base model that owns it.
        tensor: As it is in the model, perhaps quantised.
        shape: Of the merged weight.
        dtype: Of the merged weight; None for integers, which stay as they are.
        layer: The LoRA layer that adds to it; None without one.
        original: Where the unquantised weight is on disk; None = take `tensor`.
    """

    module: Any
    tensor: Any
    shape: tuple[int, ...]
    dtype: Any
    layer: Any = None
    original: "tuple[Path, str] | None" = None

    @property
    def is_linear(self) -> bool:
        """True for the matrix of a linear layer."""
        import torch

        return isinstance(self.module, torch.nn.Linear) and len(self.shape) == _MATRIX

    @property
    def num_bytes(self) -> int:
        """Size of the merged weight."""
        import torch

        return torch.empty(self.shape, dtype=self.dtype or self.tensor.dtype, device="meta").nbytes

    def make(self) -> Any:
        """Returns the merged weight, on the device where it was merged."""
        import torch

        with torch.no_grad():
            value = self._base()
            for adapter in self.layer.active_adapters if self.layer is not None else ():
                if adapter in self.layer.scaling:
                    delta = self.layer.get_delta_weight(adapter).float()
                    value = value.to(delta.device).float() + delta
            return value if self.dtype is None else value.to(self.dtype)

    def _base(self) -> Any:
        from peft.utils.integrations import dequantize_module_weight
        from safetensors import safe_open

        if self.original is not None:
            file, name = self.original
            with safe_open(file, framework="pt") as stored:
                return stored.get_tensor(name)
        if type(self.tensor).__name__ in _QUANTISED:
            return dequantize_module_weight(self.module)
        return self.tensor.detach()


@dataclass(frozen=True)
class MergedWeights:
    """What a merged model consists of.

    Args:
        base: The Transformers model without its adapter; its config and classes describe the merged one.
        dtype: torch.bfloat16, or torch.float16 where the model computes in it.
        weights: By their names in a plain checkpoint.
        is_tied: False when training made input and output embeddings differ, so that both are written.
    """

    base: Any
    dtype: Any
    weights: dict[str, Weight]
    is_tied: bool


def merged_weights(loaded: LoadedModel) -> MergedWeights:
    """Returns the weights of the model with its adapter, if it has one.

    Raises:
        PreconditionError: EXPORT_UNSUPPORTED: the adapter is of a kind that is more than an added matrix.
    """
    import torch

    base = loaded.model.get_base_model() if getattr(loaded.model, "peft_config", None) else loaded.model
    dtype = torch.float16 if weights_dtype(base) == "float16" else torch.bfloat16
    originals = _originals(loaded, base)
    weights = {name: _in_half(weight, name, dtype, originals) for name, weight in _walk(base, "")}
    for name in base._keys_to_ignore_on_save or ():
        weights.pop(name, None)
    is_tied = _drop_tied(weights, base)
    return MergedWeights(base, dtype, weights, is_tied)


def _walk(module: Any, prefix: str) -> Iterator[tuple[str, Weight]]:
    """Yields weights by their names without the adapter, as the model would have them without PEFT."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(module, BaseTunerLayer):
        _require_plain_lora(module, prefix)
        for name, weight in _own(module.get_base_layer(), prefix):  # type: ignore[arg-type]
            yield name, _with_layer(weight, module) if name == f"{prefix}weight" else weight
    elif isinstance(module, ModulesToSaveWrapper):
        trained: Any = module.modules_to_save[module.active_adapters[0]]
        yield from _walk(trained, prefix)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise _cannot_merge(f"{prefix.rstrip('.')} has single trained tokens")
    else:
        yield from _own(module, prefix)
        for name, child in module.named_children():
            yield from _walk(child, f"{prefix}{name}.")


def _own(module: Any, prefix: str) -> Iterator[tuple[str, Weight]]:
    buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
    for name, tensor in {**module._parameters, **buffers}.items():
        if tensor is not None:
            yield f"{prefix}{name}", Weight(module, tensor, _shape(tensor), None)


def _shape(tensor: Any) -> tuple[int, ...]:
    state = getattr(tensor, "quant_state", None)
    return tuple(tensor.shape if state is None else state.shape)


def _with_layer(weight: Weight, layer: Any) -> Weight:
    return Weight(weight.module, weight.tensor, weight.shape, None, layer)


def _in_half(weight: Weight, name: str, dtype: Any, originals: dict[str, Path]) -> Weight:
    quantised = type(weight.tensor).__name__ in _QUANTISED
    if not quantised and not weight.tensor.is_floating_point():
        return weight
    original = (originals[name], name) if quantised and name in originals else None
    return Weight(weight.module, weight.tensor, weight.shape, dtype, weight.layer, original)


def _require_plain_lora(layer: Any, prefix: str) -> None:
    from peft.tuners.lora import Embedding, Linear, LoraLayer

    name = prefix.rstrip(".")
    plain = isinstance(layer, Linear | Embedding) or type(layer).__name__ in ("Linear4bit", "Linear8bitLt")
    if not isinstance(layer, LoraLayer) or not plain or layer.lora_variant:
        raise _cannot_merge(f"{name} has an adapter of another kind than LoRA")
    if any(layer.lora_bias.values()):
        raise _cannot_merge(f"{name} has an adapter with a bias of its own")


def _cannot_merge(what: str) -> Exception:
    return export_unsupported(f"This adapter cannot be merged: {what}. Export it as ADAPTER, and merge it with PEFT.")


def _drop_tied(weights: dict[str, Weight], base: Any) -> bool:
    """Leaves out weights that are another one's by a tie; returns False when training broke the tie."""
    is_tied = True
    for name, source in dict(base.all_tied_weights_keys).items():
        if name not in weights or source not in weights:
            continue
        here, there = weights[name], weights[source]
        if here.tensor is there.tensor and here.layer is None and there.layer is None:
            del weights[name]
        else:
            is_tied = False
    return is_tied


def _originals(loaded: LoadedModel, base: Any) -> dict[str, Path]:
    """Files of the unquantised weights by name, when the model was quantised while it was loaded; else empty.

    The adapter is merged into these, as Unsloth does: 4-bit weights are further from what the model was.
    """
    from safetensors import SafetensorError, safe_open

    if not any(type(parameter).__name__ in _QUANTISED for parameter in base.parameters()):
        return {}
    folder = _base_folder(loaded, base)
    if folder is None or "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return {}
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stored:
                found.update(dict.fromkeys(stored.keys(), file))
        except (OSError, SafetensorError):
            return {}  # it changed since it was loaded
    return found


def _base_folder(loaded: LoadedModel, base: Any) -> Path | None:
    """The folder that the base model was read from; None when it is gone."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = str(base.config._name_or_path)
    folder = Path(name)
    if not folder.is_dir():
        revision = loaded.request.revision if name == loaded.request.source else ""
        try:
            folder = Path(snapshot_download(name, revision=revision or None, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError):
            return None
    return folder if (folder / "config.json").is_file() else None
