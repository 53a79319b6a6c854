"""The engine: the only code that imports unsloth, torch, transformers, trl, peft and datasets."""
