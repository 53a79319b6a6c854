"""`unslothd watch`, `pause`, `resume`, `cancel` and `trainings`: trainings that run or ran."""

from typing import Annotated, cast

import typer
from rich.table import Column, Table

import unslothd
from unslothd._requests import TrainingState
from unslothd.cli import options, texts
from unslothd.cli.follow import follow
from unslothd.cli.session import Output, session

TrainingId = Annotated[str, typer.Argument(metavar="TRAINING_ID", help="As `unslothd trainings list` shows it.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("watch", epilog="Example: unslothd watch training-20261124-120000-abcdef --after 40")(watch)
    trainings = typer.Typer(no_args_is_help=True)
    trainings.command("list", epilog="Example: unslothd trainings list --state running --state queued")(list_trainings)
    trainings.command("get", epilog="Example: unslothd trainings get training-20261124-120000-abcdef --json")(get)
    trainings.command("checkpoints", epilog="Example: unslothd trainings checkpoints training-20261124-120000-abcdef")(
        checkpoints
    )
    app.add_typer(trainings, name="trainings", help="List trainings and look at one.")
    app.command("pause", epilog="Example: unslothd pause training-20261124-120000-abcdef")(pause)
    app.command("resume", epilog="Example: unslothd resume training-20261124-120000-abcdef --checkpoint 40")(resume)
    app.command("cancel", epilog="Example: unslothd cancel training-20261124-120000-abcdef --no-checkpoint")(cancel)


@options.connects
def watch(
    training_id: TrainingId,
    after: Annotated[int, typer.Option(min=0, help="Last sequence that you have seen; 0 = from the beginning.")] = 0,
    as_json: options.Json = False,
    *,
    server: options.Server,
) -> None:
    """Watch a training: what happened so far, then live. Exits with 1 if it failed or was cancelled."""
    with session(server, as_json) as (client, out):
        follow(client.watch(training_id, after_sequence=after), out)


@options.connects
def list_trainings(
    model_id: Annotated[str | None, typer.Option(metavar="ID", help="Only those on this model.")] = None,
    state: Annotated[list[str] | None, typer.Option(help="Only those in this state, e.g. running; repeatable.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only with this label; repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: options.Json = False,
    *,
    server: options.Server,
) -> None:
    """List trainings, newest first."""
    labels = options.labels(label or [])
    with session(server, as_json) as (client, out):
        found = client.list_trainings(
            model=model_id, states=cast(list[TrainingState], state or []), labels=labels, limit=limit
        )
        if as_json:
            for training in found:
                out.json(training)
        elif found:
            out.console.print(_table(found))
        else:
            out.note("No training matches. Start one: unslothd train --model NAME --dataset rows.jsonl")


def _table(trainings: list[unslothd.Training]) -> Table:
    table = Table(Column("training id", no_wrap=True), "model", "state", "step", "loss", "created")
    for training in trainings:
        loss = f"{training.metrics.train_loss:.4f}" if training.HasField("metrics") else ""
        steps = f"{training.step}/{training.total_steps}"
        state, created = texts.training_state(training.state), texts.moment(training.create_time)
        table.add_row(training.training_id, training.model_id, state, steps, loss, created)
    return table


@options.connects
def get(training_id: TrainingId, as_json: options.Json = False, *, server: options.Server) -> None:
    """Show one training as it is now."""
    with session(server, as_json) as (client, out):
        training = client.get_training(training_id)
        if as_json:
            out.json(training)
        else:
            _show(training, out)


def _show(training: unslothd.Training, out: Output) -> None:
    lines = {
        "training": training.training_id,
        "model": f"{training.model_id} ({training.model_name})",
        "state": texts.training_state(training.state),
        "step": f"{training.step} of {training.total_steps}",
        "events": str(training.last_sequence),
        "created": texts.moment(training.create_time),
        "started": texts.moment(training.start_time),
        "ended": texts.moment(training.end_time),
        "figures": texts.metrics(training.metrics) if training.HasField("metrics") else "",
        "error": training.error.message,
        "adapter": training.output_dir,
        "checkpoints": ", ".join(str(each.step) for each in training.checkpoints),
        "best": _best(training),
        "labels": ", ".join(f"{key}={value}" for key, value in sorted(training.labels.items())),
    }
    for name, value in lines.items():
        if value:
            out.line(f"{name:12}{value}")


def _best(training: unslothd.Training) -> str:
    if not training.HasField("best_checkpoint"):
        return ""
    best = training.best_checkpoint
    return f"checkpoint at step {best.step}, eval loss {best.eval_loss:.4f}"


@options.connects
def checkpoints(
    training_id: TrainingId,
    as_json: options.Json = False,
    *,
    server: options.Server,
) -> None:
    """List the checkpoints that a training can go on from, oldest first."""
    with session(server, as_json) as (client, out):
        training = client.get_training(training_id)
        if as_json:
            for each in training.checkpoints:
                out.json(each)
        elif training.checkpoints:
            out.console.print(_checkpoint_table(training))
        else:
            out.note(f"{training_id} has no checkpoint; --save-steps of `unslothd train` says how often one is saved")


def _checkpoint_table(training: unslothd.Training) -> Table:
    table = Table("step", "eval loss", "", "saved", Column("folder on the server", overflow="fold"))
    best = training.best_checkpoint.step if training.HasField("best_checkpoint") else None
    for each in training.checkpoints:
        loss = f"{each.eval_loss:.4f}" if each.HasField("eval_loss") else ""
        mark = "best" if each.step == best else ""
        table.add_row(str(each.step), loss, mark, texts.moment(each.create_time), each.path)
    return table


@options.connects
def pause(training_id: TrainingId, as_json: options.Json = False, *, server: options.Server) -> None:
    """Ask a training to save at its next step and to free its device."""
    with session(server, as_json) as (client, out):
        training = client.pause(training_id)
        if as_json:
            out.json(training)
        else:
            out.line(f"{training_id} is {texts.training_state(training.state)}")
            out.note(f"Go on: unslothd resume {training_id}")


@options.connects
def resume(
    training_id: TrainingId,
    checkpoint: Annotated[
        int, typer.Option(metavar="STEP", min=0, help="Checkpoint to go on from; 0 = the newest. Later ones go.")
    ] = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Do not watch it.")] = False,
    as_json: options.Json = False,
    *,
    server: options.Server,
) -> None:
    """Go on with a paused, failed or cancelled training and watch it live. Ctrl-C detaches."""
    with session(server, as_json) as (client, out):
        run = client.resume(training_id, checkpoint_step=checkpoint)
        if not detach:
            follow(run, out)
            return
        training = client.get_training(training_id)
        if as_json:
            out.json(training)
        else:
            out.line(f"{training_id} is {texts.training_state(training.state)}")
            out.note(f"Watch it: unslothd watch {training_id} --after {run.last_sequence}")


@options.connects
def cancel(
    training_id: TrainingId,
    checkpoint: Annotated[bool, typer.Option(help="Save a checkpoint and the adapter so far.")] = True,
    as_json: options.Json = False,
    *,
    server: options.Server,
) -> None:
    """Ask a training to stop at its next step."""
    with session(server, as_json) as (client, out):
        training = client.cancel(training_id, save_checkpoint=checkpoint)
        if as_json:
            out.json(training)
        else:
            out.line(f"{training_id} is {texts.training_state(training.state)}")
