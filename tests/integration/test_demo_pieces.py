"""The pure parts of the demo: its rows, and that it is judged by questions it did not learn."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def trivia() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trivia", EXAMPLES / "trivia.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def questions(rows: list) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


def test_no_question_is_both_trained_on_and_held_out(trivia: ModuleType):
    train_rows, eval_rows = trivia.rows()
    assert set(questions(train_rows)).isdisjoint(questions(eval_rows))
    together = questions(train_rows) + questions(eval_rows)
    assert sorted(together) == sorted(trivia.questions_and_answers())


def test_the_questions_that_are_asked_are_held_out(trivia: ModuleType):
    _, eval_rows = trivia.rows()
    assert set(trivia.QUESTIONS) <= set(questions(eval_rows))
    assert len(eval_rows) == trivia.HELD_OUT


def test_a_row_is_a_chat_of_a_question_and_its_answer(trivia: ModuleType):
    train_rows, eval_rows = trivia.rows()
    answers = trivia.questions_and_answers()
    for row in train_rows + eval_rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert assistant["content"] == answers[user["content"]] != ""


def test_the_rows_are_the_same_every_time(trivia: ModuleType):
    assert trivia.rows() == trivia.rows()


def test_a_missing_package_is_said_with_the_next_step(trivia: ModuleType):
    with pytest.raises(SystemExit, match="make setup"):
        trivia.package_folder("a_package_that_is_not_there")
