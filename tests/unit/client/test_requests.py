"""Python arguments become exactly the fields that the user set."""

import asyncio

import pytest

import unslothd
from unslothd import _requests, errors
from unslothd.v1 import model_pb2, service_pb2, training_pb2

ROWS = [{"text": "hello"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (unslothd.TrainingOptions, training_pb2.TrainingConfig),
        (unslothd.LoraOptions, model_pb2.LoraConfig),
    ],
)
def test_every_field_of_the_contract_is_an_option(options, message):
    assert list(options.__annotations__) == [field.name for field in message.DESCRIPTOR.fields]


def test_every_way_to_load_and_to_generate_is_an_option():
    load = set(service_pb2.LoadModelRequest.DESCRIPTOR.fields_by_name) - {"model_name", "request_id"}
    assert set(unslothd.LoadOptions.__annotations__) == load
    generate = set(service_pb2.GenerateRequest.DESCRIPTOR.fields_by_name) - {"model_id", "prompt", "chat"}
    assert set(unslothd.GenerationOptions.__annotations__) == generate


def test_only_what_is_given_is_sent(server, say):
    server.script.on("PrepareForTraining", say.answer(service_pb2.PrepareForTrainingResponse()))
    with unslothd.Client(server.target) as client:
        client.prepare(model_pb2.Model(model_id="m"), learning_rate=1e-4, lora={"r": 8, "target_modules": ["q_proj"]})
    assert server.script.calls("PrepareForTraining") == [
        service_pb2.PrepareForTrainingRequest(
            model_id="m",
            training_config=training_pb2.TrainingConfig(learning_rate=1e-4),
            lora=model_pb2.LoraConfig(r=8, target_modules=["q_proj"]),
        )
    ]


def test_options_win_over_a_config_message():
    base = training_pb2.TrainingConfig(max_steps=5, seed=1)
    assert _requests.config(base, {"seed": 2}) == training_pb2.TrainingConfig(max_steps=5, seed=2)
    assert base.seed == 1


def test_zero_and_false_are_sent():
    config = _requests.config(None, {"warmup_steps": 0, "packing": False})
    assert config.HasField("warmup_steps")
    assert config.HasField("packing")


def test_enum_values_have_short_names():
    assert _requests.config(None, {"micro_batching": "tuned"}).micro_batching == training_pb2.MICRO_BATCHING_TUNED


def test_a_misspelt_option_is_refused_with_the_nearest_name():
    with pytest.raises(TypeError, match="did you mean learning_rate"):
        _requests.config(None, {"learning_rte": 1e-4})


def test_values_of_the_wrong_type_are_named_all_at_once():
    with pytest.raises(errors.InvalidRequest) as caught:
        _requests.config(None, {"seed": "x", "max_steps": 1.5, "micro_batching": "fast"})
    fields = [each.field for each in caught.value.field_violations]
    assert fields == ["training_config.seed", "training_config.max_steps", "training_config.micro_batching"]
    assert "fixed, tuned" in str(caught.value)


def test_a_str_of_module_names_is_refused():
    with pytest.raises(errors.InvalidRequest, match=r"lora\.target_modules"):
        _requests.prepare("m", None, {"target_modules": "q_proj"}, {})


def test_train_takes_policy_and_labels(server, say):
    server.script.on("Train", say.events(say.succeeded(1)))
    with unslothd.Client(server.target) as client:
        client.train("m", ROWS, ROWS, disconnect_policy="cancel", labels={"experiment": "7"}, row_format="text")
    request = server.script.calls("Train")[0]
    assert request.disconnect_policy == service_pb2.DISCONNECT_POLICY_CANCEL
    assert dict(request.labels) == {"experiment": "7"}
    assert request.eval_dataset == request.train_dataset
    assert request.train_dataset.row_format.HasField("text")
    assert not request.HasField("training_config")


def test_trainings_are_listed_page_by_page(server, say):
    pages = [
        service_pb2.ListTrainingsResponse(trainings=[training_pb2.Training(training_id="b")], next_page_token="2"),
        service_pb2.ListTrainingsResponse(trainings=[training_pb2.Training(training_id="a")]),
    ]
    server.script.on("ListTrainings", *[say.answer(page) for page in pages])
    with unslothd.Client(server.target) as client:
        found = client.list_trainings(model="m", states=["running"], labels={"k": "v"})
    assert [training.training_id for training in found] == ["b", "a"]
    first, second = server.script.calls("ListTrainings")
    assert (first.page_token, second.page_token) == ("", "2")
    assert first.states == second.states == [training_pb2.Training.STATE_RUNNING]
    assert dict(first.labels) == {"k": "v"}


def test_a_limit_ends_the_listing(server, say):
    page = service_pb2.ListTrainingsResponse(
        trainings=[training_pb2.Training(training_id=name) for name in "abc"], next_page_token="2"
    )
    server.script.on("ListTrainings", say.answer(page))
    with unslothd.Client(server.target) as client:
        assert [each.training_id for each in client.list_trainings(limit=2)] == ["a", "b"]
    assert server.script.calls("ListTrainings")[0].page_size == 2


def test_an_unknown_state_is_refused_with_the_known_ones(server):
    with unslothd.Client(server.target) as client, pytest.raises(errors.InvalidRequest, match="succeeded"):
        client.list_trainings(states=["done"])


def test_cancel_takes_a_run_a_message_or_an_id(server, say):
    server.script.on("Train", say.events(1, say.succeeded(2)))
    answer = service_pb2.CancelTrainingResponse(
        training=training_pb2.Training(training_id=say.TRAINING, state=training_pb2.Training.STATE_CANCELLING)
    )
    server.script.on("CancelTraining", *[say.answer(answer)] * 3)
    with unslothd.Client(server.target) as client:
        run = client.train("m", ROWS)
        training = run.cancel()
        client.cancel(training, save_checkpoint=False)
        client.cancel(say.TRAINING)
    requests = server.script.calls("CancelTraining")
    assert {request.training_id for request in requests} == {say.TRAINING}
    assert [request.save_checkpoint for request in requests] == [True, False, True]


def test_generated_text_is_streamed_and_summed_up(server, say):
    parts = [
        service_pb2.GenerateResponse(text="Hel"),
        service_pb2.GenerateResponse(text="lo"),
        service_pb2.GenerateResponse(summary={"completion_tokens": 2, "finish_reason": "stop"}),
    ]
    server.script.on("Generate", say.messages(*parts), say.messages(*parts))
    with unslothd.Client(server.target) as client:
        stream = client.generate("m", "Say hello", max_new_tokens=4, stop=["\n"])
        assert stream.summary is None
        assert list(stream) == ["Hel", "lo"]
        assert stream.summary is not None
        assert stream.summary.finish_reason == "stop"
        assert client.generate("m", [{"role": "user", "content": "hi"}]).text() == "Hello"
    plain, chat = server.script.calls("Generate")
    assert plain == service_pb2.GenerateRequest(model_id="m", prompt="Say hello", max_new_tokens=4, stop=["\n"])
    assert chat.chat.messages[0].content == "hi"


def test_the_target_comes_from_the_environment_when_none_is_given(monkeypatch):
    monkeypatch.setenv("UNSLOTHD_TARGET", "gpu-host:1234")
    assert unslothd.Client().target == "gpu-host:1234"
    assert unslothd.Client("other:1").target == "other:1"
    monkeypatch.delenv("UNSLOTHD_TARGET")
    assert unslothd.Client().target == "127.0.0.1:50051"


def test_every_method_of_the_async_client_returns_what_the_sync_one_does(server, say):
    model = model_pb2.Model(model_id="m")
    training = training_pb2.Training(training_id=say.TRAINING)
    script = server.script
    script.on("GetServerInfo", say.answer(service_pb2.GetServerInfoResponse(server_version="1")))
    script.on("ListModels", say.answer(service_pb2.ListModelsResponse(models=[model])))
    script.on("GetModel", say.answer(service_pb2.GetModelResponse(model=model)))
    script.on("PrepareForTraining", say.answer(service_pb2.PrepareForTrainingResponse(model=model)))
    script.on("Train", say.events(1, say.succeeded(2)))
    script.on("CancelTraining", *[say.answer(service_pb2.CancelTrainingResponse(training=training))] * 2)
    script.on("GetTraining", say.answer(service_pb2.GetTrainingResponse(training=training)))
    script.on("ListTrainings", say.answer(service_pb2.ListTrainingsResponse(trainings=[training])))
    script.on(
        "Generate", say.messages(service_pb2.GenerateResponse(text="Hi"), service_pb2.GenerateResponse(summary={}))
    )
    script.on("UnloadModel", say.answer(service_pb2.UnloadModelResponse(freed_memory_bytes=9)))

    async def main() -> None:
        async with asyncio.timeout(20), unslothd.AsyncClient(server.target) as client:
            assert (await client.server_info()).server_version == "1"
            assert await client.list_models() == [model]
            assert await client.get_model("m") == model
            assert (await client.prepare("m", max_steps=3)).model == model
            async with await client.train("m", ROWS) as run:
                assert (run.training_id, run.last_sequence) == (say.TRAINING, 0)
                assert await run.cancel() == training
                assert (await run.result()).train_loss == 0.5
                assert run.last_sequence == 2
            assert await client.cancel(run) == training
            assert await client.get_training(run) == training
            assert await client.list_trainings() == [training]
            stream = client.generate("m", "Say hi")
            assert await stream.text() == "Hi"
            assert stream.summary is not None
            assert await client.unload_model("m") == 9

    asyncio.run(main())
