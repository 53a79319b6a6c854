"""How much memory a training needs at its peak, by a formula: weights, gradients, optimizer states, activations."""

from dataclasses import dataclass
from typing import Any

from unslothd_server.engine import readback
from unslothd_server.engine.devices import on_gpu
from unslothd_server.engine.memory import memory_bytes
from unslothd_server.engine.readback import real_optimizer, uses_checkpointing

# States that an optimizer keeps for a parameter; two where it is not named.
OPTIMIZER_STATES = {"sgd": 0, "adafactor": 0, "rmsprop": 1, "adagrad": 1, "lion": 1, "ademamix": 3}
# The logits and their gradient, in float32.
LOGIT_BYTES = 8
FLOAT32_BYTES = 4
# Inputs of layers that are on the device while the others wait in RAM: two on their way, and the last layer's.
INPUTS_ON_DEVICE = 3
# What a process has of an H100 besides tensors once its first passes have run; 0.6 GiB before, as kernels load lazily.
# Other cards may need less: then this much is told too high, which is the safe side.
CONTEXT_BYTES = int(0.8 * 1024**3)


@dataclass(frozen=True)
class Footprint:
    """Parts of the peak, in bytes.

    Args:
        held: What the process holds now: weights, libraries.
        states: Of the optimizer.
        gradients: Of the parameters that change.
        loss: Room for the loss.
        per_token: Activations and logits, for each token of a pass.
        offloads: The inputs of layers wait in RAM for the backward pass, so that the loss meets no activations.
    """

    held: int
    states: int
    gradients: int
    loss: int
    per_token: int
    offloads: bool

    def peak(self, tokens: int) -> int:
        """Bytes at the peak of a pass of so many tokens, padding counted."""
        activations = self.per_token * tokens
        at_once = max(self.loss, activations) if self.offloads else self.loss + activations
        return self.held + self.states + self.gradients + at_once


def footprint(trainer: Any) -> Footprint:
    """The footprint of a trainer whose optimizer exists and has not run."""
    model = trainer.model
    changing = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in changing)
    name = real_optimizer(trainer.optimizer, str(getattr(trainer.args.optim, "value", trainer.args.optim)))
    states = sum(parameter.numel() for parameter in changing) * _state_bytes(name)
    checkpointing = uses_checkpointing(model)
    offloads = checkpointing and on_gpu(model) and offloads_inputs()
    return Footprint(
        held=_held_bytes(model),
        states=states,
        gradients=gradients,
        loss=_loss_bytes(model),
        per_token=_activation_bytes(model, checkpointing=checkpointing, offloads=offloads),
        offloads=offloads,
    )


def _held_bytes(model: Any) -> int:
    """What the process holds now, and what kernels that were not used yet will take."""
    import torch

    held, reserved = memory_bytes(), torch.cuda.memory_reserved()
    # Where the driver does not tell what a context takes, peaks are told without it, too.
    if not on_gpu(model) or held <= reserved:
        return held
    return max(held, reserved + CONTEXT_BYTES)


def offloads_inputs() -> bool:
    """True when checkpointing is Unsloth's own, which keeps inputs of layers in RAM; it replaces torch's for all."""
    import torch.utils.checkpoint

    return torch.utils.checkpoint.CheckpointFunction.__name__ == "UnslothCheckpointFunction"


def _state_bytes(optimizer: str) -> int:
    kind = next((known for known in OPTIMIZER_STATES if known in optimizer), "")
    return OPTIMIZER_STATES.get(kind, 2) * (1 if "8bit" in optimizer else FLOAT32_BYTES)


def _activation_bytes(model: Any, *, checkpointing: bool, offloads: bool) -> int:
    """Bytes for a token: what the backward pass needs of every layer, or every layer's input and one layer whole."""
    config = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", 4 * hidden)
    element = 2 if readback.weights_dtype(model) in ("bfloat16", "float16") else FLOAT32_BYTES
    if not on_gpu(model):
        # Inputs of the norms and of the projections, queries, keys, values, and what lies between the projections.
        layer = 8 * hidden + 4 * inner
        kept = layers * hidden + layer if checkpointing else layers * layer
        return kept * element + config.vocab_size * LOGIT_BYTES
    # What Unsloth keeps on a GPU, fitted to a 1B and an 8B Llama on an H100 to within 1 %: see docs/performance.md.
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    values = getattr(config, "num_key_value_heads", heads) * head_dim
    layer = round(7.4 * hidden) + 2 * values + 2 * inner
    inputs = min(INPUTS_ON_DEVICE, layers) if offloads else layers
    kept = inputs * hidden + layer + inner if checkpointing else layers * layer
    return kept * element


def _loss_bytes(model: Any) -> int:
    """Room for the loss of a part of the tokens at a time, whatever the pass; on a CPU it grows with the tokens."""
    config = model.config.get_text_config()
    return round(0.75 * config.vocab_size * config.hidden_size * 2) if on_gpu(model) else 0
