# ruff: noqa: E402 - unsloth has to be imported before what it patches, and only in its own arm
"""The scripts that gpu.py compares with: what a user would write with TRL and PEFT, or with Unsloth, alone.

    python gpu_script.py '{"arm": "hf" or "unsloth", "model": "FOLDER", "load_in_4bit": true, "max_seq_length": 2048}'

Loads the model once; then trains a block for every JSON line {"rows": FILE, "steps": N} on stdin, and prints its
figures as a JSON line. Between blocks it holds no more of the device than the model. With "profile":
[WARM_UP, STEPS, OPERATORS] in the job, the figures of a block have the kernels of so many steps after so many others:
gpu_profile.py. With "tells_steps" it prints a line {"at": SECONDS} for each step: gpu_turns.py.
"""

import gc
import json
import os
import sys
import time
from typing import Any

START = time.time()
# stdout belongs to the answers: what libraries print goes to stderr.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
JOB: dict[str, Any] = json.loads(sys.argv[1])
if JOB["arm"] == "unsloth":
    import unsloth  # first: it patches what follows
import torch
from _kernels import KernelLook
from _script_trainer import script_trainer
from transformers import TrainerCallback

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Times(TrainerCallback):
    """Notes when each step was logged, its loss, and the tokens so far; shows steps to the profiler if there is one."""

    def __init__(self, look: KernelLook | None) -> None:
        self.look = look
        self.at: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Once a step, as logging_steps is 1."""
        if logs and "loss" in logs:
            self.at.append(time.time())
            self.losses.append(float(logs["loss"]))
            self.tokens.append(int(state.num_input_tokens_seen))
            if JOB.get("tells_steps"):
                answer({"at": self.at[-1]})
            if self.look:
                self.look.step_done(state.global_step)


def from_unsloth() -> tuple[Any, Any]:
    """As in Unsloth's own notebooks."""
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        JOB["model"],
        max_seq_length=JOB["max_seq_length"],
        load_in_4bit=JOB["load_in_4bit"],
        dtype=torch.bfloat16,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        target_modules=PROJECTIONS,
        use_gradient_checkpointing="unsloth",
        random_state=42,
    )
    return model, tokenizer


def from_transformers() -> tuple[Any, Any]:
    """As in the documentation of PEFT."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        JOB["model"],
        dtype=torch.bfloat16,
        device_map={"": 0},
        quantization_config=quantization if JOB["load_in_4bit"] else None,
    )
    if JOB["load_in_4bit"]:
        model = prepare_model_for_kbit_training(model)
    torch.manual_seed(42)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    return model, AutoTokenizer.from_pretrained(JOB["model"])


def block(model: Any, tokenizer: Any, rows: str, steps: int) -> dict[str, Any]:
    """Trains so many steps of 2 x 4 sequences from the first row on."""
    look = KernelLook(*JOB["profile"]) if "profile" in JOB else None
    times = Times(look)
    torch.cuda.reset_peak_memory_stats()
    length = JOB["max_seq_length"]
    trainer = script_trainer(model, tokenizer, rows, max_seq_length=length, steps=steps, callbacks=[times])
    trainer.train()
    peak = torch.cuda.max_memory_reserved()
    del trainer
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    kernels = {"kernels": look.figures()} if look else {}
    return {"at": times.at, "losses": times.losses, "tokens": times.tokens, "peak_bytes": peak} | kernels


def answer(figures: dict[str, Any]) -> None:
    """One line on the real stdout."""
    ANSWERS.write(json.dumps(figures) + "\n")
    ANSWERS.flush()


def main() -> None:
    """Loads, then obeys stdin."""
    begin = time.time()
    model, tokenizer = from_unsloth() if JOB["arm"] == "unsloth" else from_transformers()
    torch.cuda.synchronize()
    answer({"load_seconds": time.time() - begin, "start_to_loaded_seconds": time.time() - START})
    for line in sys.stdin:
        asked = json.loads(line)
        answer(block(model, tokenizer, asked["rows"], asked["steps"]))


if __name__ == "__main__":
    main()
