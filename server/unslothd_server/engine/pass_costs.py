"""What passes cost, kept on the disk for later trainings of the same model, adapter, length and device."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from unslothd_server.engine import attention_lengths, devices, environment, readback
from unslothd_server.engine.durable_files import write_text
from unslothd_server.engine.micro_batching import PassCost, StepSizes
from unslothd_server.engine.model_loading import LoadedModel

VERSION = 4
# A device with so much more room may run passes that were not tried.
MORE_ROOM = 1.2


def file_of(loaded: LoadedModel, sizes: StepSizes, *, packing: bool) -> Path | None:
    """Where the costs of a training are kept; None where nothing is.

    Args:
        loaded: The model, prepared.
        sizes: Of its rows and optimizer steps.
        packing: Rows hold several sequences each.
    """
    if loaded.cache_dir is None:
        return None
    model = readback.describe_model(loaded)
    facts = (
        *(VERSION, model.model_name, model.total_params, model.trainable_params, model.dtype, model.load_in_4bit),
        *(model.lora.SerializeToString(deterministic=True).hex(), devices.device_title(loaded.model)),
        devices.bytes_in_ram(loaded.model),
        *(sizes.longest, sizes.sequences, packing, attention_lengths.are_kept()),
        *sorted(environment.versions().items()),
    )
    return loaded.cache_dir / "passes" / f"{sha256(repr(facts).encode()).hexdigest()[:32]}.json"


def read(file: Path | None, room: int) -> list[PassCost]:
    """The costs in a file; none where there is no file or a damaged one, or where larger passes may fit now.

    Args:
        file: As `file_of` gives it.
        room: Bytes for a pass at its peak.
    """
    if file is None or not file.exists():
        return []
    try:
        kept = json.loads(file.read_bytes())
        costs = [PassCost(**cost) for cost in kept["costs"]]
        return costs if room <= MORE_ROOM * kept["room"] else []
    except (OSError, ValueError, TypeError, KeyError):
        return []


def write(file: Path | None, room: int, costs: Sequence[PassCost]) -> None:
    """Keeps costs. Several workers may do so at once; the last one wins. Where the disk takes none, nothing is kept.

    Args:
        file: As `file_of` gives it.
        room: That passes had when they were measured, in bytes.
        costs: Of every kind of pass.
    """
    if file is None:
        return
    with suppress(OSError):  # the next training measures anew, which is no reason to end this one
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(file, json.dumps({"room": room, "costs": [asdict(cost) for cost in costs]}, indent=1))
