"""Prompts that a host offers its user: a guided fine-tune, and the diagnosis of a training that failed."""

import json
from typing import Annotated

from mcp.server.mcpserver import MCPServer
from pydantic import Field

from unslothd_mcp import results
from unslothd_mcp.session import Ctx, Session, session_of
from unslothd_mcp.tools_trainings import event_view

_LAST_EVENTS = 30


def register(server: MCPServer[Session]) -> None:
    """Adds the prompts."""
    server.prompt(title="Guided fine-tune")(fine_tune)
    server.prompt(title="Diagnose a training")(diagnose_training)


def fine_tune(
    goal: Annotated[str, Field(description="What the model shall learn, in a sentence.")],
    dataset: Annotated[str, Field(description="Hub name, path on the server, dataset id; or empty: ask me.")] = "",
    model_name: Annotated[str, Field(description="Hub id or path on the server; or empty: suggest one.")] = "",
) -> str:
    """Leads through a fine-tune: look, plan, train, judge, export."""
    data = f"The rows are in {dataset}." if dataset else "Ask me for the rows first."
    model = f"The base model is {model_name}." if model_name else "Suggest a base model that fits the device."
    return f"""Fine-tune a language model with the unsloth_ tools. Goal: {goal}
{data} {model}

1. unsloth_server_info: is there a GPU, how much memory is free, which export formats are there?
2. unsloth_load_model, then unsloth_prepare_for_training. Keep the defaults unless there is a reason.
3. unsloth_plan_training: show me two rows as the model sees them, the part that carries loss, steps and warnings. Stop
   and ask me if the rows look wrong or a warning matters.
4. unsloth_generate with two prompts that show the goal, before the training.
5. unsloth_train with about a tenth of the rows as eval_dataset. Tell me the loss now and then.
6. unsloth_generate with the same prompts: compare with before and judge by the goal, not by the loss alone.
7. If it is good: unsloth_export_model, and tell me the path. At the end unsloth_unload_model.

When a call fails, do what `next_step` of its result says. Never repeat a failed call unchanged."""


async def diagnose_training(
    training_id: Annotated[str, Field(description="As unsloth_list_trainings shows it.")], ctx: Ctx
) -> str:
    """Explains why a training failed or went badly, from its state and the end of its log."""
    client = session_of(ctx).client
    training = await client.get_training(training_id)
    last = training.last_sequence
    run = client.watch(training_id, after_sequence=max(0, last - _LAST_EVENTS))
    lines: list[str] = []
    try:
        async for event in run:
            view = event_view(event)
            lines.append(f"{view['sequence']} {view['time']} {view['text'] or view['kind']}")
            if event.sequence >= last:
                break
    finally:
        run.close()
    state = json.dumps(results.training_view(training), ensure_ascii=False, indent=1)
    log = "\n".join(lines)
    return f"""Find out what went wrong with the training {training_id}, and what to do.

Its state:
{state}

The end of its event log:
{log}

Look at: the error and its next step; warnings (rows cut or dropped, optimizer replaced); recoveries; whether the loss
fell, stayed or became nan; gradient norms; memory. unsloth_watch_training(training_id="{training_id}", wait_seconds=0)
has the whole log. Say the cause in one sentence, with the evidence, then what to change, by name of the argument. Ask
me before you start anything."""
