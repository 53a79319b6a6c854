"""A CUDA context that breaks in the middle of a training: another worker goes on, and nothing is lost or doubled."""

import json
from pathlib import Path

import pytest

from doubles import cuda_fault_server
from support.calls import load, prepare, train
from support.gpu_models import RandomModels
from support.running_server import RunningServer
from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.training_pb2 import TrainingConfig

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

STEPS = 6
CONFIG = TrainingConfig(max_steps=STEPS, save_steps=2, warmup_steps=0, batch_size=2, gradient_accumulation_steps=2)


def test_a_training_survives_a_broken_cuda_context(tmp_path: Path, random_models: RandomModels):
    random_models.made()
    arguments = ("--model-root", str(random_models.root))
    with RunningServer(tmp_path, program=Path(cuda_fault_server.__file__), arguments=arguments) as server:
        rows = [json.dumps({"text": f"{number} is a number. " * 40}) for number in range(4 * STEPS)]
        (server.model_root / "rows.jsonl").write_text("\n".join(rows))
        stub = server.stub()
        model = prepare(stub, load(stub, "llama-3.2-1b", load_in_4bit=False, max_seq_length=512).model_id, CONFIG)

        events = list(train(stub, model.model_id, DatasetSource(path="rows.jsonl")))

    recoveries = [event.recovery for event in events if event.HasField("recovery")]
    print(recoveries, [(event.step.step, event.step.loss) for event in events if event.HasField("step")])
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert len(recoveries) == 1
    assert "CUDA error" in recoveries[0].cause.message
    assert recoveries[0].resume_step == 2
    # Step 3 was done before the fault and after the last checkpoint, so it is done again, to the same loss.
    steps = [event.step for event in events if event.HasField("step")]
    assert [step.step for step in steps] == [1, 2, 3, 3, 4, 5, 6]
    assert steps[3].loss == pytest.approx(steps[2].loss, rel=1e-3)
    assert events[-1].HasField("succeeded")
