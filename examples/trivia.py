"""The rows of the examples: trivia questions with short answers, from the package chatterbot-corpus."""

import importlib.util
import random
from pathlib import Path
from typing import Any

import yaml

# Asked before and after the training, and never trained on.
QUESTIONS = (
    "What gas makes soda bubbly?",
    "What is the largest planet in our solar system?",
    "Canberra is the capital city of which country?",
    "What does a seismologist study?",
)
HELD_OUT = 48
_SEED = 0

Row = dict[str, Any]


def package_folder(package: str) -> Path:
    """Returns where an installed package lies, without importing it.

    Raises:
        SystemExit: It is not installed; the text says what to do.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {package} is not installed here. Run `make setup`, then `make demo`.")
    return Path(spec.origin).parent


def questions_and_answers() -> dict[str, str]:
    """Returns every trivia question with its answer; the first one where a question comes twice."""
    file = package_folder("chatterbot_corpus") / "data" / "english" / "trivia.yml"
    conversations = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
    pairs: dict[str, str] = {}
    for conversation in conversations:
        if isinstance(conversation, list) and len(conversation) == 2:  # one line of the file lacks its dashes
            question, answer = (" ".join(str(text).split()) for text in conversation)
            pairs.setdefault(question, answer)
    return pairs


def rows() -> tuple[list[Row], list[Row]]:
    """Returns rows to train on and rows held out for the eval loss, always the same ones, none in both."""
    pairs = questions_and_answers()
    others = sorted(set(pairs) - set(QUESTIONS))
    random.Random(_SEED).shuffle(others)
    held_out = [*QUESTIONS, *others[: HELD_OUT - len(QUESTIONS)]]
    trained_on = others[HELD_OUT - len(QUESTIONS) :]
    return _as_chat(trained_on, pairs), _as_chat(held_out, pairs)


def _as_chat(questions: list[str], answers: dict[str, str]) -> list[Row]:
    return [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answers[question]},
            ]
        }
        for question in questions
    ]
