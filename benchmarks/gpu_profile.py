"""What a step of a training spends the GPU's time on: kernels by kind, idle time, launches, the dearest kernels.

The engine in this process, or the plain Unsloth script of gpu.py, trains under torch's profiler for a few steps after
warm-up. Steps are a little longer while it looks on. Beside them: the rate of one large bfloat16 product alone on this
card, which is what matrix products could reach. Of the engine, how much memory torch held after forward passes of each
shape: recorded passes keep theirs (--mixed).

    python benchmarks/gpu_profile.py --shape llama-3.1-8b --load-in-4bit
    python benchmarks/gpu_profile.py --shape llama-3.2-1b --arm unsloth
    python benchmarks/gpu_profile.py --shape llama-3.2-1b --at-once
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import HERE, Figures, columns, environment, options_parser, run, say
from _kernels import KernelLook, product_tflops
from _made import random_model, write_rows

from support import engine_runs, random_llama
from support.readings import at_once
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import MICRO_BATCHING_TUNED, TrainingConfig
from unslothd_server.engine.unsloth_engine import UnslothEngine
from unslothd_server.worker.ports import StopSignal

ARMS = ("tuned", "fixed", "unsloth")
ARM_SECONDS = 900
GIB = 1024**3
# Joined passes of mixed rows come in any; recorded ones in four at most.
SHAPES = 8


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--shape", choices=random_llama.SHAPES, default="llama-3.2-1b", help="of the random weights")
    options.add_argument("--model", type=Path, help="folder of a model; default: one of random weights")
    options.add_argument("--load-in-4bit", action="store_true", help="4-bit weights")
    options.add_argument("--mixed", action="store_true", help="rows of 20 to 1500 words; default: all of full length")
    arms = "tuned: the engine's defaults; fixed: the engine, 2 x 4; unsloth: a script, 2 x 4"
    options.add_argument("--arm", choices=ARMS, default="tuned", help=arms)
    options.add_argument("--max-seq-length", type=int, default=2048, help="tokens")
    options.add_argument("--warm-up", type=int, default=6, help="steps before the profile")
    options.add_argument("--steps", type=int, default=5, help="steps of the profile")
    options.add_argument("--operators", action="store_true", help="tell which operators launch the dearest kernels")
    told = "tell each step before the next is launched (not of the arm unsloth, which does nothing else)"
    options.add_argument("--at-once", action="store_true", help=told)
    options.add_argument("--save", type=Path, help="folder for the table and the figures")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Trains a few steps and looks at the last ones."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or random_model(folder / "model", options.shape)
        rows = folder / "rows.jsonl"
        write_rows(rows, 600, words=None if options.mixed else options.max_seq_length + 100)
        look = _script if options.arm == "unsloth" else _engine
        say(f"gpu_profile: {options.arm}")
        figures = look(model.resolve(), rows, folder, options) | {"product_tflops": product_tflops()}
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "profile.json").write_text(json.dumps(figures, indent=1))
        (options.save / "profile.txt").write_text(table(figures))
    return figures


def _engine(model: Path, rows: Path, folder: Path, options: argparse.Namespace) -> Figures:
    UnslothEngine().import_libraries()
    # Transformers comes with it, which Unsloth has to come before.
    from unslothd_server.engine import service_trainer

    loaded = engine_runs.load(
        model, folder, load_in_4bit=options.load_in_4bit, max_seq_length=options.max_seq_length, dtype="bfloat16"
    )
    loaded.prepare(checkpointing=True)
    config = TrainingConfig(max_steps=3000, warmup_steps=2, batch_size=2, gradient_accumulation_steps=4)
    if options.arm == "tuned":
        config.micro_batching = MICRO_BATCHING_TUNED
    look = KernelLook(options.warm_up, options.steps, options.operators)
    # The profile begins and ends between two steps; what the device does for the next one would count otherwise.
    edges = None if options.at_once else (options.warm_up, options.warm_up + options.steps)
    service_trainer.Reading = at_once(edges)

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("step") and look.step_done(event.step.step):
            stop.requested.set()

    held = MemoryByShape()
    loaded.torch_model.register_forward_pre_hook(held.before, with_kwargs=True)
    loaded.torch_model.register_forward_hook(held.after)
    run_of_steps = loaded.train(rows, config, on_event=on_event)
    passes = run_of_steps.plan.passes
    kind = f"{passes.max_tokens} tokens, {'joined' if passes.joined else 'padded'}"
    return look.figures() | {
        "passes": kind if passes.max_tokens else "2 rows",
        "checkpointing": run_of_steps.plan.config.use_gradient_checkpointing,
        "memory_by_shape": held.by_shape,
    }


class MemoryByShape:
    """What torch holds of the GPU after the forward pass of each shape, in the order in which they came.

    Args:
        by_shape: For rows and columns: passes, and bytes after the first and after the last of them.
    """

    def __init__(self) -> None:
        self.by_shape: dict[str, dict[str, int]] = {}
        self._shape = ""

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Takes the shape of a pass."""
        self._shape = " x ".join(map(str, kwargs["input_ids"].shape))

    def after(self, *_: Any) -> None:
        """Notes what is held now."""
        import torch

        held = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
        figures = self.by_shape.setdefault(self._shape, {"passes": 0, "first_bytes": held})
        figures |= {"passes": figures["passes"] + 1, "last_bytes": held}


def _script(model: Path, rows: Path, folder: Path, options: argparse.Namespace) -> Figures:
    job = {
        "arm": "unsloth",
        "model": str(model),
        "load_in_4bit": options.load_in_4bit,
        "max_seq_length": options.max_seq_length,
        "profile": [options.warm_up, options.steps, options.operators],
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "gpu_script.py"), json.dumps(job)],
        input=json.dumps({"rows": str(rows), "steps": options.warm_up + options.steps}),
        stdout=subprocess.PIPE,
        text=True,
        timeout=ARM_SECONDS,
        check=True,
        cwd=folder,
        env=environment(UNSLOTH_DISABLE_STATISTICS="1", HF_HUB_OFFLINE="1"),
    )
    _loaded, trained = map(json.loads, done.stdout.splitlines())
    return trained["kernels"] | {"passes": "2 rows", "checkpointing": True}


def table(figures: Figures) -> str:
    """For people."""
    seconds = figures["step_seconds"]
    shares = {**figures["kinds"], "no kernel": seconds - figures["busy_seconds"]}
    about = (
        f"{seconds:.4f} s and {figures['kernels_per_step']:.0f} kernels a step",
        f"passes of {figures['passes']}, checkpointing {'on' if figures['checkpointing'] else 'off'}",
        f"one large product alone: {figures['product_tflops']:.0f} TFLOP/s",
        f"buffers in RAM: {figures['offload_buffers']['pinned']} pinned, {figures['offload_buffers']['pageable']} not",
    )
    kinds = [(kind, f"{each:.4f}", f"{100 * each / seconds:.1f} %") for kind, each in shares.items()]
    dearest = [(each["name"][:90], f"{each['seconds']:.4f}", f"{each['calls']:.0f}") for each in figures["dearest"]]
    head = "dearest kernels"
    waits = [(place, f"{each:.1f}", "") for place, each in figures["waits"].items()]
    calls = figures["waiting_calls"].items()
    waits += [(name, f"{each['calls']:.1f}", f"{each['seconds']:.4f}") for name, each in calls]
    tables = [
        columns(["", "s a step", "share"], kinds),
        columns([head, "s a step", "calls"], dearest),
        columns(["where the host waits for the device", "times a step", "s a step"], waits or [("nowhere", "", "")]),
    ]
    if shapes := figures.get("memory_by_shape"):
        rows = [
            (shape, each["passes"], f"{each['first_bytes'] / GIB:.2f}", f"{each['last_bytes'] / GIB:.2f}")
            for shape, each in list(shapes.items())[:SHAPES]
        ]
        tables.append(columns(["shape of a pass, as they came", "passes", "GiB after the first", "the last"], rows))
    if "launchers" in figures:
        head = ["launched by", "shapes", "kind", "s a step", "calls"]
        keys = ("operators", "shapes", "kind")
        rows = [
            (*(each[key][:120] for key in keys), f"{each['seconds']:.4f}", f"{each['calls']:.0f}")
            for each in figures["launchers"]
        ]
        tables.append(columns(head, rows))
    return "\n\n".join(["; ".join(about), *tables])


if __name__ == "__main__":
    run(measure, table, parser())
