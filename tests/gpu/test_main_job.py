"""The main job on a real GPU: load in 4-bit, prepare, train, save, unload; what is reported is what is there."""

import json
import random
import statistics
from pathlib import Path

import pynvml
import pytest

from support.calls import load, prepare, train
from support.random_llama import PARAMETERS
from support.running_server import RunningServer
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import TrainingConfig

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

STEPS = 20
MAX_SEQ_LENGTH = 1024
MIB = 1024 * 1024
# Other processes of the driver come and go by a little.
SETTLED_BYTES = 64 * MIB


def device_bytes() -> int:
    """Memory in use on the first GPU, by whatever process."""
    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


def write_rows(file: Path, count: int, words: int) -> None:
    drawn = random.Random(0)
    vocabulary = ["fox", "dog", "sea", "old", "man", "story", "language", "number", "answer", "question"]
    lines = [json.dumps({"text": " ".join(drawn.choices(vocabulary, k=words))}) for _ in range(count)]
    file.write_text("\n".join(lines))


@pytest.mark.whole_gpu
def test_a_1b_llama_in_4_bit_trains_20_steps_and_gives_all_memory_back(server: RunningServer, stub: UnslothServiceStub):
    write_rows(server.model_root / "rows.jsonl", count=8 * STEPS, words=2 * MAX_SEQ_LENGTH)
    before = device_bytes()

    model = load(stub, "llama-3.2-1b", max_seq_length=MAX_SEQ_LENGTH)
    loaded = device_bytes()
    assert (model.load_in_4bit, model.dtype, model.device) == (True, "bfloat16", "cuda:0")
    assert model.total_params == PARAMETERS["llama-3.2-1b"]
    # 4-bit linear weights and 16-bit embeddings: far less than the 2.5 GB of 16-bit weights.
    assert model.memory_bytes < 2_200 * MIB

    model = prepare(stub, model.model_id, TrainingConfig(max_steps=STEPS, warmup_steps=2, batch_size=2))
    assert model.trainable_params == 11_272_192  # r=16 on seven projections of this shape

    events = list(train(stub, model.model_id, DatasetSource(path="rows.jsonl")))
    trained = device_bytes()
    config = next(event for event in events if event.HasField("started")).started.plan.config
    assert (config.optim, config.bf16, config.fp16, config.use_gradient_checkpointing) == (
        "adamw_8bit",
        True,
        False,
        True,
    )
    steps = [event.step for event in events if event.HasField("step")]
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    assert steps[-1].loss < steps[0].loss
    assert steps[-1].tokens == 8 * STEPS * MAX_SEQ_LENGTH
    assert Path(events[-1].succeeded.output_dir, "adapter_model.safetensors").stat().st_size > MIB

    freed = stub.UnloadModel(pb.UnloadModelRequest(model_id=model.model_id)).freed_memory_bytes
    after = device_bytes()
    assert abs(after - before) < SETTLED_BYTES
    assert abs(freed - (trained - after)) < SETTLED_BYTES

    settled = [step.step_seconds for step in steps[5:]]
    device = stub.GetServerInfo(pb.GetServerInfoRequest()).devices[0]
    figures = {
        "device": device.name,
        "engine": dict(stub.GetServerInfo(pb.GetServerInfoRequest()).engine_versions),
        "device_mib": {
            "before": before // MIB,
            "loaded": loaded // MIB,
            "trained": trained // MIB,
            "after_unload": after // MIB,
        },
        "peak_mib": events[-1].succeeded.metrics.peak_memory_bytes // MIB,
        "freed_mib": freed // MIB,
        "step_seconds_median": round(statistics.median(settled), 4),
        "tokens_per_second_median": round(8 * MAX_SEQ_LENGTH / statistics.median(settled)),
        "loss_first_last": [round(steps[0].loss, 4), round(steps[-1].loss, 4)],
        "utilization_last": steps[-1].gpu_utilization,
    }
    print(json.dumps(figures, indent=1))


def test_two_models_share_one_gpu_and_one_keeps_training_when_the_other_goes(
    server: RunningServer, stub: UnslothServiceStub
):
    write_rows(server.model_root / "few.jsonl", count=40, words=200)
    first = load(stub, "llama-3.2-1b", max_seq_length=256)
    second = load(stub, "llama-3.2-1b", max_seq_length=256, load_in_4bit=False)
    assert (second.load_in_4bit, second.dtype) == (False, "bfloat16")
    for model in (first, second):
        prepare(stub, model.model_id, TrainingConfig(max_steps=5, warmup_steps=1))
    running = train(stub, first.model_id, DatasetSource(path="few.jsonl"))
    next(running)
    stub.UnloadModel(pb.UnloadModelRequest(model_id=second.model_id))
    assert list(running)[-1].HasField("succeeded")
    stub.UnloadModel(pb.UnloadModelRequest(model_id=first.model_id))
