"""The trainer of a plain script, as its author would write it: 2 x 4 sequences an optimizer step, adamw_8bit."""

from typing import Any


def script_trainer(
    model: Any, tokenizer: Any, rows: str, *, max_seq_length: int, steps: int, callbacks: list[Any]
) -> Any:
    """TRL's trainer; Unsloth's where that was imported before TRL, as the scripts of both kinds do.

    Args:
        model: With an adapter.
        tokenizer: Of the model.
        rows: A file of JSON lines with a text each.
        max_seq_length: Tokens; longer rows are cut.
        steps: Optimizer steps.
        callbacks: Of Transformers.
    """
    import torch
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=rows, split="train"),
        callbacks=callbacks,
        args=SFTConfig(
            output_dir="script-output",
            max_length=max_seq_length,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=steps,
            warmup_steps=2,
            learning_rate=2e-4,
            lr_scheduler_type="constant_with_warmup",
            weight_decay=0.01,
            optim="adamw_8bit",
            seed=42,
            data_seed=42,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=True,
            include_num_input_tokens_seen="non_padding",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
