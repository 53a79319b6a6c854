"""Models over gRPC: load, look, prepare, unload; and what goes wrong."""

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import pytest

from support.calls import CALL_SECONDS, error_of, load, prepare, prepared_model
from support.running_server import RunningServer, a_model
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.model_pb2 import LoadProgress, LoraConfig, Model
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import TrainingConfig


def unload(stub: UnslothServiceStub, model_id: str) -> int:
    return stub.UnloadModel(pb.UnloadModelRequest(model_id=model_id), timeout=CALL_SECONDS).freed_memory_bytes


def model_ids(stub: UnslothServiceStub) -> list[str]:
    return [model.model_id for model in stub.ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS).models]


def test_a_load_shows_its_phases_and_ends_with_the_model(stub: UnslothServiceStub):
    responses = list(stub.LoadModel(pb.LoadModelRequest(model_name="tiny"), timeout=CALL_SECONDS))
    phases = [phase for phase, _ in groupby(response.progress.phase for response in responses[:-1])]
    assert phases == [LoadProgress.PHASE_STARTING_WORKER, LoadProgress.PHASE_LOADING_WEIGHTS]
    model = responses[-1].model
    assert (model.model_id, model.model_name, model.state) == ("tiny-unsloth", "tiny", Model.STATE_READY)
    assert all(response.progress.model_id == model.model_id for response in responses[:-1])
    unload(stub, model.model_id)


def test_a_second_load_of_the_same_name_gets_a_number(stub: UnslothServiceStub):
    first, second = load(stub, "tiny"), load(stub, "tiny")
    assert (first.model_id, second.model_id) == ("tiny-unsloth", "tiny-unsloth-2")
    assert model_ids(stub) == ["tiny-unsloth", "tiny-unsloth-2"]
    unload(stub, first.model_id)
    unload(stub, second.model_id)
    assert model_ids(stub) == []


def test_twenty_retries_with_one_request_id_load_one_model(stub: UnslothServiceStub):
    with ThreadPoolExecutor(20) as pool:
        models = list(pool.map(lambda _: load(stub, "tiny", request_id="the-same"), range(20)))
    assert {model.model_id for model in models} == {"tiny-unsloth"}
    assert model_ids(stub) == ["tiny-unsloth"]
    error = error_of(lambda: stub.LoadModel(pb.LoadModelRequest(model_name="other", request_id="the-same")))
    assert (error.code, error.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    unload(stub, "tiny-unsloth")


def test_a_load_goes_on_when_its_caller_hangs_up(server: RunningServer, stub: UnslothServiceStub):
    gate = server.home / "gate"
    a_model(server, "gated", load_gate=str(gate))
    call = stub.LoadModel(pb.LoadModelRequest(model_name="gated", request_id="hang-up"), timeout=CALL_SECONDS)
    next(call)
    call.cancel()
    gate.touch()
    assert load(stub, "gated", request_id="hang-up").model_id == "gated-unsloth"
    unload(stub, "gated-unsloth")


def test_unloading_a_model_that_is_loading_ends_its_load_and_leaves_nothing(
    server: RunningServer, stub: UnslothServiceStub
):
    a_model(server, "endless", load_gate=str(server.home / "never"))
    call = stub.LoadModel(pb.LoadModelRequest(model_name="endless"), timeout=CALL_SECONDS)
    while next(call).progress.phase != LoadProgress.PHASE_LOADING_WEIGHTS:
        pass
    unload(stub, "endless-unsloth")
    error = error_of(lambda: call)
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "MODEL_NOT_READY")
    assert "unloaded" in error.message
    assert model_ids(stub) == []
    assert not list((server.home / "workers").glob("*"))


def test_unloading_a_model_whose_worker_only_starts_leaves_nothing(server: RunningServer, stub: UnslothServiceStub):
    call = stub.LoadModel(pb.LoadModelRequest(model_name="tiny"), timeout=CALL_SECONDS)
    next(call)
    unload(stub, "tiny-unsloth")
    error = error_of(lambda: call)
    assert error.reason == "MODEL_NOT_READY"
    assert model_ids(stub) == []
    assert not list((server.home / "workers").glob("*"))


def test_prepare_returns_the_completed_config(stub: UnslothServiceStub):
    model = load(stub, "tiny")
    request = pb.PrepareForTrainingRequest(
        model_id=model.model_id, training_config=TrainingConfig(learning_rate=1e-3), lora=LoraConfig(r=8)
    )
    response = stub.PrepareForTraining(request, timeout=CALL_SECONDS)
    assert (response.training_config.learning_rate, response.training_config.batch_size) == (1e-3, 2)
    assert response.model.state == Model.STATE_PREPARED
    assert response.lora.r == 8
    assert response.model.trainable_params > 0
    unload(stub, model.model_id)


def test_unload_ends_the_worker_and_says_what_came_back(server: RunningServer, stub: UnslothServiceStub):
    model = load(stub, "tiny")
    assert unload(stub, model.model_id) > 0
    assert not list((server.home / "workers").glob("*"))
    error = error_of(lambda: stub.GetModel(pb.GetModelRequest(model_id=model.model_id)))
    assert (error.code, error.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")


def test_a_worker_that_dies_while_loading_is_a_typed_error_and_leaves_nothing(
    server: RunningServer, stub: UnslothServiceStub
):
    a_model(server, "killed", load="SIGKILL")
    error = error_of(lambda: stub.LoadModel(pb.LoadModelRequest(model_name="killed"), timeout=CALL_SECONDS))
    assert (error.code, error.reason, error.metadata["signal"]) == ("ABORTED", "WORKER_DIED", "SIGKILL")
    assert model_ids(stub) == []
    assert not list((server.home / "workers").glob("*"))


def test_a_worker_that_exits_while_preparing_leaves_a_failed_model_that_can_be_unloaded(
    server: RunningServer, stub: UnslothServiceStub
):
    a_model(server, "exits", prepare="exit:7")
    model = load(stub, "exits")
    error = error_of(lambda: prepare(stub, model.model_id))
    assert (error.code, error.reason, error.metadata["exit_code"]) == ("ABORTED", "WORKER_DIED", "7")
    shown = stub.GetModel(pb.GetModelRequest(model_id=model.model_id), timeout=CALL_SECONDS).model
    assert shown.state == Model.STATE_FAILED
    again = error_of(lambda: prepare(stub, model.model_id))
    assert (again.code, again.reason) == ("ABORTED", "WORKER_DIED")
    unload(stub, model.model_id)
    assert model_ids(stub) == []


@pytest.mark.parametrize("bug", ["raise", "sys.exit"])
def test_an_unexpected_exception_in_a_worker_shows_an_id_and_nothing_internal(
    bug: str, server: RunningServer, stub: UnslothServiceStub
):
    a_model(server, f"bug-{bug}", load=bug)
    error = error_of(lambda: stub.LoadModel(pb.LoadModelRequest(model_name=f"bug-{bug}"), timeout=CALL_SECONDS))
    assert (error.code, error.reason) == ("INTERNAL", "INTERNAL")
    assert error.metadata["error_id"] in error.message
    assert "Traceback" not in error.message


def test_a_model_that_does_not_exist_is_not_found(stub: UnslothServiceStub):
    error = error_of(lambda: stub.LoadModel(pb.LoadModelRequest(model_name="./nothing-here")))
    assert (error.code, error.reason) == ("NOT_FOUND", "MODEL_SOURCE_NOT_FOUND")


def test_a_load_that_does_not_fit_is_refused_with_needed_and_free_bytes(
    server: RunningServer, stub: UnslothServiceStub
):
    folder = a_model(server, "huge")
    header = json.dumps({"w": {"dtype": "BF16", "shape": [10**6, 10**7], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    error = error_of(lambda: stub.LoadModel(pb.LoadModelRequest(model_name="huge", dtype="bfloat16")))
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "INSUFFICIENT_MEMORY")
    assert int(error.metadata["needed_bytes"]) > 2 * 10**13 > int(error.metadata["free_bytes"]) > 0
    assert model_ids(stub) == []


def test_every_wrong_field_of_a_load_is_told_at_once(stub: UnslothServiceStub):
    request = pb.LoadModelRequest(model_name="tiny", max_seq_length=1, dtype="int3", device_map="moon")
    error = error_of(lambda: stub.LoadModel(request))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert error.fields == ["max_seq_length", "device_map", "dtype"]


def test_a_device_that_is_not_here_names_those_that_are(stub: UnslothServiceStub):
    error = error_of(lambda: stub.LoadModel(pb.LoadModelRequest(model_name="tiny", device_map="cuda:15")))
    assert (error.code, error.fields) == ("INVALID_ARGUMENT", ["device_map"])
    assert "there is " in error.message


def test_preparing_an_unknown_model_names_the_loaded_ones(stub: UnslothServiceStub):
    with prepared_model(stub, "tiny"):
        error = error_of(lambda: prepare(stub, "nobody"))
    assert (error.code, error.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert "tiny-unsloth" in error.message


def test_wrong_options_are_told_before_the_model_is_looked_for(stub: UnslothServiceStub):
    # `unslothd train --model` asks so before it loads the model.
    config = TrainingConfig(learning_rate=-1, max_steps=1, num_train_epochs=1)
    request = pb.PrepareForTrainingRequest(model_id="nobody", training_config=config, lora=LoraConfig(r=-8))
    error = error_of(lambda: stub.PrepareForTraining(request, timeout=CALL_SECONDS))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert sorted(error.fields) == ["lora.r", "training_config", "training_config.learning_rate"]


def test_the_path_of_a_secret_is_refused(stub: UnslothServiceStub):
    error = error_of(lambda: stub.LoadModel(pb.LoadModelRequest(model_name="/etc/shadow")))
    assert (error.code, error.reason) == ("PERMISSION_DENIED", "PATH_NOT_ALLOWED")


def test_an_adapter_on_a_converted_gguf_file_is_loaded(server: RunningServer, stub: UnslothServiceStub):
    folder = server.output_root / "on-a-gguf" / "final"
    folder.mkdir(parents=True)
    base = server.home / "cache" / "gguf-0123"
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    model = load(stub, str(folder))
    assert model.state == Model.STATE_READY
    unload(stub, model.model_id)
