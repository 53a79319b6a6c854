"""Text from the model, and that asking it leaves nothing behind."""

import threading
from pathlib import Path
from typing import Any

import pytest

from support import engine_runs
from support.engine_runs import Loaded, Row
from support.tiny_model import build_tiny_llama
from unslothd.v1.generation_pb2 import ChatMessage, ChatMessages, GenerateSummary
from unslothd.v1.model_pb2 import LoraConfig
from unslothd.v1.service_pb2 import GenerateRequest
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.errors import InvalidFieldsError

SENTENCE = "Good morning. Thank you very much."


@pytest.fixture(scope="module")
def parrot(versions: dict[str, str], tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model that has learnt one sentence by heart."""
    loaded = engine_runs.load(tiny, tmp_path_factory.mktemp("parrot"))
    loaded.prepare(LoraConfig(r=32, modules_to_save=["lm_head"]))
    turns = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    config = TrainingConfig(
        max_steps=80, warmup_steps=5, learning_rate=2e-2, batch_size=2, gradient_accumulation_steps=1
    )
    run = loaded.train([{"text": SENTENCE}, {"text": turns + SENTENCE}], config, name="by-heart")
    assert run.losses[-1] < 0.3
    return loaded


def ask(loaded: Loaded, **request: Any) -> tuple[str, GenerateSummary]:
    parts = list(loaded.engine.generate(GenerateRequest(model_id="m", **request), threading.Event()))
    summary = parts.pop()
    assert isinstance(summary, GenerateSummary)
    assert all(isinstance(part, str) and part for part in parts)
    return "".join(str(part) for part in parts), summary


def test_a_prompt_is_gone_on_with_until_the_end_token(parrot: Loaded) -> None:
    text, summary = ask(parrot, prompt="Good morning")
    assert text == ". Thank you very much."
    assert summary.finish_reason == "stop"
    assert summary.prompt_tokens == len(parrot.tokenizer("Good morning")["input_ids"])
    assert summary.completion_tokens == len(parrot.tokenizer(text)["input_ids"]) + 1
    assert summary.tokens_per_second > 0


def test_a_chat_is_answered_by_the_template(parrot: Loaded) -> None:
    chat = ChatMessages(messages=[ChatMessage(role="user", content="Hello")])
    assert ask(parrot, chat=chat)[0] == SENTENCE


def test_it_ends_at_the_number_of_tokens_and_at_the_sequence_length(parrot: Loaded) -> None:
    _, summary = ask(parrot, prompt="Good morning", max_new_tokens=2)
    assert (summary.completion_tokens, summary.finish_reason) == (2, "length")
    long = "0 1 2 3 4 5 6 7 8 9 " * 6
    room = 128 - len(parrot.tokenizer(long)["input_ids"])
    _, summary = ask(parrot, prompt=long, without_adapter=True, max_new_tokens=500)
    assert (summary.completion_tokens, summary.finish_reason) == (room, "length")


def test_stop_texts_end_it_and_are_not_sent(parrot: Loaded) -> None:
    text, summary = ask(parrot, prompt="Good morning", stop=["very", "never"])
    assert text == ". Thank you "
    assert summary.finish_reason == "stop"


def test_without_the_adapter_the_base_model_answers_and_the_adapter_stays(parrot: Loaded) -> None:
    with_adapter = ask(parrot, prompt="Good morning", max_new_tokens=8)[0]
    assert ask(parrot, prompt="Good morning", max_new_tokens=8, without_adapter=True)[0] != with_adapter
    assert ask(parrot, prompt="Good morning", max_new_tokens=8)[0] == with_adapter


def test_sampling_follows_its_seed(prepared: Loaded) -> None:
    def sample(**options: Any) -> str:
        return ask(prepared, prompt="Good", temperature=2.0, max_new_tokens=12, **options)[0]

    assert sample(seed=5) == sample(seed=5)
    assert sample(seed=5) != sample(seed=6)
    # So small a share leaves the likeliest token alone.
    assert sample(seed=5, top_p=1e-6) == ask(prepared, prompt="Good", max_new_tokens=12)[0]


def test_a_cancelled_generation_ends_without_a_summary(prepared: Loaded) -> None:
    cancelled = threading.Event()
    request = GenerateRequest(model_id="m", prompt="Good", max_new_tokens=100, temperature=1.0, seed=1)
    stream = prepared.engine.generate(request, cancelled)
    assert isinstance(next(stream), str)
    cancelled.set()
    rest = list(stream)
    assert len(rest) < 90
    assert all(isinstance(part, str) for part in rest)


def test_a_caller_that_walks_away_ends_it(prepared: Loaded) -> None:
    threads = threading.active_count()
    stream = prepared.engine.generate(
        GenerateRequest(model_id="m", prompt="Good", max_new_tokens=100, temperature=1.0, seed=1), threading.Event()
    )
    next(stream)
    stream.close()
    assert threading.active_count() <= threads


def test_a_prompt_that_does_not_fit_is_a_wrong_field(prepared: Loaded) -> None:
    with pytest.raises(InvalidFieldsError) as raised:
        ask(prepared, prompt="0 1 2 3 " * 100)
    assert raised.value.violations[0].field == "prompt"


def test_a_chat_without_a_template_is_a_wrong_field(load: Any, tmp_path: Any) -> None:
    loaded = load(build_tiny_llama(tmp_path / "base", chat_template=None))
    with pytest.raises(InvalidFieldsError) as raised:
        ask(loaded, chat=ChatMessages(messages=[ChatMessage(role="user", content="Hello")]))
    assert raised.value.violations[0].field == "chat"


def test_asking_between_two_trainings_changes_nothing(load: Any, texts: list[Row]) -> None:
    config = TrainingConfig(max_steps=2, warmup_steps=0, learning_rate=5e-3)
    silent, asked = load(), load()
    for loaded in (silent, asked):
        loaded.prepare(checkpointing=True)
        loaded.train(texts, config, name="first")
    before = asked.prepare().trainable_params
    ask(asked, prompt="Good", temperature=1.0, max_new_tokens=5)
    ask(asked, prompt="Good", without_adapter=True, max_new_tokens=5)
    assert asked.prepare().trainable_params == before
    runs = [loaded.train(texts, config, name="second") for loaded in (silent, asked)]
    assert runs[0].losses == runs[1].losses
    assert runs[1].plan.config.use_gradient_checkpointing
