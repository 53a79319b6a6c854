"""Names what is exported or downloaded: a loaded model, an artifact, a training's result or one of its checkpoints."""

import re
from typing import Literal, TypeAlias, cast

from unslothd import _requests, errors
from unslothd._flows import connection_lost, ended_early
from unslothd._operations import CloseStream, Emit, Flow, Next, OpenStream, Sleep
from unslothd._requests import ModelLike, TrainingLike
from unslothd._retry import Retry
from unslothd.v1 import artifact_pb2, model_pb2, service_pb2

ExportFormatName: TypeAlias = Literal["adapter", "merged_16bit", "merged_4bit", "gguf"]
CheckpointLike: TypeAlias = tuple[TrainingLike, int]
ExportSource: TypeAlias = ModelLike | TrainingLike | CheckpointLike
DownloadSource: TypeAlias = artifact_pb2.Artifact | TrainingLike | CheckpointLike

# Ids of models and artifacts never look like this one.
_TRAINING_ID = re.compile(r"training-\d{8}-\d{6}-[0-9a-z]{6}")


def checkpoint(source: "DownloadSource | ExportSource") -> artifact_pb2.TrainingCheckpoint | None:
    """Returns the checkpoint (step 0 = the final adapter) that is meant, or None for a model or an artifact."""
    if isinstance(source, tuple):
        training, step = source
        return artifact_pb2.TrainingCheckpoint(training_id=_requests.training_id(training), step=step)
    if isinstance(source, str) and not _TRAINING_ID.fullmatch(source):
        return None
    if isinstance(source, model_pb2.Model | artifact_pb2.Artifact):
        return None
    return artifact_pb2.TrainingCheckpoint(training_id=_requests.training_id(source))


def export_request(
    source: ExportSource, format: ExportFormatName, gguf_quantization: str, output_dir: str
) -> service_pb2.ExportModelRequest:
    """Returns the request for ExportModel.

    Raises:
        InvalidRequest: An unknown format.
    """
    request = service_pb2.ExportModelRequest(gguf_quantization=gguf_quantization, output_dir=output_dir)
    _requests.filled(request, "", {"format": format})
    if (found := checkpoint(source)) is not None:
        request.checkpoint.CopyFrom(found)
    else:
        request.model_id = _requests.model_id(cast(ModelLike, source))
    return request


def download_request(source: DownloadSource) -> service_pb2.DownloadArtifactRequest:
    """Returns the request for all files of a source."""
    if (found := checkpoint(source)) is not None:
        return service_pb2.DownloadArtifactRequest(checkpoint=found)
    artifact = cast(artifact_pb2.Artifact | str, source)
    artifact_id = artifact if isinstance(artifact, str) else artifact.artifact_id
    return service_pb2.DownloadArtifactRequest(artifact_id=artifact_id)


def export(
    request: service_pb2.ExportModelRequest, retry: Retry
) -> Flow[artifact_pb2.ExportProgress, artifact_pb2.Artifact]:
    """Emits the progress of an export and returns the artifact.

    After a lost connection the same request attaches to the export while it runs. One that has ended meanwhile is
    begun again, or refused because its own output_dir is taken.
    """
    was_lost = False
    while True:
        yield OpenStream("ExportModel", request)
        try:
            while (message := (yield Next())) is not None:
                retry.progress()
                if message.HasField("artifact"):
                    yield CloseStream()
                    return message.artifact
                yield Emit(message.progress)
            lost = ended_early("ExportModel")
        except errors.AlreadyExists as error:
            raise _maybe_its_own(error) if was_lost else error from None
        except errors.UnslothdError as error:
            if not connection_lost(error):
                raise
            lost = error
        was_lost = True
        yield Sleep(retry.next_delay(lost))


def _maybe_its_own(error: errors.AlreadyExists) -> errors.AlreadyExists:
    return errors.AlreadyExists(
        f"{error.message} It may be this very export, which ended while the connection was lost.",
        code=error.code,
        reason=error.reason,
        metadata=error.metadata,
    )
