"""What load_model compares with: Unsloth alone loads a model. Prints seconds of the import and of the load as JSON.

python _bare_load.py '{"model": "FOLDER", "max_seq_length": 2048, "load_in_4bit": false}'
"""

import json
import sys
import time


def main() -> None:
    """Imports and loads, each timed."""
    job = json.loads(sys.argv[1])
    began = time.monotonic()
    import unsloth

    imported = time.monotonic()
    import torch

    unsloth.FastLanguageModel.from_pretrained(
        job["model"],
        max_seq_length=job["max_seq_length"],
        load_in_4bit=job["load_in_4bit"],
        dtype=None if torch.cuda.is_available() else torch.float32,
        use_exact_model_name=True,
    )
    print("\n" + json.dumps({"import": imported - began, "load": time.monotonic() - imported}), flush=True)


if __name__ == "__main__":
    main()
