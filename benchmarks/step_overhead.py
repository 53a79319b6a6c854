"""What the service costs a training step: the same training through it and in a bare Unsloth script, in turn.

Each arm runs in fresh processes, A B A B …, on the same rows with the same config and seed. A step's time is the time
between two logged steps, so that all that the service does in between counts. The overhead is the ratio of the
medians; its interval comes from 2000 bootstrap draws, of runs and then of steps in these.

On a GPU host: python benchmarks/step_overhead.py --model FOLDER --max-seq-length 2048 --load-in-4bit
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

from _common import HERE, Figures, bare_arm, columns, environment, options_parser, run, say

from support.calls import load, prepare, train
from support.running_server import RunningServer
from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.training_pb2 import TrainingConfig

ARM_SECONDS = 900
LIKE_PERCENT = 5.0  # runs of one arm that differ by more were not alone on the machine
TEXT = "fox dog sea old man story language number answer question good morning capital of France is Paris"


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument(
        "--model", type=Path, help="folder of a model; default: a random Llama of 5 million parameters"
    )
    options.add_argument("--rounds", type=int, default=2, help="runs of each arm")
    options.add_argument("--steps", type=int, default=40, help="steps of a run")
    options.add_argument("--warm-up", type=int, default=8, help="first steps of a run that do not count")
    options.add_argument("--max-seq-length", type=int, default=64, help="tokens; every row is longer and is cut")
    options.add_argument("--batch-size", type=int, default=2, help="sequences a pass")
    options.add_argument("--gradient-accumulation-steps", type=int, default=4, help="passes a step")
    options.add_argument("--load-in-4bit", action="store_true", help="4-bit weights")
    options.add_argument(
        "--bare-arguments",
        type=json.loads,
        default={},
        help="JSON of further SFTConfig arguments of the bare arm: to see what one of the service's own costs",
    )
    options.add_argument("--dtype", help="float32 or bfloat16; default: bfloat16 on a GPU")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Runs both arms in turn."""
    config = TrainingConfig(
        batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        max_steps=options.steps,
        warmup_steps=5,
        learning_rate=2e-4,
        seed=42,
        use_gradient_checkpointing=True,
        save_steps=100_000,
    )
    dtype = options.dtype or ("bfloat16" if _has_gpu() else "float32")
    arms: dict[str, list[Figures]] = {"bare": [], "service": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "models" / "rows.jsonl"
        rows.parent.mkdir()
        count = options.steps * options.batch_size * options.gradient_accumulation_steps
        _write_rows(rows, count, words=2 * options.max_seq_length)
        model = folder / "models" / "model"
        if options.model:
            model.symlink_to(options.model.resolve())
        else:
            say("step overhead: making the model")
            command = [sys.executable, str(HERE / "_random_model.py"), str(model)]
            subprocess.run(command, env=environment(), timeout=ARM_SECONDS, check=True, capture_output=True)
        for number in range(1, options.rounds + 1):
            for arm, function in (("bare", _bare), ("service", _service)):
                say(f"step overhead: round {number} of {options.rounds}, {arm}")
                arms[arm].append(function(folder, model, rows, config, dtype, options))
    return {"options": {key: str(value) for key, value in vars(options).items()}, "dtype": dtype} | _compared(
        arms, options.warm_up
    )


def _bare(
    folder: Path, model: Path, rows: Path, config: TrainingConfig, dtype: str, options: argparse.Namespace
) -> Figures:
    job = {
        "model": str(model.resolve()),
        "rows": str(rows),
        "max_seq_length": options.max_seq_length,
        "load_in_4bit": options.load_in_4bit,
        "dtype": dtype,
        "more": options.bare_arguments,
        "config": {field.name: value for field, value in config.ListFields()},
    }
    return bare_arm("bare_script.py", job, folder, ARM_SECONDS)


def _service(
    folder: Path, model: Path, rows: Path, config: TrainingConfig, dtype: str, options: argparse.Namespace
) -> Figures:
    # The model is a link out of the folder when it was given: the root is where it really is.
    with RunningServer(folder, arguments=("--model-root", str(model.resolve().parent))) as server:
        stub = server.stub()
        loaded = load(
            stub,
            str(model.resolve()),
            max_seq_length=options.max_seq_length,
            load_in_4bit=options.load_in_4bit,
            dtype=dtype,
        )
        prepare(stub, loaded.model_id, config)
        events = list(train(stub, loaded.model_id, DatasetSource(path=str(rows))))
    steps = [event for event in events if event.HasField("step")]
    return {
        "at": [event.event_time.ToNanoseconds() / 1e9 for event in steps],
        "losses": [event.step.loss for event in steps],
    }


def _compared(arms: dict[str, list[Figures]], warm_up: int) -> Figures:
    runs = {arm: [_durations(each["at"], warm_up) for each in results] for arm, results in arms.items()}
    medians = {arm: statistics.median(chain(*steps)) for arm, steps in runs.items()}
    draws = random.Random(0)

    def draw(arm: str) -> float:
        """Runs first, then steps of these: what differs between processes counts as much as it should."""
        drawn = draws.choices(runs[arm], k=len(runs[arm]))
        return statistics.median(chain(*(draws.choices(steps, k=len(steps)) for steps in drawn)))

    ratios = sorted(100 * (draw("service") / draw("bare") - 1) for _ in range(2000))
    losses = {arm: [loss for each in runs for loss in each["losses"]] for arm, runs in arms.items()}
    by_round = {arm: [round(statistics.median(steps), 5) for steps in each] for arm, each in runs.items()}
    return {
        "steps_counted": {arm: sum(map(len, each)) for arm, each in runs.items()},
        "median_step_seconds": {arm: round(value, 5) for arm, value in medians.items()},
        "overhead_percent": round(100 * (medians["service"] / medians["bare"] - 1), 2),
        "overhead_percent_95": [round(ratios[50], 2), round(ratios[-50], 2)],
        "medians_by_round": by_round,
        "runs_differ_percent": round(max(100 * (max(each) / min(each) - 1) for each in by_round.values()), 1),
        "losses_of_first_round": {arm: runs[0]["losses"] for arm, runs in arms.items()},
        "seconds_by_round": {
            arm: [[round(step, 5) for step in _durations(each["at"], 0)] for each in runs] for arm, runs in arms.items()
        },
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
    }


def _durations(at: list[float], warm_up: int) -> list[float]:
    return [after - before for before, after in zip(at[warm_up:], at[warm_up + 1 :], strict=False)]


def _write_rows(file: Path, count: int, words: int) -> None:
    draws, vocabulary = random.Random(0), TEXT.split()
    file.write_text("\n".join(json.dumps({"text": " ".join(draws.choices(vocabulary, k=words))}) for _ in range(count)))


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


def table(figures: Figures) -> str:
    """For people."""
    medians, by_round = figures["median_step_seconds"], figures["medians_by_round"]
    rows = [
        [
            arm,
            round(1000 * medians[arm], 1),
            " ".join(f"{1000 * each:.1f}" for each in by_round[arm]),
            *(f"{losses[index]:.5f}" for index in (0, len(losses) // 2, -1)),
        ]
        for arm, losses in figures["losses_of_first_round"].items()
    ]
    low, high = figures["overhead_percent_95"]
    text = columns(["", "median ms a step", "by round", "first loss", "middle", "last"], rows)
    text += f"\n\noverhead {figures['overhead_percent']} % (95 %: {low} to {high}); "
    text += f"largest difference between two losses of the same step {figures['largest_loss_difference']:.2g}"
    if figures["runs_differ_percent"] > LIKE_PERCENT:
        text += f"\nruns of the same arm differ by {figures['runs_differ_percent']} %: something else kept the machine "
        text += "busy, so this overhead says nothing. Run it again on an idle one."
    return text


if __name__ == "__main__":
    run(measure, table, parser())
