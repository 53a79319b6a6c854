"""The training that step_overhead compares with: what a user would write with Unsloth alone. Prints one JSON line.

python bare_script.py '{"model": "FOLDER", "rows": "rows.jsonl", "config": {…}, …}'
"""

import json
import sys
import time
from typing import Any

import unsloth  # first: it patches what follows
from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Times(TrainerCallback):
    """Notes when each step was logged, and its loss."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Once a step, as logging_steps is 1."""
        if logs and "loss" in logs:
            self.at.append(time.time())
            self.losses.append(logs["loss"])


def main() -> None:
    """Loads, attaches, trains."""
    job = json.loads(sys.argv[1])
    config = job["config"]
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        job["model"], max_seq_length=job["max_seq_length"], load_in_4bit=job["load_in_4bit"], dtype=_dtype(job["dtype"])
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if config["use_gradient_checkpointing"] else False,
        random_state=config["seed"],
    )
    times = Times()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=job["rows"], split="train"),
        callbacks=[times],
        args=SFTConfig(
            output_dir="bare-output",
            max_length=job["max_seq_length"],
            per_device_train_batch_size=config["batch_size"],
            gradient_accumulation_steps=config["gradient_accumulation_steps"],
            max_steps=config["max_steps"],
            warmup_steps=config["warmup_steps"],
            learning_rate=config["learning_rate"],
            lr_scheduler_type="cosine",
            weight_decay=0.01,
            optim="adamw_8bit",
            seed=config["seed"],
            data_seed=config["seed"],
            bf16=job["dtype"] == "bfloat16",
            gradient_checkpointing=config["use_gradient_checkpointing"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            **job["more"],
        ),
    )
    trainer.train()
    print("\n" + json.dumps({"at": times.at, "losses": times.losses}), flush=True)


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


if __name__ == "__main__":
    main()
