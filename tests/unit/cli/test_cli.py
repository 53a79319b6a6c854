"""The command line: what it prints for people and for scripts, and its exit codes."""

import json
import signal
import subprocess
import sys
import threading

import grpc
import pytest
from typer.testing import CliRunner

from support.terminal import Terminal, environment
from unslothd.cli import options
from unslothd.cli.app import app
from unslothd.v1 import artifact_pb2, model_pb2, server_info_pb2, service_pb2, training_event_pb2, training_pb2

READY = model_pb2.Model(
    model_id="tiny-unsloth", model_name="tiny", state=model_pb2.Model.STATE_READY, total_params=4194304, dtype="float32"
)


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "hello"}\n')
    return str(file)


def commands() -> dict[tuple[str, ...], object]:
    found = {(each.name,): each for each in app.registered_commands}
    for group in app.registered_groups:
        found |= {(group.name, each.name): each for each in group.typer_instance.registered_commands}
    return found


def test_the_commands_are_these():
    assert sorted(" ".join(path) for path in commands()) == [
        "cancel",
        "chat",
        "datasets delete",
        "datasets get",
        "datasets list",
        "datasets upload",
        "doctor",
        "download",
        "export",
        "generate",
        "info",
        "models list",
        "models load",
        "models prepare",
        "models unload",
        "pause",
        "plan",
        "receipt show",
        "receipt verify",
        "resume",
        "serve",
        "tokens create",
        "tokens list",
        "tokens revoke",
        "top",
        "train",
        "trainings checkpoints",
        "trainings get",
        "trainings list",
        "watch",
    ]


@pytest.mark.parametrize("path", sorted(commands()), ids=" ".join)
def test_each_command_has_an_example_that_begins_with_its_name(path):
    assert f"Example: unslothd {' '.join(path)} " in f"{commands()[path].epilog} "


def test_help_documents_the_exit_codes():
    text = CliRunner().invoke(app, ["--help"]).output
    for word in ("0 done", "1 the call or the training failed", "2 wrong usage", "130"):
        assert word in " ".join(text.split()).replace("│", "")


def test_defaults_are_shown_in_the_help():
    text = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["train", "--help"]).output
    assert "default 2e-4" in text


def test_every_field_of_the_contract_has_an_option():
    config = [field.name for field in training_pb2.TrainingConfig.DESCRIPTOR.fields]
    assert list(options.ConfigOptions.__annotations__) == config
    lora = {"lora_" + name.removeprefix("lora_") for name in model_pb2.LoraConfig.DESCRIPTOR.fields_by_name}
    assert set(options.LoraOptions.__annotations__) == lora
    load = set(service_pb2.LoadModelRequest.DESCRIPTOR.fields_by_name) - {"model_name", "request_id"}
    assert set(options.LoadOptions.__annotations__) == load


def test_info_shows_devices_and_limits(server, say, cli):
    answer = service_pb2.GetServerInfoResponse(
        server_version="0.1.0",
        engine_versions={"torch": "2.14.1"},
        devices=[server_info_pb2.Device(device="cuda:0", name="NVIDIA H100", total_memory_bytes=80 * 2**30)],
        limits=server_info_pb2.ServerLimits(
            max_loaded_models=8, export_formats=[artifact_pb2.EXPORT_FORMAT_ADAPTER, artifact_pb2.EXPORT_FORMAT_GGUF]
        ),
    )
    answer.caller.MergeFrom(
        server_info_pb2.Caller(name="alice", kind=server_info_pb2.Caller.KIND_TOKEN, scope=server_info_pb2.SCOPE_TRAIN)
    )
    server.script.on("GetServerInfo", say.answer(answer), say.answer(answer))
    shown = cli("info")
    assert shown.exit_code == 0
    assert "you are alice (token), scope train" in shown.output
    for text in ("unslothd 0.1.0", "torch 2.14.1", "NVIDIA H100", "80.0 GiB", "8 models", "exports: adapter, gguf"):
        assert text in shown.output
    assert json.loads(cli("info", "--json").stdout)["devices"][0]["total_memory_bytes"] == str(80 * 2**30)


def test_models_are_listed(server, say, cli):
    answer = say.answer(service_pb2.ListModelsResponse(models=[READY]))
    server.script.on("ListModels", answer, answer)
    assert "4 194 304" in cli("models", "list").output
    assert json.loads(cli("models", "list", "--json").stdout)["model_id"] == "tiny-unsloth"


def test_no_model_is_said_with_the_next_step(server, say, cli):
    server.script.on("ListModels", say.answer(service_pb2.ListModelsResponse()))
    assert "unslothd models load NAME" in cli("models", "list").stderr


def test_a_model_is_loaded_with_the_given_options(server, say, cli):
    progress = model_pb2.LoadProgress(phase=model_pb2.LoadProgress.PHASE_LOADING_WEIGHTS)
    messages = [service_pb2.LoadModelResponse(progress=progress), service_pb2.LoadModelResponse(model=READY)]
    server.script.on("LoadModel", say.messages(*messages))
    done = cli("models", "load", "tiny", "--max-seq-length", "64", "--no-load-in-4bit")
    assert done.exit_code == 0
    assert "loading the weights" in done.stderr
    assert done.stdout.startswith("tiny-unsloth: 4 194 304 parameters")
    request = server.script.calls("LoadModel")[0]
    assert (request.model_name, request.max_seq_length, request.load_in_4bit) == ("tiny", 64, False)
    assert request.HasField("load_in_4bit")
    assert not request.HasField("dtype")


def test_a_load_that_waits_for_memory_says_for_how_much(server, say, cli):
    phase = model_pb2.LoadProgress.PHASE_WAITING_FOR_MEMORY
    progress = model_pb2.LoadProgress(phase=phase, done=2 * 2**30, total=6 * 2**30)
    messages = [service_pb2.LoadModelResponse(progress=progress), service_pb2.LoadModelResponse(model=READY)]
    server.script.on("LoadModel", say.messages(*messages))
    done = cli("models", "load", "training:t/checkpoint-40", "--wait-for-memory")
    assert "waiting for memory: 6.0 GiB needed, 2.0 GiB free" in done.stderr
    assert server.script.calls("LoadModel")[0].wait_for_memory


def test_a_model_is_prepared_with_adapter_and_config(server, say, cli):
    server.script.on("PrepareForTraining", say.answer(service_pb2.PrepareForTrainingResponse(model=READY)))
    arguments = ["--lora-r", "8", "--lora-alpha", "16", "--lora-target-modules", "q_proj,v_proj"]
    arguments += ["--lora-layers-to-transform", "0", "--lora-layers-to-transform", "3"]
    arguments += ["--warmup-steps", "0", "--no-packing", "--micro-batching", "tuned"]
    assert cli("models", "prepare", "tiny-unsloth", *arguments).exit_code == 0
    assert server.script.calls("PrepareForTraining") == [
        service_pb2.PrepareForTrainingRequest(
            model_id="tiny-unsloth",
            lora=model_pb2.LoraConfig(
                r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 3]
            ),
            training_config=training_pb2.TrainingConfig(
                warmup_steps=0, packing=False, micro_batching=training_pb2.MICRO_BATCHING_TUNED
            ),
        )
    ]


def test_a_model_is_unloaded(server, say, cli):
    server.script.on("UnloadModel", say.answer(service_pb2.UnloadModelResponse(freed_memory_bytes=3 * 2**30)))
    assert cli("models", "unload", "m", "--force").output == "m is unloaded; 3.0 GiB given back\n"
    assert server.script.calls("UnloadModel")[0].force


def test_train_loads_prepares_and_trains(server, say, cli, rows):
    started = training_event_pb2.TrainingStarted(engine="unsloth 2026.10.9", device="cpu", tensorboard_dir="/out/runs")
    warning = training_event_pb2.TrainingWarning(reason="ROWS_TRUNCATED", message="3 rows were [cut]")
    measuring = training_event_pb2.TrainingPreparing(phase="PHASE_MEASURING_PASSES", done=7)
    begun = [say.event(1, preparing=measuring), say.event(2, started=started)]
    events = [*begun, say.event(3, warning=warning), 4, say.succeeded(5)]
    # Options are checked before the load, with the name of a model that there is not.
    missing = say.refuse(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "no such model")
    prepared = say.answer(service_pb2.PrepareForTrainingResponse(model=READY))
    server.script.on("PrepareForTraining", missing, prepared)
    server.script.on("LoadModel", say.messages(service_pb2.LoadModelResponse(model=READY)))
    server.script.on("Train", say.events(*events))
    arguments = ["--dataset", rows, "--lora-r", "8", "--max-steps", "3", "--label", "experiment=7"]
    done = cli("train", "--model", "tiny", *arguments, "--row-format", "text")
    assert done.exit_code == 0
    for text in (
        "measuring passes: 7 so far",
        "started on cpu with unsloth 2026.10.9",
        "tensorboard --logdir /out/runs",
        "warning ROWS_TRUNCATED: 3 rows were [cut]",
        "step 4/5  loss 0.2500",
        "succeeded: train loss 0.5000",
        "/out/final",
    ):
        assert text in done.stdout
    assert "unslothd generate tiny-unsloth" in done.stderr
    checked, asked = server.script.calls("PrepareForTraining")
    assert checked.model_id != asked.model_id == "tiny-unsloth"
    assert (checked.lora.r, checked.training_config.max_steps, asked.lora.r) == (8, 3, 8)
    request = server.script.calls("Train")[0]
    assert request.model_id == "tiny-unsloth"
    assert request.training_config == training_pb2.TrainingConfig(max_steps=3)
    assert request.train_dataset.inline.data == b'{"text": "hello"}\n'
    assert request.train_dataset.row_format.HasField("text")
    assert dict(request.labels) == {"experiment": "7"}


def test_train_with_json_prints_an_object_for_each_event_and_nothing_else(server, say, cli, rows):
    prepared = model_pb2.Model(model_id="m", state=model_pb2.Model.STATE_PREPARED)
    server.script.on("GetModel", say.answer(service_pb2.GetModelResponse(model=prepared)))
    server.script.on("Train", say.events(1, say.heartbeat(), 2, then=say.lose()))
    server.script.on("WatchTraining", say.events(3, say.succeeded(4)))
    done = cli("train", "--model-id", "m", "--dataset", rows, "--json")
    assert done.exit_code == 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["sequence"] for line in lines] == ["1", "2", "3", "4"]
    assert lines[0]["step"]["loss"] == 1.0
    assert lines[0]["step"]["grad_norm"] == 0.0
    assert lines[-1]["succeeded"]["output_dir"] == "/out/final"
    assert server.script.calls("PrepareForTraining") == []


def test_a_failed_training_exits_with_1_and_its_reason(server, say, cli, rows):
    prepared = model_pb2.Model(model_id="m", state=model_pb2.Model.STATE_PREPARED)
    status = say.status(grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "the device ran out of memory")
    failed = say.event(2, failed=training_event_pb2.TrainingFailed(error=status))
    server.script.on("GetModel", *[say.answer(service_pb2.GetModelResponse(model=prepared))] * 2)
    server.script.on("Train", say.events(1, failed), say.events(1, failed))
    shown = cli("train", "--model-id", "m", "--dataset", rows)
    assert shown.exit_code == 1
    assert "failed: the device ran out of memory" in shown.stdout
    assert "OUT_OF_MEMORY" in shown.stderr
    scripted = cli("train", "--model-id", "m", "--dataset", rows, "--json")
    assert scripted.exit_code == 1
    assert json.loads(scripted.stderr)["error"]["reason"] == "OUT_OF_MEMORY"


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize("refused", ["PrepareForTraining", "Train"])
def test_a_refusal_after_a_load_says_how_to_take_the_model_that_is_loaded_now(server, say, cli, rows, command, refused):
    refusal = say.refuse(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "no", learning_rate="too large")
    server.script.on("LoadModel", say.messages(service_pb2.LoadModelResponse(model=READY)))
    if refused == "Train":
        server.script.on("PrepareForTraining", say.answer(service_pb2.PrepareForTrainingResponse(model=READY)))
        refused = "Train" if command == "train" else "PlanTraining"
    server.script.on(refused, refusal)
    done = cli(command, "--model", "tiny", "--dataset", rows)
    assert done.exit_code == 1
    assert "--model-id tiny-unsloth" in done.stderr
    assert "INVALID_FIELD" in done.stderr


@pytest.mark.parametrize("command", ["train", "plan"])
def test_options_that_the_server_refuses_load_no_model(server, say, cli, rows, command):
    refusal = say.refuse(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "no", learning_rate="too large")
    server.script.on("PrepareForTraining", refusal)
    done = cli(command, "--model", "tiny", "--dataset", rows, "--learning-rate", "7", "--lora-r", "8")
    assert done.exit_code == 1
    assert "INVALID_FIELD" in done.stderr
    (asked,) = server.script.calls("PrepareForTraining")
    assert (asked.training_config.learning_rate, asked.lora.r) == (7, 8)
    assert server.script.calls("LoadModel") == []


def test_a_refusal_of_a_model_that_was_named_by_its_id_says_nothing_of_a_load(server, say, cli, rows):
    server.script.on("GetModel", say.refuse(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "no such model"))
    done = cli("train", "--model-id", "m", "--dataset", rows)
    assert done.exit_code == 1
    assert "stays loaded" not in done.stderr


def test_a_watch_of_a_cancelled_training_exits_with_1(server, say, cli):
    cancelled = training_event_pb2.TrainingCancelled(step=2, output_dir="/out/final")
    server.script.on("WatchTraining", say.events(6, say.event(7, cancelled=cancelled)))
    done = cli("watch", say.TRAINING, "--after", "5")
    assert done.exit_code == 1
    assert "cancelled after step 2" in done.stdout
    assert server.script.calls("WatchTraining")[0].after_sequence == 5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--dataset", "ROWS"], "--model-id ID"),
        (["--dataset", "ROWS", "--model", "a", "--model-id", "b"], "--model-id ID"),
        (["--dataset", "ROWS", "--model-id", "b", "--dtype", "float32"], "--dtype"),
        (["--dataset", "nowhere.jsonl", "--model-id", "b"], "server:nowhere.jsonl"),
        (["--dataset", "ROWS", "--model-id", "b", "--label", "x"], "KEY=VALUE"),
        (["--dataset", "ROWS", "--model-id", "b", "--max-steps", "many"], "'--max-steps'"),
        (["--model-id", "b"], "--dataset"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_right(cli, rows, arguments, text):
    done = cli("train", *[rows if each == "ROWS" else each for each in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert text in done.stderr


@pytest.mark.parametrize(
    ("argument", "field", "value"),
    [
        ("server:/data/rows.jsonl", "path", "/data/rows.jsonl"),
        ("hub:yahma/alpaca-cleaned", "hub", {"name": "yahma/alpaca-cleaned"}),
        ("hub:squad:train[:1%]", "hub", {"name": "squad", "split": "train[:1%]"}),
        ("sha256:" + "0" * 64, "dataset_id", "sha256:" + "0" * 64),
    ],
)
def test_datasets_of_the_server_and_the_hub_have_prefixes(server, say, cli, argument, field, value):
    prepared = model_pb2.Model(model_id="m", state=model_pb2.Model.STATE_PREPARED)
    server.script.on("GetModel", say.answer(service_pb2.GetModelResponse(model=prepared)))
    server.script.on("Train", say.events(say.succeeded(1)))
    assert cli("train", "--model-id", "m", "--dataset", argument).exit_code == 0
    source = server.script.calls("Train")[0].train_dataset
    assert source == type(source)(**{field: value})


def test_an_error_is_printed_with_code_reason_and_every_field(server, say, cli):
    refusal = say.refuse(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "two", seed="too large", optim="unknown")
    server.script.on("PrepareForTraining", refusal, refusal)
    shown = cli("models", "prepare", "m")
    assert shown.exit_code == 1
    for text in ("INVALID_ARGUMENT INVALID_FIELD", "seed: too large", "optim: unknown"):
        assert text in shown.stderr
    error = json.loads(cli("models", "prepare", "m", "--json").stderr)["error"]
    assert error["field_violations"][1] == {"field": "optim", "description": "unknown"}


def test_trainings_are_listed_shown_and_cancelled(server, say, cli):
    training = training_pb2.Training(
        training_id=say.TRAINING, model_id="m", state=training_pb2.Training.STATE_RUNNING, step=3, total_steps=10
    )
    server.script.on("ListTrainings", say.answer(service_pb2.ListTrainingsResponse(trainings=[training])))
    server.script.on("GetTraining", say.answer(service_pb2.GetTrainingResponse(training=training)))
    server.script.on("CancelTraining", say.answer(service_pb2.CancelTrainingResponse(training=training)))
    listed = cli("trainings", "list", "--state", "running", "--label", "a=b", env={"COLUMNS": "160"})
    assert "3/10" in listed.output
    assert server.script.calls("ListTrainings")[0].states == [training_pb2.Training.STATE_RUNNING]
    assert "3 of 10" in cli("trainings", "get", say.TRAINING).output
    assert cli("cancel", say.TRAINING, "--no-checkpoint").output == f"{say.TRAINING} is running\n"
    assert not server.script.calls("CancelTraining")[0].save_checkpoint


def test_text_is_generated_from_stdin_and_chat_turns(server, say, cli):
    parts = [service_pb2.GenerateResponse(text="Hel"), service_pb2.GenerateResponse(text="lo")]
    summary = service_pb2.GenerateResponse(summary={"completion_tokens": 2})
    server.script.on("Generate", say.messages(*parts, summary), say.messages(*parts, summary))
    assert cli("generate", "m", "-", "--temperature", "0", input="Say hello").stdout == "Hello\n"
    as_json = cli("generate", "m", "hi", "--system", "be brief", "--json").stdout
    assert json.loads(as_json)["text"] == "Hello"
    assert json.loads(as_json)["summary"]["completion_tokens"] == 2
    plain, chat = server.script.calls("Generate")
    assert plain == service_pb2.GenerateRequest(model_id="m", prompt="Say hello", temperature=0.0)
    assert [turn.role for turn in chat.chat.messages] == ["system", "user"]


def test_serve_hands_every_argument_to_the_server(monkeypatch):
    seen: list[list[str]] = []

    class Server:
        @staticmethod
        def run(argv: list[str]) -> int:
            seen.append(argv)
            return 3

    monkeypatch.setitem(sys.modules, "unslothd_server.__main__", Server)
    arguments = ["--listen", "127.0.0.1:0", "--model-root", "/a", "--model-root", "/b", "--help", "-v"]
    assert CliRunner().invoke(app, ["serve", *arguments]).exit_code == 3
    assert seen == [arguments]


def test_serve_without_the_server_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "unslothd_server.__main__", None)
    done = CliRunner().invoke(app, ["serve"])
    assert done.exit_code == 1
    assert "pip install 'unslothd[server]'" in done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_cli_extra_the_command_says_what_to_install(missing):
    program = f"import sys; sys.modules['{missing}'] = None; from unslothd.cli import main; main(['info'])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment(), check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"The command line needs {missing}, which is not installed: pip install 'unslothd[cli]'\n"


def test_completion_names_the_commands():
    asked = {"_UNSLOTHD_COMPLETE": "complete_bash", "COMP_WORDS": "unslothd tra", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "unslothd.cli"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment(), **asked},
        check=False,
    )
    assert {"train", "trainings"} <= set(done.stdout.split())


def test_a_terminal_gets_a_live_bar_with_the_figures_and_the_course_of_the_loss(server, say):
    started = training_event_pb2.TrainingStarted(plan=training_pb2.TrainingPlan(total_steps=5), device="cpu")
    server.script.on("WatchTraining", say.events(say.event(1, started=started), 2, 3, 4, 5, say.succeeded(6)))
    code, shown = Terminal("watch", say.TRAINING, "--target", server.target).wait()
    assert code == 0
    for text in ("5/5", "0.2000", "tok/s", "memory", "ETA", "█▄▂▁", "succeeded"):
        assert text in shown
    assert "step 5/5  loss" not in shown
    assert shown.rindex("succeeded") > shown.rindex("5/5")


def test_ctrl_c_detaches_and_says_how_to_watch_pause_and_cancel(server, say):
    reading, left = threading.Event(), threading.Event()

    def hold(_request: object, context: grpc.ServicerContext) -> None:
        context.add_callback(left.set)
        reading.set()
        left.wait(20)

    server.script.on("WatchTraining", say.events(1, 2, then=hold))
    command = subprocess.Popen(
        [sys.executable, "-m", "unslothd.cli", "watch", say.TRAINING, "--json", "--target", server.target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert reading.wait(20)
        assert command.stdout is not None
        assert [json.loads(command.stdout.readline())["sequence"] for _ in range(2)] == ["1", "2"]
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=20)
    finally:
        command.kill()
    assert command.returncode == 130
    assert f"unslothd watch {say.TRAINING} --after 2" in said
    assert f"unslothd pause {say.TRAINING}" in said
    assert f"unslothd cancel {say.TRAINING}" in said
    assert left.wait(20)
    assert server.script.calls("CancelTraining") == []
