"""Tools for files: upload rows, list stored datasets, export a model."""

from typing import Annotated, Any, Literal

from pydantic import Field

import unslothd
from unslothd.v1.artifact_pb2 import ExportProgress
from unslothd_mcp import results
from unslothd_mcp.arguments import ModelId, TrainingId
from unslothd_mcp.catalogue import ToolSpec
from unslothd_mcp.datasets import dataset
from unslothd_mcp.errors import invalid
from unslothd_mcp.plain import Plain, plain
from unslothd_mcp.progress import PhaseReports
from unslothd_mcp.session import Ctx, session_of


async def unsloth_upload_dataset(
    ctx: Ctx,
    rows: Annotated[
        list[dict[str, Any]] | None, Field(description="Rows as objects of columns. Default null; or give file.")
    ] = None,
    file: Annotated[
        str | None,
        Field(
            description="A .jsonl, .json, .csv, .parquet or .arrow file of the adapter's machine, below an "
            "--allowed-root. Default null; or give rows."
        ),
    ] = None,
    name: Annotated[str, Field(description='For people, at most 200 characters. Default "".')] = "",
) -> dict[str, Any]:
    """Stores rows on the server, checked, to train on any number of times; equal bytes are stored once.

    Takes seconds. Give rows or file; by default it has no name. Returns dataset_id ("sha256:…"), rows, bytes and
    columns. Next: pass dataset_id as train_dataset to unsloth_plan_training or unsloth_train.
    """
    session = session_of(ctx)
    if (rows is None) == (file is None):
        raise invalid(unslothd.errors.FieldViolation("rows", "give either rows or file"))
    value: Plain = {"file": file} if rows is None else {"rows": rows}
    data = dataset(value, "rows" if file is None else "file", session.settings.allowed_roots)
    stored = await session.client.upload_dataset(data, name=name)
    return {
        "status": results.SUCCESS,
        **plain(stored),
        "next_step": f'Call unsloth_plan_training or unsloth_train with train_dataset="{stored.dataset_id}".',
    }


async def unsloth_list_datasets(
    ctx: Ctx, limit: Annotated[int, Field(description="Datasets at most, 1 to 1000. Default 20.")] = 20
) -> dict[str, Any]:
    """Lists stored datasets, newest first: id, name, format, rows, bytes, columns.

    Answers at once. Default: the newest 20 datasets. Next: pass a dataset_id as train_dataset to unsloth_train.
    """
    return {"datasets": [plain(each) for each in await session_of(ctx).client.list_datasets(limit=limit)]}


async def unsloth_export_model(
    ctx: Ctx,
    format: Annotated[
        Literal["adapter", "merged_16bit", "merged_4bit", "gguf"],
        Field(description='Form to write; unsloth_server_info has limits.export_formats. Default "adapter".'),
    ] = "adapter",
    training_id: Annotated[TrainingId | None, Field(description="Its result. Default null; or give model_id.")] = None,
    model_id: Annotated[ModelId | None, Field(description="A loaded model. Default null; or give training_id.")] = None,
    checkpoint_step: Annotated[
        int, Field(description="With training_id: optimizer step of one of its checkpoints. Default 0: the result.")
    ] = 0,
    gguf_quantization: Annotated[str, Field(description='With gguf: q4_k_m, q8_0, f16, … Default "": q8_0.')] = "",
    output_dir: Annotated[str, Field(description='Folder below the output root. Default "": a free name.')] = "",
) -> dict[str, Any]:
    """Writes a model as files on the server and waits until they are whole: the adapter, merged weights, or GGUF.

    Takes seconds to minutes; progress is reported. Default: the adapter. Returns artifact_id, path on the server, and
    the files with bytes and sha256. Next: the user fetches them with `unslothd download ARTIFACT_ID`; then
    unsloth_unload_model.
    """
    if (training_id is None) == (model_id is None):
        raise invalid(unslothd.errors.FieldViolation("training_id", "give either training_id or model_id"))
    client = session_of(ctx).client
    source: Any = model_id if training_id is None else (training_id, checkpoint_step)
    async with PhaseReports(ctx) as reports:
        artifact = await client.export(
            source,
            format,
            gguf_quantization=gguf_quantization,
            output_dir=output_dir,
            on_progress=reports.taker(_export_text),
        )
    return {
        "status": results.SUCCESS,
        **plain(artifact),
        "next_step": f"The user fetches the files with `unslothd download {artifact.artifact_id} --to FOLDER`; call "
        "unsloth_unload_model when the model is not needed any more.",
    }


def _export_text(progress: ExportProgress) -> str:
    done = f" {progress.done} of {progress.total}" if progress.total else ""
    return f"export: {progress.phase}{done}"


TOOLS = (
    ToolSpec(unsloth_upload_dataset, "Upload rows", idempotent=True),
    ToolSpec(unsloth_list_datasets, "List stored datasets", read_only=True),
    ToolSpec(unsloth_export_model, "Export a model"),
)
