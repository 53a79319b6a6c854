"""Tools for models: load, prepare, list, unload, generate, and what the server is."""

from typing import Annotated, Any, Literal, cast

from mcp.server.mcpserver import Elicit, Resolve
from pydantic import Field

from unslothd._requests import TrainingState
from unslothd.cli import texts
from unslothd_mcp import budgets, results, safety
from unslothd_mcp.arguments import ChatTurn, ConfigArgument, LoraArgument, ModelId, options
from unslothd_mcp.catalogue import ToolSpec
from unslothd_mcp.errors import ToolFailure
from unslothd_mcp.plain import plain
from unslothd_mcp.progress import PhaseReports
from unslothd_mcp.safety import Approval, Asked, Confirm, Loss
from unslothd_mcp.session import Ctx, session_of

_UNFINISHED: tuple[TrainingState, ...] = ("queued", "running", "recovering", "pausing", "paused", "cancelling")


async def unsloth_load_model(
    ctx: Ctx,
    model_name: Annotated[
        str,
        Field(
            description='Hub id ("unsloth/Llama-3.2-1B-Instruct"), folder or "*.gguf" on the server, a saved adapter, '
            'or "training:<training_id>" for the result of a training.'
        ),
    ],
    max_seq_length: Annotated[
        int, Field(description="Tokens of the longest sequence; longer rows are cut. Default 2048.")
    ] = 2048,
    load_in_4bit: Annotated[
        bool, Field(description="4-bit weights, where the device has the kernels (a GPU). Default true.")
    ] = True,
    token: Annotated[
        str | None, Field(description="Hugging Face token for gated models; never stored or shown. Default null.")
    ] = None,
    device_map: Annotated[str, Field(description='"auto", "cpu", "cuda" or "cuda:N". Default "auto".')] = "auto",
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        Field(description="Compute type. Default null: bfloat16 where supported."),
    ] = None,
    revision: Annotated[str, Field(description='Branch, tag or commit of a Hub model. Default "": main.')] = "",
    full_finetuning: Annotated[
        bool, Field(description="Train all weights instead of an adapter. Default false.")
    ] = False,
) -> results.Loaded:
    """Loads a language model into memory of the server (a worker process of its own) and waits until it is ready.

    Takes seconds to minutes; progress is reported. Defaults: max_seq_length 2048 tokens, 4-bit weights on a GPU.
    Returns model_id, which every other tool takes. Next: unsloth_prepare_for_training to train it, or unsloth_generate.
    """
    session = session_of(ctx)
    chosen: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    # Left out it is "4-bit where the device has the kernels"; a true on a CPU would be carried out there.
    chosen |= {} if load_in_4bit else {"load_in_4bit": False}
    async with PhaseReports(ctx) as reports:
        model = await session.client.load_model(
            model_name,
            on_progress=reports.taker(lambda progress: texts.load_progress(model_name, progress)),
            max_seq_length=max_seq_length,
            token=token or "",
            device_map=device_map,
            revision=revision,
            full_finetuning=full_finetuning,
            **chosen,
        )
    return results.loaded(model)


async def unsloth_prepare_for_training(
    ctx: Ctx,
    model_id: ModelId,
    training_config: ConfigArgument = None,
    lora: LoraArgument = None,
) -> results.Prepared:
    """Attaches a LoRA adapter to a loaded model and sets the hyper-parameters of its trainings.

    Takes seconds. Defaults: rank 16 on all projections, learning_rate 2e-4, batch_size 2 sequences, max_steps 100.
    Called again, it only replaces the hyper-parameters. Next: unsloth_plan_training (dry run) or unsloth_train.
    """
    session = session_of(ctx)
    budgets.check_config(session, options(training_config))
    response = await session.client.prepare(model_id, lora=cast(Any, lora), **options(training_config))
    return results.prepared(response)


async def unsloth_list_models(ctx: Ctx) -> dict[str, results.ListedModel]:
    """Lists the loaded models by model_id: how they were loaded, state, parameters, bytes of memory, running training.

    Answers at once; takes no arguments, so has no defaults. An empty object: nothing is loaded. Next:
    unsloth_prepare_for_training or unsloth_load_model.
    """
    return {model.model_id: results.listed(model) for model in await session_of(ctx).client.list_models()}


async def _approve_unload(ctx: Ctx, model_id: str, force: bool, confirm: str | None) -> Elicit[Approval] | Approval:
    return await safety.approval(ctx, await _lost_by_unloading(ctx, model_id) if force else None, confirm)


async def _lost_by_unloading(ctx: Ctx, model_id: str) -> Loss | None:
    found = await session_of(ctx).client.list_trainings(model=model_id, states=_UNFINISHED)
    if not found:
        return None
    ids = sorted(training.training_id for training in found)
    text = (
        f"Unloading {model_id} cancels {', '.join(ids)} (what runs is saved as a checkpoint, what waits never starts)."
    )
    return Loss(text, {"unload": model_id, "cancels": ids})


async def unsloth_unload_model(
    ctx: Ctx,
    model_id: ModelId,
    asked: Annotated[Asked, Resolve(_approve_unload)],
    force: Annotated[
        bool, Field(description="Cancel its trainings instead of refusing; asks for `confirm`. Default false.")
    ] = False,
    confirm: Confirm = None,
) -> results.Done:
    """Ends the worker of a model and gives its memory back, in bytes; results on disk stay.

    Takes seconds. By default it refuses (MODEL_BUSY) while a training runs or waits. Next: unsloth_load_model for
    another model; the trained adapter loads as "training:<training_id>".
    """
    safety.require(asked)
    freed = await session_of(ctx).client.unload_model(model_id, force=force)
    return results.Done(
        status=results.SUCCESS,
        message=f"{model_id} is unloaded; {texts.size(freed)} of memory are free again.",
        next_step="Nothing more is needed; unsloth_load_model loads another one.",
    )


async def unsloth_generate(
    ctx: Ctx,
    model_id: ModelId,
    prompt: Annotated[
        str | list[ChatTurn],
        Field(description="Text to go on with as it is, or chat turns [{role, content}, …]."),
    ],
    max_new_tokens: Annotated[int, Field(description="Tokens at most, 1 to 65536. Default 256.")] = 256,
    temperature: Annotated[float, Field(description="0 = always the likeliest token. Default 0.")] = 0.0,
    top_p: Annotated[float, Field(description="Probability mass to sample from, to 1. Default 1.")] = 1.0,
    seed: Annotated[int | None, Field(description="Of the sampling. Default null: another one each time.")] = None,
    stop: Annotated[list[str] | None, Field(description="Texts that end it. Default null.")] = None,
    without_adapter: Annotated[bool, Field(description="Ask the base model, to compare. Default false.")] = False,
) -> dict[str, Any]:
    """Generates text with a loaded model, with its adapter if it has one.

    Takes seconds; refused (MODEL_BUSY) while a training runs on the model. Defaults: 256 tokens, temperature 0.
    Returns text, tokens and speed in tokens a second. Next: the same call with without_adapter=true shows what
    training changed.
    """
    if not prompt:
        raise ToolFailure("INVALID_FIELD", "prompt is empty: give text or chat turns.", code="INVALID_ARGUMENT")
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    sampling |= {} if seed is None else {"seed": seed}
    turns: Any = prompt
    stream = session_of(ctx).client.generate(
        model_id, turns, stop=stop or [], without_adapter=without_adapter, **sampling
    )
    text = await stream.text()
    summary = plain(stream.summary) if stream.summary is not None else {}
    next_step = "Call it with without_adapter=true to compare; unsloth_export_model writes files."
    return {"status": results.SUCCESS, "text": text, **summary, "next_step": next_step}


async def unsloth_server_info(ctx: Ctx) -> dict[str, Any]:
    """Tells what the server is: versions, devices with memory in bytes, limits, export formats.

    Answers at once; takes no arguments, so has no defaults. `adapter` has this adapter's own limits. Next:
    unsloth_load_model.
    """
    session = session_of(ctx)
    settings = session.settings
    limits = {
        "read_only": settings.read_only,
        "max_steps": settings.max_steps,
        "max_gpu_minutes": settings.max_gpu_minutes,
        "allowed_roots": [str(root) for root in settings.allowed_roots],
    }
    if settings.max_gpu_minutes is not None:
        limits["used_gpu_minutes"] = round(await budgets.used_minutes(session), 2)
    return {"status": results.SUCCESS, **plain(await session.client.server_info()), "adapter": limits}


TOOLS = (
    ToolSpec(unsloth_load_model, "Load a model", open_world=True),
    ToolSpec(unsloth_prepare_for_training, "Prepare a model for training", idempotent=True),
    ToolSpec(unsloth_list_models, "List loaded models", read_only=True),
    ToolSpec(unsloth_unload_model, "Unload a model", destructive=True, idempotent=True),
    ToolSpec(unsloth_generate, "Generate text", read_only=True),
    ToolSpec(unsloth_server_info, "Tell about the server", read_only=True),
)
