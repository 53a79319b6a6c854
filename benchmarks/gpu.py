"""Training on a GPU: plain TRL and PEFT, a plain Unsloth script, unslothd with fixed and with tuned passes, in turn.

All arms train the same rows with the same seed: 8 sequences an optimizer step, LoRA r=16 on seven projections,
adamw_8bit. Every arm is a process of its own that holds its model while the others work; blocks of steps alternate.
A step's time is the time between two logged steps. Needs a GPU with 80 GB for the 8B shapes.

    python benchmarks/gpu.py --case 1b --case 1b-mixed --case 8b-4bit --case 8b
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import HERE, ROOT, Figures, columns, environment, options_parser, percentile, run, say

from support import calls, random_llama
from support.calls import load, prepare, train
from support.running_server import RunningServer
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.training_pb2 import TrainingConfig

ARM_SECONDS = 900
MAX_SEQ_LENGTH = 2048
SEQUENCES = 8
WORDS = ["fox", "dog", "sea", "old", "man", "story", "language", "number", "answer", "question"]
# Dense bfloat16 of an H100 SXM, from its data sheet.
PEAK_FLOPS = 989e12
GIB = 1024**3
PLAIN = ("hf", "unsloth")
ARMS = (*PLAIN, "fixed", "tuned")


@dataclass(frozen=True)
class Case:
    """What is trained.

    Args:
        shape: As in random_llama.
        load_in_4bit: 4-bit base weights.
        mixed: Rows of 20 to 1500 tokens, mean about 240; else every row has the full length.
        steps: Of a block, for each arm; an arm that is not named is left out.
        alone: Tuned passes take what memory is free, so this arm has its turns before the others load their models.
    """

    shape: str
    load_in_4bit: bool
    mixed: bool
    steps: dict[str, int]
    alone: bool = False


CASES = {
    "1b": Case("llama-3.2-1b", False, False, {"hf": 8, "unsloth": 10, "fixed": 10, "tuned": 30}),
    # Long enough that tuning may try compiled passes, as it does in trainings of more than a minute.
    "1b-mixed": Case("llama-3.2-1b", False, True, {"hf": 8, "unsloth": 10, "fixed": 10, "tuned": 400}),
    "8b-4bit": Case("llama-3.1-8b", True, False, {"hf": 6, "unsloth": 8, "fixed": 8, "tuned": 14}, alone=True),
    "8b": Case("llama-3.1-8b", False, False, {"tuned": 14}),
}


# Loading 8B and probing it may take longer than any call of a test.
calls.CALL_SECONDS = ARM_SECONDS


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--case", action="append", choices=CASES, help="what to train; repeatable (default: 1b)")
    options.add_argument("--arm", action="append", choices=ARMS, help="repeatable (default: all)")
    options.add_argument("--rounds", type=int, default=2, help="blocks of each arm")
    options.add_argument("--warm-up", type=int, default=4, help="first steps of a block that do not count")
    options.add_argument("--save", type=Path, help="folder for the table and the figures")
    options.add_argument("--seconds", type=float, default=1e9, help="begin no further case after that many")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Runs the cases, those of one model together."""
    begin, found = time.monotonic(), Figures()
    with tempfile.TemporaryDirectory() as name:
        for case_name in options.case or ["1b"]:
            if time.monotonic() - begin > options.seconds:
                say(f"gpu: no time is left for {case_name}")
                continue
            found[case_name] = _case(CASES[case_name], case_name, Path(name), options)
            if options.save:
                options.save.mkdir(parents=True, exist_ok=True)
                (options.save / "gpu.json").write_text(json.dumps(found, indent=1))
                (options.save / "gpu.txt").write_text(table(found))
    return found


def _case(case: Case, name: str, folder: Path, options: argparse.Namespace) -> Figures:
    model = _model(case.shape, folder)
    rows = folder / "models" / f"{name}.jsonl"
    _write_rows(rows, mixed=case.mixed)
    blocks: dict[str, list[Figures]] = {arm: [] for arm in options.arm or ARMS if arm in case.steps}
    together = [[arm] for arm in blocks if arm == "tuned"] if case.alone else []
    together.append([arm for arm in blocks if [arm] not in together])
    for group in together:
        with ExitStack() as stack:
            say(f"gpu: {name}: starting {', '.join(group)}")
            arms = {
                arm: stack.enter_context(
                    (_script_arm if arm in PLAIN else _service_arm)(arm, case, model, rows, folder)
                )
                for arm in group
            }
            for number in range(1, options.rounds + 1):
                for arm, train_block in arms.items():
                    say(f"gpu: {name}: round {number} of {options.rounds}, {arm}")
                    blocks[arm].append(train_block(case.steps[arm]))
    return {arm: _summary(case, each, options.warm_up) for arm, each in blocks.items()}


def _model(shape: str, folder: Path) -> Path:
    model = folder / "models" / shape
    if not model.exists():
        say(f"gpu: making {shape}")
        program = ROOT / "tests" / "support" / "random_llama.py"
        command = [sys.executable, str(program), str(model), shape]
        subprocess.run(command, env=environment(), timeout=ARM_SECONDS, check=True, capture_output=True)
    return model


def _write_rows(file: Path, *, mixed: bool) -> None:
    drawn = random.Random(0)
    lengths = [
        min(1500, max(20, int(drawn.lognormvariate(5.2, 0.75)))) if mixed else MAX_SEQ_LENGTH + 100
        for _ in range(3600 if mixed else 480)
    ]
    file.write_text("\n".join(json.dumps({"text": " ".join(drawn.choices(WORDS, k=count))}) for count in lengths))


@contextmanager
def _script_arm(arm: str, case: Case, model: Path, rows: Path, folder: Path) -> Iterator[Callable[[int], Figures]]:
    """Starts a script, which loads while the others do."""
    job = {
        "arm": arm,
        "model": str(model),
        "load_in_4bit": case.load_in_4bit,
        "max_seq_length": MAX_SEQ_LENGTH,
    }
    begin = time.monotonic()
    with (folder / f"{arm}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "gpu_script.py"), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder,
            env=environment(UNSLOTH_DISABLE_STATISTICS="1", HF_HUB_OFFLINE="1"),
        )
    assert process.stdin is not None
    assert process.stdout is not None
    loaded: Figures = {}

    def answer() -> Figures:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the script {arm} ended:\n{(folder / f'{arm}.log').read_text()[-3000:]}")
        return json.loads(line)

    def train_block(steps: int) -> Figures:
        if not loaded:
            loaded.update(answer())
        process.stdin.write(json.dumps({"rows": str(rows), "steps": steps}) + "\n")
        process.stdin.flush()
        return answer() | {"begin": begin, "load_seconds": loaded["load_seconds"]}

    try:
        yield train_block
    finally:
        process.kill()
        process.wait()


@contextmanager
def _service_arm(arm: str, case: Case, model: Path, rows: Path, folder: Path) -> Iterator[Callable[[int], Figures]]:
    home = folder / f"{arm}-{case.shape}-{case.load_in_4bit}"
    home.mkdir(exist_ok=True)
    arguments = ("--model-root", str(folder / "models"))
    with ExitStack() as stack:
        server = stack.enter_context(RunningServer(home, arguments=arguments))
        stub = server.stub()

        def load_and_prepare() -> tuple[str, float]:
            begin = time.time()
            loaded = load(
                stub, str(model), max_seq_length=MAX_SEQ_LENGTH, load_in_4bit=case.load_in_4bit, dtype="bfloat16"
            )
            prepare(stub, loaded.model_id, TrainingConfig())
            return loaded.model_id, time.time() - begin

        ready = stack.enter_context(ThreadPoolExecutor()).submit(load_and_prepare)
        fixed = {"batch_size": 2, "gradient_accumulation_steps": 4} if arm == "fixed" else {}

        def train_block(steps: int) -> Figures:
            # The other arms come and go: each block takes what is free now, as a training of its own.
            config = TrainingConfig(
                max_steps=steps,
                warmup_steps=2,
                learning_rate=2e-4,
                # The same rates for blocks of any length, so that losses can be compared.
                lr_scheduler_type="constant_with_warmup",
                seed=42,
                save_steps=100_000,
                **fixed,
            )
            model_id, load_seconds = ready.result()
            begin_block = time.time()
            events = list(train(stub, model_id, DatasetSource(path=str(rows)), training_config=config))
            started = next(event for event in events if event.HasField("started")).started
            taken = [event for event in events if event.HasField("step")]
            return {
                "at": [event.event_time.ToNanoseconds() / 1e9 for event in taken],
                "losses": [event.step.loss for event in taken],
                "tokens": [event.step.tokens for event in taken],
                "peak_bytes": max(event.step.peak_memory_bytes for event in taken),
                "load_seconds": load_seconds,
                "first_step_seconds": taken[0].event_time.ToNanoseconds() / 1e9 - begin_block,
                "passes": _told(started.plan.passes),
                "config": f"{started.plan.config.batch_size} x {started.plan.config.gradient_accumulation_steps}",
                "estimate_bytes": started.plan.memory_estimate_bytes,
                "warnings": list(started.plan.warnings),
            }

        try:
            yield train_block
            stub.UnloadModel(pb.UnloadModelRequest(model_id=ready.result()[0]))
        except BaseException:
            say(server.log.read_text()[-3000:])
            raise


def _told(passes: Any) -> Figures:
    return {
        "max_tokens": passes.max_tokens,
        "joined": passes.joined,
        "checkpointing": passes.use_gradient_checkpointing,
        "step_seconds": round(passes.step_seconds, 4),
        "remembered": passes.remembered,
        "probe_seconds": round(passes.probe_seconds, 1),
        "costs": [str(cost).replace("\n", " ") for cost in passes.costs],
    }


def _summary(case: Case, blocks: list[Figures], warm_up: int) -> Figures:
    durations = [each for block in blocks for each in _durations(block, warm_up)]
    tokens = sum(block["tokens"][-1] - block["tokens"][warm_up] for block in blocks)
    rate = tokens / sum(durations)
    last = blocks[-1]
    return {
        "tokens_per_second": round(rate),
        "median_seconds": round(statistics.median(durations), 4),
        "p95_seconds": round(percentile(durations, 95), 4),
        "peak_gib": round(max(block["peak_bytes"] for block in blocks) / GIB, 2),
        "mfu": None if case.mixed else round(rate * _flops_of_token(case.shape) / PEAK_FLOPS, 3),
        "loss_at_8": round(blocks[0]["losses"][min(7, len(blocks[0]["losses"]) - 1)], 4),
        "steps": len(durations),
        "load_seconds": round(blocks[0]["load_seconds"], 1),
        **{key: last[key] for key in ("passes", "config", "warnings") if key in last},
        "first_step_seconds": [
            round(block["first_step_seconds"], 1) for block in blocks if "first_step_seconds" in block
        ],
        "first_passes": blocks[0].get("passes"),
        "estimate_gib": round(last.get("estimate_bytes", 0) / GIB, 2),
        "losses": [[round(loss, 5) for loss in block["losses"][:10]] for block in blocks],
        "medians_by_block": [round(statistics.median(_durations(block, warm_up)), 4) for block in blocks],
    }


def _durations(block: Figures, warm_up: int) -> list[float]:
    return [after - before for before, after in zip(block["at"][warm_up:], block["at"][warm_up + 1 :], strict=False)]


def _flops_of_token(shape: str) -> float:
    """Multiply-adds count 2. Base weights: forward and the gradient of their input, 4 each; no gradient of their own.

    Attention: 2 products of half a square forward, twice that backward. What checkpointing does again is not counted,
    nor the adapters' one percent.
    """
    facts = random_llama.SHAPES[shape]
    parameters = random_llama.PARAMETERS[shape]
    if not facts["tie_word_embeddings"]:
        parameters -= facts["vocab_size"] * facts["hidden_size"]  # looked up, not multiplied
    width = facts["num_attention_heads"] * facts["head_dim"]
    return 4 * parameters + 3 * 2 * facts["num_hidden_layers"] * MAX_SEQ_LENGTH * width


def table(figures: Figures) -> str:
    """For people."""
    head = ["", "tok/s", "median s", "p95 s", "peak GiB", "MFU", "loss at 8", "steps", "passes"]
    rows = [
        [
            f"{case} {arm}",
            each["tokens_per_second"],
            each["median_seconds"],
            each["p95_seconds"],
            each["peak_gib"],
            "" if each["mfu"] is None else f"{100 * each['mfu']:.1f} %",
            each["loss_at_8"],
            each["steps"],
            each.get("config", "2 x 4"),
        ]
        for case, arms in figures.items()
        for arm, each in arms.items()
    ]
    return columns(head, rows)


if __name__ == "__main__":
    run(measure, table, parser())
