"""Plans, pauses, resumes and exports: what is sent, and what comes of the answers, in both clients."""

import asyncio

import grpc
import pytest

import unslothd
from unslothd import errors
from unslothd.v1 import artifact_pb2, model_pb2, service_pb2, training_event_pb2, training_pb2

ROWS = [{"text": "hello"}]
PAUSED = training_pb2.Training.STATE_PAUSED
ARTIFACT = artifact_pb2.Artifact(artifact_id="a1", path="/out/export", format=artifact_pb2.EXPORT_FORMAT_GGUF)


def a_training(state: int, last_sequence: int) -> training_pb2.Training:
    return training_pb2.Training(training_id="t", state=state, last_sequence=last_sequence)


def test_a_plan_takes_what_train_takes(server, say):
    plan = training_pb2.TrainingPlan(num_rows=7)
    server.script.on("PlanTraining", say.answer(service_pb2.PlanTrainingResponse(plan=plan)))
    with unslothd.Client(server.target) as client:
        found = client.plan("m", ROWS, ROWS, measure=True, preview_rows=5, row_format="text", max_steps=3)
    assert found == plan
    request = server.script.calls("PlanTraining")[0]
    assert (request.model_id, request.measure, request.preview_rows) == ("m", True, 5)
    assert request.training_config == training_pb2.TrainingConfig(max_steps=3)
    assert request.train_dataset.inline.data == request.eval_dataset.inline.data == b'{"text": "hello"}\n'
    assert request.train_dataset.row_format.HasField("text")


def test_a_resumed_training_is_followed_from_the_event_after_its_resume(server, say):
    server.script.on("GetTraining", say.answer(service_pb2.GetTrainingResponse(training=a_training(PAUSED, 6))))
    server.script.on("ResumeTraining", say.answer(service_pb2.ResumeTrainingResponse()))
    server.script.on("WatchTraining", say.events(7, then=say.lose()), say.events(8, say.succeeded(9)))
    with unslothd.Client(server.target) as client:
        run = client.resume(say.TRAINING, checkpoint_step=4)
        assert (run.training_id, run.last_sequence) == (say.TRAINING, 6)
        assert [event.sequence for event in run] == [7, 8, 9]
        assert run.result().train_loss == 0.5
    assert server.script.calls("ResumeTraining") == [
        service_pb2.ResumeTrainingRequest(training_id=say.TRAINING, checkpoint_step=4)
    ]


def test_a_resumed_training_that_fails_again_raises_after_its_last_event(server, say):
    failed = say.event(7, failed=training_event_pb2.TrainingFailed(error=say.status(grpc.StatusCode.ABORTED, "X", "x")))
    server.script.on("GetTraining", say.answer(service_pb2.GetTrainingResponse(training=a_training(PAUSED, 6))))
    server.script.on("ResumeTraining", say.answer(service_pb2.ResumeTrainingResponse()))
    server.script.on("WatchTraining", say.events(failed))
    with unslothd.Client(server.target) as client, pytest.raises(errors.TrainingFailed):
        list(client.resume(say.TRAINING))


def test_a_resume_that_is_refused_is_raised_by_resume_itself(server, say):
    server.script.on("GetTraining", say.answer(service_pb2.GetTrainingResponse(training=a_training(PAUSED, 6))))
    server.script.on("ResumeTraining", say.refuse(grpc.StatusCode.NOT_FOUND, "CHECKPOINT_NOT_FOUND", "no step 4"))
    with unslothd.Client(server.target) as client, pytest.raises(errors.NotFound, match="no step 4"):
        client.resume(say.TRAINING, checkpoint_step=4)


def test_a_run_that_is_paused_waits_until_it_is_resumed(server, say):
    paused = say.event(2, state_changed=training_event_pb2.TrainingStateChanged(state=PAUSED))
    server.script.on("Train", say.events(1, paused, say.heartbeat(), say.heartbeat(), 3, say.succeeded(4)))
    server.script.on("PauseTraining", say.answer(service_pb2.PauseTrainingResponse(training=a_training(PAUSED, 2))))
    with unslothd.Client(server.target) as client:
        run = client.train("m", ROWS)
        assert run.pause().state == PAUSED
        assert [event.sequence for event in run] == [1, 2, 3, 4]


def test_the_async_client_pauses_resumes_plans_and_exports(server, say):
    server.script.on("GetTraining", say.answer(service_pb2.GetTrainingResponse(training=a_training(PAUSED, 1))))
    server.script.on("ResumeTraining", say.answer(service_pb2.ResumeTrainingResponse()))
    server.script.on("WatchTraining", say.events(2, say.succeeded(3)))
    server.script.on("PauseTraining", say.answer(service_pb2.PauseTrainingResponse(training=a_training(PAUSED, 2))))
    server.script.on("PlanTraining", say.answer(service_pb2.PlanTrainingResponse()))
    server.script.on("ExportModel", say.messages(service_pb2.ExportModelResponse(artifact=ARTIFACT)))

    async def main() -> None:
        async with asyncio.timeout(20), unslothd.AsyncClient(server.target) as client:
            assert (await client.plan("m", ROWS)).num_rows == 0
            run = await client.resume(say.TRAINING)
            assert (await run.pause()).state == PAUSED
            assert [event.sequence async for event in run] == [2, 3]
            assert await client.export(run, "adapter") == ARTIFACT

    asyncio.run(main())


def checkpoint(training_id: str, step: int = 0) -> dict[str, artifact_pb2.TrainingCheckpoint]:
    return {"checkpoint": artifact_pb2.TrainingCheckpoint(training_id=training_id, step=step)}


@pytest.mark.parametrize(
    ("source", "sent"),
    [
        ("tiny-unsloth", {"model_id": "tiny-unsloth"}),
        (model_pb2.Model(model_id="tiny-unsloth"), {"model_id": "tiny-unsloth"}),
        ("training-20261124-120000-abcdef-unsloth", {"model_id": "training-20261124-120000-abcdef-unsloth"}),
        ("training-20261124-120000-abcdef", checkpoint("training-20261124-120000-abcdef")),
        (training_pb2.Training(training_id="t"), checkpoint("t")),
        (("t", 40), checkpoint("t", 40)),
        ((training_pb2.Training(training_id="t"), 0), checkpoint("t")),
    ],
    ids=["model id", "model", "id of a model made from a training", "training id", "training", "step", "final"],
)
def test_an_export_names_its_source(server, say, source, sent):
    server.script.on("ExportModel", say.messages(service_pb2.ExportModelResponse(artifact=ARTIFACT)))
    with unslothd.Client(server.target) as client:
        assert client.export(source, "gguf", gguf_quantization="q4_k_m", output_dir="out") == ARTIFACT
    assert server.script.calls("ExportModel") == [
        service_pb2.ExportModelRequest(
            format=artifact_pb2.EXPORT_FORMAT_GGUF, gguf_quantization="q4_k_m", output_dir="out", **sent
        )
    ]


def test_the_progress_of_an_export_is_told(server, say):
    progress = artifact_pb2.ExportProgress(phase="merging", done=1, total=2)
    messages = [service_pb2.ExportModelResponse(progress=progress), service_pb2.ExportModelResponse(artifact=ARTIFACT)]
    server.script.on("ExportModel", say.messages(*messages))
    seen: list[unslothd.ExportProgress] = []
    with unslothd.Client(server.target) as client:
        client.export("m", "merged_16bit", on_progress=seen.append)
    assert seen == [progress]


def test_an_export_that_is_cut_off_is_attached_to_again(server, say):
    progress = service_pb2.ExportModelResponse(progress=artifact_pb2.ExportProgress(phase="merging"))
    done = service_pb2.ExportModelResponse(artifact=ARTIFACT)
    server.script.on("ExportModel", say.messages(progress, then=say.lose()), say.messages(progress, done))
    with unslothd.Client(server.target) as client:
        assert client.export("m", "adapter", output_dir="out") == ARTIFACT
    first, second = server.script.calls("ExportModel")
    assert first == second


def test_an_export_whose_folder_is_taken_after_a_loss_may_be_done(server, say):
    taken = say.refuse(grpc.StatusCode.ALREADY_EXISTS, "OUTPUT_DIR_TAKEN", "out is taken.")
    server.script.on("ExportModel", taken, say.messages(then=say.lose()), taken)
    with unslothd.Client(server.target) as client:
        with pytest.raises(errors.AlreadyExists, match=r"out is taken\.$"):
            client.export("m", "adapter", output_dir="out")
        with pytest.raises(errors.AlreadyExists, match="this very export") as caught:
            client.export("m", "adapter", output_dir="out")
    assert caught.value.reason == "OUTPUT_DIR_TAKEN"


def test_an_unknown_form_of_export_is_refused_with_those_that_there_are(server):
    with unslothd.Client(server.target) as client, pytest.raises(errors.InvalidRequest, match="merged_16bit"):
        client.export("m", "safetensors")
    assert server.script.requests == []
