"""Tables on a narrow terminal: what people copy stays whole."""

import io

import pytest
from rich.console import Console
from rich.table import Table

import unslothd
from unslothd.cli import models, trainings


def shown(table: Table) -> str:
    file = io.StringIO()
    Console(width=80, file=file).print(table)
    return file.getvalue()


@pytest.mark.parametrize("model_id", ["tiny-unsloth", "smollm2-135m-instruct.q4_1-unsloth"])
def test_the_id_of_a_model_can_be_copied_from_80_columns(model_id: str):
    model = unslothd.Model(model_id=model_id, model_name="a/rather-long-name-of-a-model", dtype="bfloat16")
    assert model_id in shown(models._table([model]))


def test_the_id_of_a_training_can_be_copied_from_80_columns():
    training = unslothd.Training(training_id="training-20261124-071834-1d69c4", model_id="a-model-with-a-long-name")
    assert training.training_id in shown(trainings._table([training]))
