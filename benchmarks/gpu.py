"""Training on a GPU: plain TRL and PEFT, a plain Unsloth script, unslothd with fixed and with tuned passes, in turn.

All arms train the same rows with the same seed: 8 sequences an optimizer step, LoRA r=16 on seven projections,
adamw_8bit. Every arm is a process of its own that holds its model while the others work; blocks of steps alternate.
A step's time is the time between two logged steps. Needs a GPU with 80 GB for the 8B shapes.

    python benchmarks/gpu.py --case 1b --case 1b-mixed --case 8b-4bit --case 8b
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from _common import Figures, columns, options_parser, percentile, run, say
from _gpu_arms import ARM_SECONDS, MAX_SEQ_LENGTH, Case, script_arm, service_arm
from _made import random_model, write_rows

from support import calls, random_llama

SEQUENCES = 8
# Dense bfloat16 of an H100 SXM, from its data sheet.
PEAK_FLOPS = 989e12
GIB = 1024**3
# It is far from the others, so that more says nothing more.
HF_ROUNDS = 1
ARMS = ("hf", "unsloth", "fixed", "tuned")
WITHOUT_SERVER = ("hf", "unsloth")


CASES = {
    "1b": Case("llama-3.2-1b", False, False, {"hf": 8, "unsloth": 24, "fixed": 24, "tuned": 24}),
    "1b-mixed": Case("llama-3.2-1b", False, True, {"hf": 8, "unsloth": 10, "fixed": 40, "tuned": 200}),
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
    options.add_argument("--models", type=Path, help="folder that keeps the models; default: made anew each time")
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
            _case(case_name, Path(name), options, found)
    return found


def _case(name: str, folder: Path, options: argparse.Namespace, found: Figures) -> None:
    case, begin = CASES[name], time.monotonic()
    model = random_model((options.models or folder / "models").resolve() / case.shape, case.shape)
    rows = folder / "rows" / f"{name}.jsonl"
    rows.parent.mkdir(exist_ok=True)
    write_rows(rows, 1800 if case.mixed else 240, words=None if case.mixed else MAX_SEQ_LENGTH + 100)
    blocks: dict[str, list[Figures]] = {arm: [] for arm in options.arm or ARMS if case.steps.get(arm)}
    together = [[arm] for arm in blocks if arm == "tuned"] if case.alone else []
    together.append([arm for arm in blocks if [arm] not in together])

    def tell(what: str) -> None:
        # What was measured must not be lost with what was not.
        done = {arm: _summary(case, each, options.warm_up) for arm, each in blocks.items() if each}
        found.update({name: done} if done else {})
        _save(found, options.save)
        say(f"gpu: {name}: {time.monotonic() - begin:.0f} s: {what}")

    for group in together:
        with ExitStack() as stack:
            tell(f"starting {', '.join(group)}")
            arms = {
                arm: stack.enter_context(
                    (script_arm if arm in WITHOUT_SERVER else service_arm)(arm, case, model, rows, folder)
                )
                for arm in group
            }
            for number in range(1, options.rounds + 1):
                for arm, each in arms.items():
                    if arm == "hf" and number > HF_ROUNDS:
                        continue
                    blocks[arm].append(each.block(case.steps[arm]))
                    tell(f"round {number} of {options.rounds}, {arm}: {_short(blocks[arm][-1], options.warm_up)}")
            for arm, each in arms.items():
                if each.warm:
                    blocks[arm][-1] |= each.warm()
                    tell(f"{arm}, on a warm worker")


def _save(found: Figures, folder: Path | None) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(found, indent=1))
        (folder / "gpu.txt").write_text(table(found))


def _short(block: Figures, warm_up: int) -> str:
    probe = block.get("passes", {}).get("probe_seconds", 0)
    return (
        f"first step after {block['first_step_seconds']:.1f} s (probe {probe} s), "
        f"median {statistics.median(_durations(block, warm_up)):.4f} s"
    )


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
        "load_to_first_step_seconds": round(blocks[0]["load_to_first_step_seconds"], 1),
        **{key: round(last[key], 1) for key in ("warm_load_seconds", "warm_load_to_first_step_seconds") if key in last},
        **{key: last[key] for key in ("passes", "config", "warnings") if key in last},
        "first_step_seconds": [round(block["first_step_seconds"], 1) for block in blocks],
        "first_passes": blocks[0].get("passes"),
        "estimate_gib": round(last.get("estimate_bytes", 0) / GIB, 2),
        "losses": [[round(loss, 5) for loss in block["losses"][:10]] for block in blocks],
        "step_seconds": [[round(each, 4) for each in _durations(block, warm_up)] for block in blocks],
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


def _beside_the_script(arms: Figures) -> Figures:
    """How much longer a step of the service takes than the plain script's with the same passes, in each round."""
    if not {"unsloth", "fixed"} <= set(arms):
        return {}
    # In the middle of a round the script is one block ahead; blocks begin with the same rows, and one may be longer.
    pairs = zip(arms["fixed"]["step_seconds"], arms["unsloth"]["step_seconds"], strict=False)
    longer = [statistics.median(a / b for a, b in zip(*pair, strict=False)) - 1 for pair in pairs]
    return {"median": round(statistics.median(longer), 4), "rounds": [round(each, 4) for each in longer]}


def table(figures: Figures) -> str:
    """For people."""
    head = ["", "tok/s", "median s", "p95 s", "peak GiB", "MFU", "loss at 8", "steps", "passes", "load to step", "warm"]
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
            f"{each['load_to_first_step_seconds']} s",
            f"{each['warm_load_to_first_step_seconds']} s" if "warm_load_to_first_step_seconds" in each else "",
        ]
        for case, arms in figures.items()
        for arm, each in arms.items()
    ]
    beside = [
        f"{case}: a step of unslothd, fixed: {100 * found['median']:+.1f} % to the plain script's (median of rounds)"
        for case, arms in figures.items()
        if (found := _beside_the_script(arms))
    ]
    return "\n".join([columns(head, rows), *beside])


if __name__ == "__main__":
    run(measure, table, parser())
