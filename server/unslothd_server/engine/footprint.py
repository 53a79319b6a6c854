"""How much memory a training needs at its peak, by a formula: weights, gradients, optimizer states, activations."""

from dataclasses import dataclass
from typing import Any

from unslothd_server.engine import readback
from unslothd_server.engine.memory import memory_bytes
from unslothd_server.engine.readback import real_optimizer, uses_checkpointing

# States that an optimizer keeps for a parameter; two where it is not named.
OPTIMIZER_STATES = {"sgd": 0, "adafactor": 0, "rmsprop": 1, "adagrad": 1, "lion": 1, "ademamix": 3}
# The logits and their gradient, in float32.
LOGIT_BYTES = 8
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Footprint:
    """Parts of the peak, in bytes.

    Args:
        held: What the process holds now: weights, libraries.
        fixed: Gradients and optimizer states of the parameters that change.
        per_token: Activations and logits, for each token of a pass.
    """

    held: int
    fixed: int
    per_token: int

    def peak(self, tokens: int) -> int:
        """Bytes at the peak of a pass of so many tokens, padding counted."""
        return self.held + self.fixed + self.per_token * tokens


def footprint(trainer: Any) -> Footprint:
    """The footprint of a trainer whose optimizer exists and has not run."""
    model = trainer.model
    changing = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in changing)
    name = real_optimizer(trainer.optimizer, str(getattr(trainer.args.optim, "value", trainer.args.optim)))
    states = sum(parameter.numel() for parameter in changing) * _state_bytes(name)
    return Footprint(
        held=memory_bytes(),
        fixed=gradients + states,
        per_token=_activation_bytes(model, checkpointing=uses_checkpointing(model)),
    )


def _state_bytes(optimizer: str) -> int:
    kind = next((known for known in OPTIMIZER_STATES if known in optimizer), "")
    return OPTIMIZER_STATES.get(kind, 2) * (1 if "8bit" in optimizer else FLOAT32_BYTES)


def _activation_bytes(model: Any, *, checkpointing: bool) -> int:
    """Bytes for a token: what the backward pass needs of every layer, or every layer's input and one layer whole."""
    config = model.config.get_text_config()
    element = 2 if readback.weights_dtype(model) in ("bfloat16", "float16") else FLOAT32_BYTES
    hidden, layers = config.hidden_size, config.num_hidden_layers
    # Inputs of the norms and of the seven projections, queries, keys, values, and what lies between the projections.
    layer = 8 * hidden + 4 * getattr(config, "intermediate_size", 4 * hidden)
    kept = layers * hidden + layer if checkpointing else layers * layer
    return kept * element + config.vocab_size * LOGIT_BYTES
