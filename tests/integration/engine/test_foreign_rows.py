"""Rows that nobody here wrote, in four layouts: what is learnt of them, and that they train."""

from collections.abc import Callable

import pytest

from support.engine_runs import Loaded, LoadTiny, Row
from support.foreign_rows import conversations, questions
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.engine.layouts import resolve_layout
from unslothd_server.engine.rendering import RowRenderer

END = "<|im_end|>"


def chats() -> list[tuple[Row, str]]:
    """A row and what has to be learnt of it."""
    found: list[tuple[Row, str]] = []
    for language, topic in [("english", "conversations"), ("hindi", "greetings"), ("chinese", "trivia")]:
        for said in conversations(language, topic)[:20]:
            turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
            found.append(({"messages": turns}, "".join(text + END for text in said[1::2])))
    return found


def alpaca() -> list[tuple[Row, str]]:
    puzzles = ["leg_counting", "family_relationships", "word_sorting"]
    pairs = [pair for puzzle in puzzles for pair in questions(puzzle, 10)]
    return [({"instruction": question, "output": answer}, answer + END) for question, answer in pairs]


def prompt_completion() -> list[tuple[Row, str]]:
    pairs = [pair for puzzle in ("chain_sum", "propositional_logic") for pair in questions(puzzle, 10)]
    return [({"prompt": question + "\n", "completion": answer}, answer + END) for question, answer in pairs]


def texts() -> list[tuple[Row, str]]:
    said = ["\n".join(turns) for turns in conversations("french", "conversations")[:20]]
    return [({"text": text}, text + END) for text in said]


@pytest.mark.parametrize("rows_and_answers", [chats, alpaca, prompt_completion, texts])
def test_rows_of_others_are_learnt_as_they_should_be_and_train(
    load: LoadTiny, rows_and_answers: Callable[[], list[tuple[Row, str]]]
) -> None:
    loaded: Loaded = load(max_seq_length=512)
    loaded.prepare()
    found = rows_and_answers()
    rows = [row for row, _ in found]
    renderer = RowRenderer(loaded.tokenizer, resolve_layout(None, list(rows[0]), field="train_dataset"), 2048)
    for [seen], (row, answer) in zip(renderer.render(list(enumerate(rows, start=1))), found, strict=True):
        learnt = loaded.tokenizer.decode(seen.input_ids[seen.carries_loss])
        first = loaded.tokenizer.decode(seen.input_ids[:1])
        assert (first + learnt if "text" in row else learnt) == answer
    run = loaded.train(rows, TrainingConfig(max_steps=2, warmup_steps=0))
    assert run.plan.num_rows + run.plan.dropped_rows == len(rows)
    assert len(run.losses) == 2
    assert all(loss > 0 for loss in run.losses)
