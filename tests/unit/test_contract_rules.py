"""The rules that the contract carries: they fit the libraries that train, and they say everything at once."""

import ast
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import protovalidate
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

import unslothd.v1
from unslothd._vendor.buf.validate import validate_pb2
from unslothd.v1 import dataset_pb2, service_pb2, training_pb2


def all_messages() -> list[type[Message]]:
    """Every message of the public contract, nested ones too."""

    def with_nested(descriptor: Descriptor) -> list[Descriptor]:
        return [descriptor, *(inner for nested in descriptor.nested_types for inner in with_nested(nested))]

    modules = [
        importlib.import_module(f"unslothd.v1.{found.name}")
        for found in pkgutil.iter_modules(unslothd.v1.__path__)
        if found.name.endswith("_pb2")
    ]
    tops = [top for module in modules for top in module.DESCRIPTOR.message_types_by_name.values()]
    return [GetMessageClass(found) for top in tops for found in with_nested(top)]


def allowed(field: str) -> list[str]:
    options = training_pb2.TrainingConfig.DESCRIPTOR.fields_by_name[field].GetOptions()
    return list(getattr(options.Extensions[validate_pb2.field].string, "in"))


def enum_values(module: str, name: str) -> set[str]:
    """Values of a string enum of transformers, read from its source: to import it would load torch."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).with_name(f"{module}.py").read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return {
        str(node.value.value)
        for node in found.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }


def path(violation: protovalidate.Violation) -> str:
    field = violation.proto.field
    return ".".join(element.field_name for element in field.elements) if field else "the message"


def fields(request: Message) -> dict[str, str]:
    """Violations of a request: the path of each field, or "the message" → the rule."""
    return {path(violation): violation.proto.rule_id for violation in protovalidate.collect_violations(request)}


def test_every_allowed_optimizer_is_one_that_transformers_knows() -> None:
    names = allowed("optim")
    assert "adamw_8bit" in names
    assert set(names) <= enum_values("training_args", "OptimizerNames")


def test_every_allowed_scheduler_is_one_that_transformers_knows() -> None:
    names = allowed("lr_scheduler_type")
    assert "cosine" in names
    assert set(names) <= enum_values("trainer_utils", "SchedulerType")


@pytest.mark.parametrize("message", all_messages(), ids=lambda message: message.DESCRIPTOR.full_name)
def test_the_rules_of_a_message_can_be_checked(message: type[Message]) -> None:
    # A rule that does not fit its field's type, or that is no CEL, fails when it is first compiled.
    assert isinstance(protovalidate.collect_violations(message()), list)


@pytest.mark.parametrize(
    "request_",
    [
        service_pb2.GetServerInfoRequest(),
        service_pb2.LoadModelRequest(model_name="unsloth/Llama-3.2-1B"),
        service_pb2.PrepareForTrainingRequest(model_id="m"),
        service_pb2.TrainRequest(model_id="m", train_dataset={"path": "rows.jsonl"}),
        service_pb2.WatchTrainingRequest(training_id="t"),
        service_pb2.CancelTrainingRequest(training_id="t"),
        service_pb2.UnloadModelRequest(model_id="m"),
        service_pb2.ListTrainingsRequest(),
    ],
    ids=lambda request: type(request).__name__,
)
def test_a_request_with_nothing_but_what_it_must_name_is_valid(request_: Message) -> None:
    assert fields(request_) == {}


def test_a_config_of_every_documented_default_is_valid() -> None:
    config = training_pb2.TrainingConfig(
        learning_rate=2e-4,
        batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=10,
        max_steps=100,
        output_dir="unsloth_finetuned_model",
        fp16=False,
        bf16=True,
        logging_steps=1,
        save_steps=100,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        seed=42,
        use_gradient_checkpointing=True,
        packing=False,
        max_grad_norm=1,
    )
    assert fields(config) == {}


def test_all_violations_of_a_request_are_reported_at_once() -> None:
    request = service_pb2.TrainRequest(
        train_dataset=dataset_pb2.DatasetSource(limit=-1),
        training_config=training_pb2.TrainingConfig(
            learning_rate=0, batch_size=0, optim="adamw9", lr_scheduler_type="sawtooth", seed=-1
        ),
        request_id="x" * 129,
    )
    assert fields(request) == {
        "model_id": "string.min_len",
        "train_dataset.origin": "required",
        "train_dataset.limit": "int64.gte",
        "training_config.learning_rate": "double.gt_lte",
        "training_config.batch_size": "int32.gte_lte",
        "training_config.optim": "string.in",
        "training_config.lr_scheduler_type": "string.in",
        "training_config.seed": "int64.gte_lte",
        "request_id": "string.max_len",
    }


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"max_steps": 1, "num_train_epochs": 1}, "training_config.steps_or_epochs"),
        ({"fp16": True, "bf16": True}, "training_config.fp16_or_bf16"),
        ({"output_dir": "a/../b"}, "training_config.output_dir"),
        ({"output_dir": "/abs"}, "training_config.output_dir"),
        ({"output_dir": ".hidden"}, "training_config.output_dir"),
        ({"learning_rate": float("nan")}, "double.gt_lte"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_itself_or_leaves_its_folder_is_refused(config: dict[str, object], rule: str) -> None:
    assert list(fields(training_pb2.TrainingConfig(**config)).values()) == [rule]


@pytest.mark.parametrize("config", [{"fp16": False, "bf16": True}, {"output_dir": "a/b-1.2_c"}], ids=str)
def test_a_config_that_only_looks_like_it_is_accepted(config: dict[str, object]) -> None:
    assert fields(training_pb2.TrainingConfig(**config)) == {}
