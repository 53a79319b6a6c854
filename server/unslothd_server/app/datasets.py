"""Uploaded datasets: received, checked while they stream, stored once, listed, deleted while nobody uses them."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from unslothd.v1.dataset_pb2 import DataFormat, Dataset
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.service_pb2 import ListDatasetsRequest, UploadDatasetHeader, UploadDatasetRequest
from unslothd_server.app.dataset_intake import Intake
from unslothd_server.app.dataset_store import DatasetStore, IncomingRows, dataset_id_of, explained
from unslothd_server.app.paging import page
from unslothd_server.app.ports import RowCheck, RowChecker, RowsFound
from unslothd_server.app.training_state import now
from unslothd_server.errors import (
    DatasetError,
    ExhaustedError,
    FieldViolation,
    InvalidFieldsError,
    NotFoundError,
    PreconditionError,
)

# Each upload has a process that checks its rows; further uploads wait for their turn.
_MAX_UPLOADS = 16


class Datasets:
    """The registry of datasets.

    Args:
        store: Their folders.
        checker: Checks rows while they stream.
        max_bytes: Largest dataset.
    """

    def __init__(self, store: DatasetStore, checker: RowChecker, *, max_bytes: int) -> None:
        self._store = store
        self._checker = checker
        self.max_bytes = max_bytes
        self._datasets = {dataset.dataset_id: dataset for dataset in store.load_all()}
        self._slots = asyncio.Semaphore(_MAX_UPLOADS)

    # --- reading ---

    def get(self, dataset_id: str) -> Dataset:
        """Returns a dataset. Raises NotFoundError (DATASET_NOT_FOUND)."""
        try:
            return self._datasets[dataset_id]
        except KeyError:
            raise NotFoundError(
                ErrorReason.ERROR_REASON_DATASET_NOT_FOUND,
                f'No dataset "{dataset_id}" is stored. ListDatasets shows all; UploadDataset stores one.',
            ) from None

    def rows_of(self, dataset_id: str) -> Path:
        """Returns the file with the rows. Raises NotFoundError (DATASET_NOT_FOUND)."""
        return self._store.rows_of(self.get(dataset_id))

    def list_page(self, request: ListDatasetsRequest) -> tuple[list[Dataset], str]:
        """Returns a page of datasets, newest first, and the token of the next page."""
        by_time = {
            f"{each.create_time.ToNanoseconds():020d} {each.dataset_id}": each for each in self._datasets.values()
        }
        chosen, token = page(sorted(by_time, reverse=True), request.page_size, request.page_token)
        return [by_time[key] for key in chosen], token

    # --- uploading ---

    async def receive(self, requests: AsyncIterator[UploadDatasetRequest]) -> tuple[Dataset, bool]:
        """Stores what a client sends; returns the dataset, and whether it was there before.

        Args:
            requests: A header, then chunks.

        Raises:
            UnslothdError: INVALID_FIELD, DATASET_ROW, DATASET_EMPTY, DATASET_DAMAGED, DATASET_TOO_LARGE or DISK_FULL.
                Nothing is kept then, nor when the caller goes away.
        """
        first = await anext(requests, None)
        if first is None or not first.HasField("header"):
            raise InvalidFieldsError([FieldViolation("header", "must be the first message, before any chunk")])
        header = first.header
        known = self._known(header.sha256, header.format)
        if known is not None:
            return known, True
        async with self._slots:
            try:
                incoming = self._store.begin(header.format)
                try:
                    return await self._take_in(header, requests, incoming)
                finally:
                    await asyncio.to_thread(incoming.discard)
            except OSError as error:
                raise explained(error) from error

    def _known(self, sha256: str, data_format: "DataFormat.ValueType") -> Dataset | None:
        """Returns the dataset that has these bytes already, if there is one."""
        known = self._datasets.get(dataset_id_of(sha256))
        if known is not None and known.format != data_format:
            raise DatasetError(
                ErrorReason.ERROR_REASON_DATASET_DAMAGED,
                f"These bytes are stored as {_format_name(known.format)} already, not as {_format_name(data_format)}. "
                "Use that dataset, or delete it before you upload them in another format.",
            )
        return known

    async def _take_in(
        self, header: UploadDatasetHeader, requests: AsyncIterator[UploadDatasetRequest], incoming: IncomingRows
    ) -> tuple[Dataset, bool]:
        check = await self._checker.start(incoming.path, header.format)
        try:
            intake = Intake(incoming, check)
            try:
                await self._read_chunks(requests, intake, check)
                await intake.settle()
            finally:
                await intake.close()
            if header.sha256 and header.sha256 != incoming.sha256:
                raise _other_bytes(header.sha256, incoming.sha256)
            check.end()
            finishing = asyncio.create_task(asyncio.to_thread(incoming.finish))
            try:
                found = await check.verdict()
            finally:
                await finishing
        finally:
            await check.close()
        # From here to the commit nothing waits, so that equal bytes that were sent twice are stored once.
        known = self._known(incoming.sha256, header.format)
        return (known, True) if known is not None else (self._keep(header, incoming, found), False)

    async def _read_chunks(
        self, requests: AsyncIterator[UploadDatasetRequest], intake: Intake, check: RowCheck
    ) -> None:
        received = 0
        async for request in requests:
            if request.HasField("header"):
                raise InvalidFieldsError([FieldViolation("header", "may come once only, as the first message")])
            chunk = request.chunk  # each look at it is a copy
            received += len(chunk)
            if received > self.max_bytes:
                raise self._too_large()
            if check.over:  # the rows that are there are bad already
                await check.verdict()
            await intake.add(chunk)

    def _keep(self, header: UploadDatasetHeader, incoming: IncomingRows, found: RowsFound) -> Dataset:
        dataset = Dataset(
            dataset_id=dataset_id_of(incoming.sha256),
            name=header.name,
            format=header.format,
            num_rows=found.num_rows,
            num_bytes=incoming.num_bytes,
            columns=found.columns,
            create_time=now(),
        )
        self._store.commit(incoming, dataset)
        self._datasets[dataset.dataset_id] = dataset
        return dataset

    def _too_large(self) -> ExhaustedError:
        return ExhaustedError(
            ErrorReason.ERROR_REASON_DATASET_TOO_LARGE,
            f"The dataset has more than {self.max_bytes} bytes, the most that this server stores. Upload fewer rows, "
            "or put the file below a model root of the server and name its path.",
            metadata={"max_bytes": str(self.max_bytes)},
        )

    # --- deleting ---

    async def delete(self, dataset_id: str, users: Sequence[str]) -> None:
        """Removes a dataset.

        Args:
            dataset_id: The dataset.
            users: Trainings that are not over and use it, as of now: between the look and this call nothing may wait,
                and nothing waits before the dataset is gone for others.

        Raises:
            NotFoundError: DATASET_NOT_FOUND.
            PreconditionError: DATASET_IN_USE.
        """
        dataset = self.get(dataset_id)
        if users:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_DATASET_IN_USE,
                f'{len(users)} training(s) that are not over use dataset "{dataset_id}": {users[0]}. Wait for the end, '
                "or cancel them, then delete it.",
            )
        rest = self._store.take_away(dataset)
        del self._datasets[dataset_id]
        await asyncio.to_thread(shutil.rmtree, rest, ignore_errors=True)


def _other_bytes(told: str, real: str) -> DatasetError:
    return DatasetError(
        ErrorReason.ERROR_REASON_DATASET_DAMAGED,
        f"The bytes have the sha256 {real}, but the header says {told}: they were changed on their way, or while they "
        "were read. Nothing was kept; upload them again.",
    )


def _format_name(data_format: "DataFormat.ValueType") -> str:
    return DataFormat.Name(data_format).removeprefix("DATA_FORMAT_").lower()
