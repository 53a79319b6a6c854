"""Writes a merged model as a folder that Transformers loads: weights shard by shard, config, tokenizer."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.engine.export_weights import MergedWeights, Weight
from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.errors import ExhaustedError
from unslothd_server.export_formats import export_unsupported

# Largest file: what is in memory beside the model while it is written.
MAX_SHARD_BYTES = 5 * 10**9

Progress = Callable[[str, int, int], None]


def write_model(
    loaded: LoadedModel, merged: MergedWeights, folder: Path, progress: Progress, *, in_4bit: bool = False
) -> None:
    """Writes the merged model.

    Args:
        loaded: Its tokenizer goes into the folder too.
        merged: The weights.
        folder: Made if needed.
        progress: Told phase, bytes done and bytes in all.
        in_4bit: Linear weights become bitsandbytes NF4; the model must be on a GPU.

    Raises:
        ExhaustedError: DISK_FULL: the weights do not fit, or the disk filled up while they were written.
        PreconditionError: EXPORT_UNSUPPORTED: 4-bit weights of a model whose checkpoints are laid out otherwise.
    """
    folder.mkdir(exist_ok=True)
    weights = _in_checkpoint_layout(merged, in_4bit=in_4bit)
    quantised = _quantised_names(merged) if in_4bit else frozenset[str]()
    sizes = (weight.num_bytes // (4 if name in quantised else 1) for name, weight in weights.items())
    _require_space(folder, sum(sizes))
    _write_weights(weights, quantised, folder, progress)
    config = _config(merged)
    if in_4bit:
        config.quantization_config = _quantization_config(merged, quantised)
    _write_config(merged, config, folder)
    loaded.tokenizer.save_pretrained(str(folder))


def _in_checkpoint_layout(merged: MergedWeights, *, in_4bit: bool) -> dict[str, Weight]:
    """The weights by the names, and in the parts, that files of this architecture have.

    Transformers joins some weights when it loads a model, experts for instance. Where it does, all of them have to be
    made before they can be taken apart again; else each is made when it is written.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    outlines = {
        name: torch.empty(weight.shape, dtype=weight.dtype or weight.tensor.dtype, device="meta")
        for name, weight in merged.weights.items()
    }
    if set(revert_weight_conversion(merged.base, dict(outlines))) == set(outlines):
        return merged.weights
    if in_4bit:
        raise export_unsupported("This architecture is not written in 4 bits. Export it as MERGED_16BIT.")
    made = {name: weight.make().cpu() for name, weight in merged.weights.items()}
    return {
        name: Weight(None, tensor, tuple(tensor.shape), tensor.dtype)
        for name, tensor in revert_weight_conversion(merged.base, made).items()
    }


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ExhaustedError(
            ErrorReason.ERROR_REASON_DISK_FULL,
            f"The export needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on the disk of the "
            "output root. Free some space, then export again.",
            metadata={"needed_bytes": str(needed), "free_bytes": str(free)},
        )


def _write_weights(weights: dict[str, Weight], quantised: frozenset[str], folder: Path, progress: Progress) -> None:
    from safetensors.torch import save_file

    total = sum(weight.num_bytes for weight in weights.values())
    shards = _shards(weights)
    done, size, file_of = 0, 0, dict[str, str]()
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard: dict[str, Any] = {}
        for name in names:
            tensor = weights[name].make()
            shard |= _nf4(name, tensor) if name in quantised else {name: tensor.cpu().contiguous()}
            done += weights[name].num_bytes
            progress("merging", done, total)
        save_file(shard, folder / file, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(shard, file))
        size += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(file_of.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(weights: dict[str, Weight]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.num_bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weight.num_bytes
    return shards


def _quantised_names(merged: MergedWeights) -> frozenset[str]:
    """The linear weights that are 4-bit in the model; of a 16-bit model all but the output embeddings."""
    linear = {name: weight for name, weight in merged.weights.items() if weight.is_linear}
    in_4bit = frozenset(name for name, weight in linear.items() if type(weight.tensor).__name__ == "Params4bit")
    output = merged.base.get_output_embeddings()
    return in_4bit or frozenset(name for name, weight in linear.items() if weight.module is not output)


def _nf4(name: str, tensor: Any) -> dict[str, Any]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(tensor.cuda(), compress_statistics=True, quant_type="nf4")
    parts = {f"{name}.{key}": value.cpu().contiguous() for key, value in state.as_dict(packed=True).items()}
    return {name: packed.cpu(), **parts}


def _quantization_config(merged: MergedWeights, quantised: frozenset[str]) -> Any:
    from transformers import BitsAndBytesConfig

    kept = [name for name, weight in merged.weights.items() if weight.is_linear and name not in quantised]
    output = [name for name, module in merged.base.named_modules() if module is merged.base.get_output_embeddings()]
    skipped = list(dict.fromkeys([*(name.removesuffix(".weight") for name in kept), *output]))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=merged.dtype,
        llm_int8_skip_modules=skipped,
    )


def _config(merged: MergedWeights) -> Any:
    """The base model's config, as a plain 16-bit model has it."""
    config = copy.deepcopy(merged.base.config)
    for each in {id(part): part for part in (config, config.get_text_config())}.values():
        if hasattr(each, "quantization_config"):
            del each.quantization_config
        each.dtype = str(merged.dtype).removeprefix("torch.")
        if not merged.is_tied:
            each.tie_word_embeddings = False
    config.architectures = [type(merged.base).__name__]
    return config


def _write_config(merged: MergedWeights, config: Any, folder: Path) -> None:
    from transformers.dynamic_module_utils import custom_object_save

    if merged.base.is_remote_code():
        custom_object_save(merged.base, str(folder), config=config)
    config.save_pretrained(str(folder))
    if merged.base.can_generate():
        # Not save_pretrained: it refuses settings that the base model itself came with.
        merged.base.generation_config.to_json_file(str(folder / "generation_config.json"))
