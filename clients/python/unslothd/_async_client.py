"""The client for asyncio: the same flows as `_client.py`, carried out by the other driver."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import grpc

from unslothd import _artifacts, _base, _download, _flows, _operations, _receipt, _requests
from unslothd._artifacts import DownloadSource, ExportFormatName, ExportSource
from unslothd._datasets import DatasetIdLike, DatasetLike, dataset_id
from unslothd._download_folder import DownloadProgress, Folder
from unslothd._drive import AsyncDriver, Transport
from unslothd._requests import DisconnectPolicyName, LoraOptions, ModelLike, Prompt, TrainingLike, TrainingState
from unslothd._row_format import Layout
from unslothd._runs import AsyncTextStream, AsyncTrainingRun
from unslothd._upload import OnProgress
from unslothd._upload_sources import FormatName
from unslothd.v1 import artifact_pb2, model_pb2, service_pb2, training_pb2
from unslothd.v1.dataset_pb2 import Dataset, RowFormat
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

if TYPE_CHECKING:
    from unslothd.v1.service_pb2_grpc import UnslothServiceAsyncStub

ResultT = TypeVar("ResultT")


class AsyncClient(_base.BaseClient):
    """Talks to an unslothd server, for asyncio. Belongs to the event loop of its first call.

    Example:
        >>> async with unslothd.AsyncClient("127.0.0.1:50051") as client:
        ...     model = await client.load_model("unsloth/Llama-3.2-1B-Instruct")
        ...     await client.prepare(model, learning_rate=1e-4, lora={"r": 8})
        ...     async for event in await client.train(model, [{"text": "…"}], max_steps=10):
        ...         print(event)

    As `Client` in everything else.
    """

    @cached_property
    def channel(self) -> grpc.aio.Channel:
        """The connection; opened at the first use, inside the event loop."""
        if self._credentials is not None:
            return grpc.aio.secure_channel(self.target, self._credentials, options=self._options)
        return grpc.aio.insecure_channel(self.target, options=self._options)

    @cached_property
    def stub(self) -> "UnslothServiceAsyncStub":
        """The generated stub, for calls that have no method here.

        Its errors are grpc.RpcError, and its calls carry no token: pass metadata=(("authorization", "Bearer …"),).
        """
        return UnslothServiceStub(self.channel)

    @cached_property
    def _transport(self) -> Transport:
        return Transport(self.stub, self.target, self._metadata)

    async def close(self) -> None:
        """Ends the connection. What runs on the server goes on."""
        await self.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def server_info(self) -> service_pb2.GetServerInfoResponse:
        """Returns versions, devices and limits of the server."""
        return await self._call(self._unary_flow("GetServerInfo", service_pb2.GetServerInfoRequest()))

    async def load_model(
        self,
        model_name: str,
        *,
        request_id: str | None = None,
        on_progress: Callable[[model_pb2.LoadProgress], None] | None = None,
        **options: Unpack[_requests.LoadOptions],
    ) -> model_pb2.Model:
        """Loads a model into a worker of its own and waits until it is ready.

        Args:
            model_name: Hub id, folder or "*.gguf" file on the server, a saved adapter, "training:<training_id>", or
                "training:<training_id>/checkpoint-<step>".
            request_id: A call with an id that was used before attaches to that load; default: a new one.
            on_progress: Called with each step of the load.
            **options: max_seq_length (tokens, default 2048), load_in_4bit (default: true where the device can),
                token (Hugging Face; never stored or logged), device_map ("auto", "cpu", "cuda" or "cuda:N"), dtype
                ("bfloat16", "float16" or "float32"), revision (branch, tag or commit), full_finetuning (train all
                weights instead of an adapter), wait_for_memory (instead of being refused while the device is full).

        Raises:
            NotFound: No such model. PermissionDenied, FailedPrecondition, ResourceExhausted: see `reason`.
            Unavailable: The server or the Hub cannot be reached.
        """
        driver = AsyncDriver(self._load_flow(model_name, request_id, options), self._transport)
        async for progress in driver:
            if on_progress is not None:
                on_progress(progress)
        return driver.result

    async def get_model(self, model: ModelLike) -> model_pb2.Model:
        """Returns a model as it is now."""
        request = service_pb2.GetModelRequest(model_id=_requests.model_id(model))
        return (await self._call(self._unary_flow("GetModel", request))).model

    async def list_models(self) -> list[model_pb2.Model]:
        """Returns all models, in the order of their loading."""
        response = await self._call(self._unary_flow("ListModels", service_pb2.ListModelsRequest()))
        return list(response.models)

    async def prepare(
        self,
        model: ModelLike,
        *,
        lora: model_pb2.LoraConfig | LoraOptions | None = None,
        training_config: training_pb2.TrainingConfig | None = None,
        **options: Unpack[_requests.TrainingOptions],
    ) -> service_pb2.PrepareForTrainingResponse:
        """Attaches trainable parameters and sets the config of the trainings on this model.

        Args:
            model: Model or its id.
            lora: The adapter, e.g. {"r": 8, "target_modules": ["q_proj", "v_proj"]}; None = the defaults.
            training_config: Hyper-parameters as a message; `options` win over it.
            **options: Hyper-parameters by name, e.g. learning_rate=1e-4.

        Returns:
            The model, and config and adapter with every field set.

        Raises:
            FailedPrecondition: MODEL_NOT_READY, MODEL_BUSY, or ALREADY_PREPARED with another adapter.
        """
        request = _requests.prepare(model, training_config, lora, options)
        return await self._call(self._unary_flow("PrepareForTraining", request, slow=True))

    async def unload_model(self, model: ModelLike, *, force: bool = False) -> int:
        """Ends the worker of a model and returns the bytes of memory that this gave back.

        Args:
            model: Model or its id.
            force: Cancel its trainings (with a checkpoint) instead of refusing.
        """
        request = service_pb2.UnloadModelRequest(model_id=_requests.model_id(model), force=force)
        flow = self._unary_flow("UnloadModel", request, slow=True, repeatable=False)
        return (await self._call(flow)).freed_memory_bytes

    async def upload_dataset(
        self,
        data: DatasetLike,
        *,
        name: str = "",
        format: FormatName | None = None,
        on_progress: OnProgress | None = None,
    ) -> Dataset:
        """Stores rows on the server, to train on them any number of times. Rows that it has already are not sent.

        Args:
            data: A local file (.jsonl, .csv, .parquet, .arrow, .json), a `datasets.Dataset`, a `pandas.DataFrame`,
                a table of Arrow (pyarrow, polars and others), or an iterable of dicts of any length.
            name: For people; need not be unique.
            format: Of a file whose name does not say it.
            on_progress: Called after each piece that was sent, from another thread.

        Returns:
            The dataset; `train` takes it.

        Raises:
            InvalidRequest: DATASET_ROW (`field_violations` names the first 20 bad rows), DATASET_EMPTY or
                DATASET_DAMAGED. ResourceExhausted: DATASET_TOO_LARGE or DISK_FULL. Nothing is kept then.
        """
        return await self._call(self._upload_flow(data, name, format, on_progress))

    async def get_dataset(self, dataset: DatasetIdLike) -> Dataset:
        """Returns a stored dataset."""
        request = service_pb2.GetDatasetRequest(dataset_id=dataset_id(dataset))
        return (await self._call(self._unary_flow("GetDataset", request))).dataset

    async def list_datasets(self, *, limit: int | None = None) -> list[Dataset]:
        """Returns stored datasets, newest first.

        Args:
            limit: At most so many; None = all.
        """
        return await self._call(self._list_datasets_flow(limit))

    async def delete_dataset(self, dataset: DatasetIdLike) -> None:
        """Removes a stored dataset.

        Raises:
            FailedPrecondition: DATASET_IN_USE, while a training that is not over reads it.
        """
        request = service_pb2.DeleteDatasetRequest(dataset_id=dataset_id(dataset))
        await self._call(self._unary_flow("DeleteDataset", request, repeatable=False))

    async def train(
        self,
        model: ModelLike,
        train_dataset: DatasetLike,
        eval_dataset: DatasetLike | None = None,
        *,
        row_format: Layout | RowFormat | None = None,
        template: str = "",
        training_config: training_pb2.TrainingConfig | None = None,
        request_id: str | None = None,
        disconnect_policy: DisconnectPolicyName = "detach",
        labels: Mapping[str, str] | None = None,
        **options: Unpack[_requests.TrainingOptions],
    ) -> AsyncTrainingRun:
        """Starts a training and returns it, to be iterated for its events.

        Args:
            model: A prepared model or its id.
            train_dataset: Rows to train on: whatever `unslothd.dataset` accepts.
            eval_dataset: Rows to evaluate on; optional.
            row_format: Layout of the rows by name, or what `unslothd.row_format` returns; None = detected.
            template: Text with {column} places, in place of row_format.
            training_config: Overrides of the prepared config as a message; `options` win over it.
            request_id: A call with an id that was used before attaches to that training; default: a new one.
            disconnect_policy: "detach": the training goes on without this client; "cancel": it does not.
            labels: For your own use; `list_trainings` filters by them.
            **options: Overrides of the prepared config by name, e.g. max_steps=100.

        Returns:
            The accepted training. Iterating it raises TrainingFailed or TrainingCancelled after the last event of a
            training that ended so.

        Raises:
            InvalidRequest: Fields or rows are wrong. NotFound, FailedPrecondition, AlreadyExists, ResourceExhausted:
                the training was refused; see `reason`.
        """
        _requests.config(training_config, options)  # wrong names are told before anything is uploaded
        train_dataset, eval_dataset = await self._call(self._placed_flow(train_dataset, eval_dataset))
        request = _requests.train(
            model,
            train_dataset,
            eval_dataset,
            row_format=row_format,
            template=template,
            training_config=training_config,
            request_id=request_id,
            disconnect_policy=disconnect_policy,
            labels=labels,
            options=options,
        )
        cursor = _flows.Cursor()
        driver = AsyncDriver(self._train_flow(request, cursor), self._transport)
        return AsyncTrainingRun(self, cursor, driver, first=await anext(driver), raises=True)

    async def plan(
        self,
        model: ModelLike,
        train_dataset: DatasetLike,
        eval_dataset: DatasetLike | None = None,
        *,
        measure: bool = False,
        preview_rows: int = 3,
        row_format: Layout | RowFormat | None = None,
        template: str = "",
        training_config: training_pb2.TrainingConfig | None = None,
        **options: Unpack[_requests.TrainingOptions],
    ) -> training_pb2.TrainingPlan:
        """Works out what `train` would do with the same arguments, without doing it.

        Args:
            model: A loaded model or its id.
            train_dataset: Rows to train on: whatever `unslothd.dataset` accepts.
            eval_dataset: Rows to evaluate on; optional.
            measure: Run a short probe on the device, for memory and speed.
            preview_rows: So many of the first rows as the model sees them, 1 to 100.
            row_format: Layout of the rows by name, or what `unslothd.row_format` returns; None = detected.
            template: Text with {column} places, in place of row_format.
            training_config: Overrides of the prepared config as a message; `options` win over it.
            **options: Overrides of the prepared config by name, e.g. max_steps=100.

        Returns:
            Config, rows, tokens, steps, memory, warnings, and rows with the characters that carry loss.

        Raises:
            InvalidRequest: Fields or rows are wrong. FailedPrecondition: MODEL_BUSY while a training runs on the model.
        """
        _requests.config(training_config, options)  # wrong names are told before anything is uploaded
        train_dataset, eval_dataset = await self._call(self._placed_flow(train_dataset, eval_dataset))
        request = _requests.plan(
            model,
            train_dataset,
            eval_dataset,
            row_format=row_format,
            template=template,
            training_config=training_config,
            measure=measure,
            preview_rows=preview_rows,
            options=options,
        )
        return (await self._call(self._unary_flow("PlanTraining", request, slow=True))).plan

    def watch(self, training: TrainingLike, *, after_sequence: int = 0) -> AsyncTrainingRun:
        """Reads the events of a training, the past ones first.

        Iteration ends after the last event, whatever that is; `result()` raises if the training did not succeed.

        Args:
            training: Training or its id.
            after_sequence: Last sequence that you have seen; 0 = from the beginning.
        """
        cursor = _flows.Cursor(_requests.training_id(training), after_sequence)
        driver = AsyncDriver(self._watch_flow(cursor), self._transport)
        return AsyncTrainingRun(self, cursor, driver, raises=False)

    async def pause(self, training: TrainingLike) -> training_pb2.Training:
        """Asks a training to save at the next step boundary and to free its device; returns it as it is then.

        Raises:
            FailedPrecondition: TRAINING_STATE: it is over.
        """
        request = service_pb2.PauseTrainingRequest(training_id=_requests.training_id(training))
        return (await self._call(self._unary_flow("PauseTraining", request))).training

    async def resume(self, training: TrainingLike, *, checkpoint_step: int = 0) -> AsyncTrainingRun:
        """Goes on with a paused, failed or cancelled training and returns it, to be iterated for what happens from now.

        Args:
            training: Training or its id.
            checkpoint_step: Step of the checkpoint to go on from; later ones are removed. 0 = the newest.

        Returns:
            The training. Iterating it raises TrainingFailed or TrainingCancelled after the last event of a training
            that ended so. `last_sequence` is that of the last event before.

        Raises:
            NotFound: No such training, or no such checkpoint. FailedPrecondition, AlreadyExists, ResourceExhausted: see
                `reason`.
        """
        cursor = await self._call(self._resume_flow(training, checkpoint_step))
        driver = AsyncDriver(self._watch_flow(cursor), self._transport)
        return AsyncTrainingRun(self, cursor, driver, raises=True)

    async def get_training(self, training: TrainingLike) -> training_pb2.Training:
        """Returns a training as it is now."""
        request = service_pb2.GetTrainingRequest(training_id=_requests.training_id(training))
        return (await self._call(self._unary_flow("GetTraining", request))).training

    async def list_trainings(
        self,
        *,
        model: ModelLike | None = None,
        states: Sequence[TrainingState] = (),
        labels: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> list[training_pb2.Training]:
        """Returns trainings, newest first.

        Args:
            model: Only those on this model.
            states: Only those in one of these states, e.g. ["running", "queued"].
            labels: Only those that have all of these.
            limit: At most so many; None = all.
        """
        return await self._call(self._list_trainings_flow(model, states, labels, limit))

    async def cancel(self, training: TrainingLike, *, save_checkpoint: bool = True) -> training_pb2.Training:
        """Asks a training to stop at the next step boundary and returns it as it is then.

        Args:
            training: Training or its id.
            save_checkpoint: Save a checkpoint and the adapter so far.
        """
        request = service_pb2.CancelTrainingRequest(
            training_id=_requests.training_id(training), save_checkpoint=save_checkpoint
        )
        return (await self._call(self._unary_flow("CancelTraining", request))).training

    def generate(
        self, model: ModelLike, prompt: Prompt, **options: Unpack[_requests.GenerationOptions]
    ) -> AsyncTextStream:
        """Streams text from a model: iterate for the pieces, or `text()` for all of it.

        Args:
            model: Model or its id.
            prompt: Text to go on with as it is, or chat turns [{"role": "user", "content": "…"}].
            **options: max_new_tokens, temperature, top_p, seed, stop, without_adapter.
        """
        return AsyncTextStream(
            AsyncDriver(_flows.generate(_requests.generate(model, prompt, options)), self._transport)
        )

    async def export(
        self,
        source: ExportSource,
        format: ExportFormatName,
        *,
        gguf_quantization: str = "",
        output_dir: str = "",
        on_progress: Callable[[artifact_pb2.ExportProgress], None] | None = None,
    ) -> artifact_pb2.Artifact:
        """Writes a model in another form on the server and waits until it is done; `download` fetches the files.

        After a lost connection it attaches to the export, which goes on meanwhile.

        Args:
            source: A loaded model, a training (its result), or (training, step) for one of its checkpoints; each as a
                message or by its id.
            format: "adapter", "merged_16bit", "merged_4bit" or "gguf"; `server_info().limits.export_formats` has those
                that this server can write.
            gguf_quantization: Only with "gguf": "q4_k_m", "q8_0", "f16" and so on; empty = "q8_0".
            output_dir: Folder below the server's output root; empty = a free name.
            on_progress: Called with each step of the export.

        Raises:
            NotFound: No such model, training or checkpoint. FailedPrecondition: MODEL_BUSY, or EXPORT_UNSUPPORTED.
            AlreadyExists: OUTPUT_DIR_TAKEN. ResourceExhausted: DISK_FULL.
            Unavailable: The server was away for longer than reconnect_timeout.
        """
        request = _artifacts.export_request(source, format, gguf_quantization, output_dir)
        driver = AsyncDriver(_artifacts.export(request, self._stream_retry()), self._transport)
        async for progress in driver:
            if on_progress is not None:
                on_progress(progress)
        return driver.result

    async def download(
        self,
        source: DownloadSource,
        folder: str | PathLike[str],
        *,
        names: Sequence[str] = (),
        overwrite: bool = False,
        on_progress: Callable[[DownloadProgress], None] | None = None,
    ) -> list[Path]:
        """Downloads files into a folder here, checks their hashes, and returns their paths.

        A file is called "<name>.part" until it is whole. What is here already is not written again, and a broken
        download goes on where it stopped, in this call or in the next one.

        Args:
            source: An artifact, a training (its result), or (training, step) for one of its checkpoints; each as a
                message or by its id.
            folder: Where to; made when it does not exist. Nothing is written outside of it.
            names: Only these files.
            overwrite: Replace files of the same name and other content.
            on_progress: Called whenever more of a file is here.

        Raises:
            NotFound: No such artifact, training, checkpoint or file.
            FileExistsError: A file of the same name and other content is here; see `overwrite`.
            ResourceExhausted: The disk here is full. What has come is kept.
            PermissionDenied: A file's name leads out of the folder.
            UnslothdError: With code DATA_LOSS: the bytes do not have the hash that the server told.
            Unavailable: The connection was lost for longer than reconnect_timeout.
        """
        flow = _download.download(source, names, Folder(Path(folder), overwrite=overwrite), self._stream_retry())
        driver = AsyncDriver(flow, self._transport)
        try:
            async for progress in driver:
                if on_progress is not None:
                    on_progress(progress)
            return driver.result
        finally:
            driver.close()

    async def verify_receipt(
        self, training: TrainingLike, *, data: str | PathLike[str] | None = None
    ) -> list[_receipt.Finding]:
        """Checks a training's result on the server against its receipt: reads every file of it, and keeps none.

        Args:
            training: Training or its id.
            data: File here that it was trained on.

        Returns:
            What differs; empty when everything is as the receipt says. `unslothd.verify_receipt` checks a folder here.

        Raises:
            NotFound: No such training, or it has no result.
            ReceiptError: There is no receipt, or it is damaged, or of a version that this client does not know.
        """
        flow = _receipt.verify_on_server(_requests.training_id(training), self._stream_retry())
        receipt, findings = await self._call(flow)
        return [*findings, *_receipt.verify_data(receipt, data)]

    async def _call(self, flow: _operations.Flow[Any, ResultT]) -> ResultT:
        return await AsyncDriver(flow, self._transport).run()
