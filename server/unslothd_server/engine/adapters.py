"""The adapter: attached by Unsloth from the contract's LoraConfig, and read back from PEFT."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import LoraConfig
from unslothd.worker.v1.worker_service_pb2 import PrepareForTrainingRequest
from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.engine.trained_weights import replace_weights
from unslothd_server.errors import FieldViolation, InvalidFieldsError, PreconditionError

DEFAULT_RANK = 16
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Trained in full when named as a target, as Unsloth does.
EMBEDDINGS = ("embed_tokens", "lm_head")


def prepare(loaded: LoadedModel, request: PrepareForTrainingRequest) -> None:
    """Makes the model trainable as asked. Asking again for the same changes nothing.

    Raises:
        PreconditionError: ALREADY_PREPARED: another adapter is attached. CHECKPOINT_DAMAGED: of weights_from.
        InvalidFieldsError: A module or layer that the model does not have; lora with full fine-tuning.
        NotFoundError: CHECKPOINT_NOT_FOUND: of weights_from.
    """
    _make_trainable(loaded, request)
    if request.weights_from:
        replace_weights(loaded.model, Path(request.weights_from))
        loaded.weights_from = request.weights_from


def _make_trainable(loaded: LoadedModel, request: PrepareForTrainingRequest) -> None:
    asked = _embeddings_in_full(request.lora) if request.HasField("lora") else None
    if loaded.request.full_finetuning:
        _refuse_adapter(asked)
        loaded.prepared = True
        return
    if loaded.prepared or loaded.from_adapter:
        _keep(loaded, asked)
        return
    config = complete(asked or LoraConfig(), loaded.model)
    _check_names(config, loaded.model)
    loaded.model = _attach(loaded, config, request)
    loaded.adapter_seed = request.seed
    loaded.prepared = True


def _embeddings_in_full(asked: LoraConfig) -> LoraConfig:
    """Embeddings named as targets move to modules_to_save, as Unsloth does it, so that equal wishes look equal."""
    moved = [name for name in asked.target_modules if name in EMBEDDINGS]
    config = LoraConfig()
    config.CopyFrom(asked)
    for name in moved:
        config.target_modules.remove(name)
        if name not in config.modules_to_save:
            config.modules_to_save.append(name)
    return config


def complete(asked: LoraConfig, model: Any) -> LoraConfig:
    """The config with every field set: as asked, else the engine's default."""
    config = LoraConfig()
    config.CopyFrom(asked)
    if not config.HasField("r"):
        config.r = DEFAULT_RANK
    if not config.HasField("lora_alpha"):
        config.lora_alpha = config.r
    if not config.HasField("lora_dropout"):
        config.lora_dropout = 0.0
    if not config.HasField("use_rslora"):
        config.use_rslora = False
    if not config.target_modules:
        config.target_modules.extend(_default_targets(model))
    return config


def attached(model: Any) -> LoraConfig | None:
    """The adapter that a model has, as PEFT tells it; None without one."""
    peft_configs = getattr(model, "peft_config", None)
    if not peft_configs:
        return None
    peft_config = next(iter(peft_configs.values()))
    modules_to_save = list(peft_config.modules_to_save or [])
    return LoraConfig(
        r=peft_config.r,
        lora_alpha=round(peft_config.lora_alpha),
        lora_dropout=peft_config.lora_dropout,
        target_modules=_in_model_order(_target_names(peft_config.target_modules, model), model),
        use_rslora=bool(peft_config.use_rslora),
        modules_to_save=modules_to_save,
        layers_to_transform=_as_list(peft_config.layers_to_transform),
    )


def _attach(loaded: LoadedModel, config: LoraConfig, request: PrepareForTrainingRequest) -> Any:
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(
        loaded.model,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        use_rslora=config.use_rslora,
        modules_to_save=list(config.modules_to_save) or None,
        layers_to_transform=list(config.layers_to_transform) or None,
        use_gradient_checkpointing="unsloth" if request.use_gradient_checkpointing else False,
        random_state=request.seed,
        max_seq_length=loaded.max_seq_length,
        bias="none",
    )


def _keep(loaded: LoadedModel, asked: LoraConfig | None) -> None:
    """A model that has an adapter keeps it, weights and all; another one is refused."""
    current = attached(loaded.model)
    if asked is not None and current is not None:
        differing = _differences(asked, current)
        if differing:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_ALREADY_PREPARED,
                f"Another adapter is attached already; it differs in {', '.join(differing)}. Leave lora unset to train "
                "the attached adapter on, or unload the model and load it again for a new one.",
            )
    for name, parameter in loaded.model.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            parameter.requires_grad_(True)
    loaded.prepared = True


def _differences(asked: LoraConfig, current: LoraConfig) -> list[str]:
    """Each set field of `asked` that `current` does not have, as "name (asked, attached)"."""
    found: list[str] = []
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora"):
        if asked.HasField(name) and not math.isclose(getattr(asked, name), getattr(current, name)):
            found.append(f"{name} ({getattr(asked, name)} asked, {getattr(current, name)} attached)")
    for name in ("target_modules", "modules_to_save", "layers_to_transform"):
        wanted, have = list(getattr(asked, name)), list(getattr(current, name))
        if wanted and set(wanted) != set(have):
            found.append(f"{name} ({_join(wanted)} asked, {_join(have)} attached)")
    return found


def _refuse_adapter(asked: LoraConfig | None) -> None:
    if asked is not None:
        raise InvalidFieldsError(
            [
                FieldViolation(
                    "lora",
                    "the model was loaded with full_finetuning, so all weights are trained; leave lora unset, or load "
                    "the model without full_finetuning",
                )
            ]
        )


def _check_names(config: LoraConfig, model: Any) -> None:
    names = linear_names(model)
    embeddings = [name for name in EMBEDDINGS if any(part == name for part in _leaf_names(model))]
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0) or 0)
    violations = _unknown("lora.target_modules", config.target_modules, [*names, *embeddings])
    violations += _unknown("lora.modules_to_save", config.modules_to_save, _leaf_names(model), offer=embeddings)
    beyond = [str(index) for index in config.layers_to_transform if layers and index >= layers]
    if beyond:
        violations.append(
            FieldViolation("lora.layers_to_transform", f"the model has layers 0 to {layers - 1}, not {_join(beyond)}")
        )
    if violations:
        raise InvalidFieldsError(violations)


def _unknown(
    field: str, asked: Sequence[str], known: Sequence[str], *, offer: Sequence[str] | None = None
) -> list[FieldViolation]:
    # A dotted name such as "self_attn.q_proj" is matched by its last part, as PEFT does.
    unknown = [name for name in asked if name.rpartition(".")[2] not in known]
    if not unknown:
        return []
    choice = known if offer is None else offer
    return [FieldViolation(field, f"the model has no module {_join(unknown)}; it has {_join(choice)}")]


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of all linear modules but the output layer, in the model's order."""
    output = model.get_output_embeddings()
    return list(
        dict.fromkeys(
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if _is_linear(module) and module is not output
        )
    )


def _is_linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit", "Linear8bitLt")


def _leaf_names(model: Any) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name, _ in model.named_modules() if name))


def _default_targets(model: Any) -> list[str]:
    names = linear_names(model)
    usual = [name for name in DEFAULT_TARGETS if name in names]
    # Other families call their projections otherwise (qkv_proj, Wqkv, c_attn): then all linear layers are meant.
    return usual if {"q_proj", "v_proj"} <= set(usual) else names


def _target_names(targets: object, model: Any) -> list[str]:
    """PEFT keeps names, or one pattern; Unsloth on a GPU turns names into a pattern. Names are what we report."""
    if not isinstance(targets, str):
        return [str(name) for name in targets or []]  # type: ignore[attr-defined]
    from peft.tuners.lora import LoraLayer

    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in adapted))


def _in_model_order(names: Sequence[str], model: Any) -> list[str]:
    """PEFT keeps a set; a stable order makes answers comparable."""
    order = {name: index for index, name in enumerate(_leaf_names(model))}
    return sorted(dict.fromkeys(names), key=lambda name: (order.get(name.rpartition(".")[2], len(order)), name))


def _as_list(value: object) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]


def _join(names: Sequence[object]) -> str:
    return ", ".join(str(name) for name in names) or "none"
