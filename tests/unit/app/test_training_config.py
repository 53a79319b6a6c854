"""How defaults, the prepared config and an override become one config."""

from unslothd.v1.model_pb2 import Model
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.app.training_config import completed, merged, set_fields

CPU = Model(device="cpu", dtype="float32")
GPU = Model(device="cuda:0", dtype="bfloat16")


def test_an_empty_config_gets_every_documented_default():
    config = completed(TrainingConfig(), CPU)
    assert config.learning_rate == 2e-4
    assert (config.batch_size, config.gradient_accumulation_steps) == (2, 4)
    assert (config.warmup_steps, config.max_steps) == (10, 100)
    assert config.output_dir == "unsloth_finetuned_model"
    assert (config.logging_steps, config.save_steps) == (1, 100)
    assert (config.optim, config.weight_decay, config.lr_scheduler_type) == ("adamw_8bit", 0.01, "cosine")
    assert (config.seed, config.use_gradient_checkpointing, config.max_grad_norm) == (42, True, 1.0)


def test_only_the_rival_of_steps_and_epochs_stays_unset():
    for given in (TrainingConfig(), TrainingConfig(num_train_epochs=2)):
        config = completed(given, CPU)
        unset = [field.name for field in TrainingConfig.DESCRIPTOR.fields if not config.HasField(field.name)]
        assert unset == (["max_steps"] if given.HasField("num_train_epochs") else ["num_train_epochs"])


def test_mixed_precision_follows_the_device():
    assert (completed(TrainingConfig(), GPU).bf16, completed(TrainingConfig(), GPU).fp16) == (True, False)
    assert (completed(TrainingConfig(), CPU).bf16, completed(TrainingConfig(), CPU).fp16) == (False, False)


def test_asking_for_fp16_turns_the_default_bf16_off():
    config = completed(TrainingConfig(fp16=True), GPU)
    assert (config.bf16, config.fp16) == (False, True)


def test_an_override_replaces_field_by_field_and_keeps_the_rest():
    result = merged(TrainingConfig(learning_rate=1e-3, max_steps=5), TrainingConfig(learning_rate=1e-4))
    assert (result.learning_rate, result.max_steps) == (1e-4, 5)


def test_an_override_of_zero_counts_as_set():
    assert merged(TrainingConfig(warmup_steps=10), TrainingConfig(warmup_steps=0)).warmup_steps == 0


def test_overriding_steps_drops_the_prepared_epochs_and_the_other_way_round():
    assert set_fields(merged(TrainingConfig(num_train_epochs=3), TrainingConfig(max_steps=7))) == ["max_steps"]
    assert set_fields(merged(TrainingConfig(max_steps=7), TrainingConfig(num_train_epochs=3))) == ["num_train_epochs"]


def test_overriding_bf16_with_true_drops_the_prepared_fp16():
    result = merged(TrainingConfig(fp16=True), TrainingConfig(bf16=True))
    assert (result.HasField("fp16"), result.bf16) == (False, True)


def test_overriding_bf16_with_false_keeps_the_prepared_fp16():
    assert merged(TrainingConfig(fp16=True), TrainingConfig(bf16=False)).fp16
