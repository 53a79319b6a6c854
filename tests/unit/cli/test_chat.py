"""`unslothd chat`: turns are kept, answers can be stopped, base and adapter can be compared."""

import json
import threading

import grpc
import pytest

from support.terminal import Terminal
from unslothd.v1 import generation_pb2, service_pb2


def answer(say, *pieces: str, then: object = None):
    summary = service_pb2.GenerateResponse(summary=generation_pb2.GenerateSummary(completion_tokens=2))
    end = [] if then else [summary]
    return say.messages(*[service_pb2.GenerateResponse(text=piece) for piece in pieces], *end, then=then)


@pytest.fixture
def model(server, say):
    server.script.on("GetModel", say.answer(service_pb2.GetModelResponse()))
    return server


def turns(server, call: int) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in server.script.calls("Generate")[call].chat.messages]


def test_the_conversation_is_kept_until_it_is_reset(model, say, cli):
    model.script.on("Generate", answer(say, "Hel", "lo"), answer(say, "Fine"), answer(say, "Who?"))
    shown = cli("chat", "m", "--system", "Be short", "--seed", "3", input="Hi\nHow are you?\n\n/reset\nHi\n/quit\n")
    assert shown.exit_code == 0
    assert shown.stdout == "Hello\nFine\nWho?\n"
    assert turns(model, 0) == [("system", "Be short"), ("user", "Hi")]
    assert turns(model, 1) == [*turns(model, 0), ("assistant", "Hello"), ("user", "How are you?")]
    assert turns(model, 2) == turns(model, 0)
    assert [each.seed for each in model.script.calls("Generate")] == [3, 3, 3]


def test_base_and_adapter_are_compared_and_the_adapters_answer_is_gone_on_with(model, say, cli):
    model.script.on("Generate", *[answer(say, text) for text in ("base 1", "adapter 1", "base 2", "adapter 2")])
    shown = cli("chat", "m", "--compare", input="a\nb\n")
    assert shown.stdout == "base:\nbase 1\nadapter:\nadapter 1\nbase:\nbase 2\nadapter:\nadapter 2\n"
    assert [each.without_adapter for each in model.script.calls("Generate")] == [True, False, True, False]
    assert turns(model, 2) == turns(model, 3) == [("user", "a"), ("assistant", "adapter 1"), ("user", "b")]


def test_scripts_get_one_object_an_answer(model, say, cli):
    model.script.on("Generate", answer(say, "Hello"), answer(say, "Hi"))
    shown = cli("chat", "m", "--compare", "--json", input="a\n")
    first, second = [json.loads(line) for line in shown.stdout.splitlines()]
    assert (first["text"], first["without_adapter"]) == ("Hello", True)
    assert (second["text"], second["without_adapter"]) == ("Hi", False)
    assert second["summary"]["completion_tokens"] == 2


def test_an_error_does_not_end_the_conversation(model, say, cli):
    busy = say.refuse(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_BUSY", "a training runs on m")
    model.script.on("Generate", answer(say, "Hello"), busy, answer(say, "Fine"))
    shown = cli("chat", "m", input="Hi\nlost\nHow are you?\n")
    assert shown.exit_code == 0
    assert "a training runs on m" in shown.stderr
    assert turns(model, 2) == [("user", "Hi"), ("assistant", "Hello"), ("user", "How are you?")]


def test_an_unknown_command_is_not_sent(model, cli):
    assert "/help is no command: /reset forgets" in cli("chat", "m", input="/help\n").stderr


def test_a_wrong_model_is_said_before_anything_is_typed(server, say, cli):
    server.script.on("GetModel", say.refuse(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "no model m"))
    shown = cli("chat", "m", input="Hi\n")
    assert shown.exit_code == 1
    assert "no model m" in shown.stderr


def test_ctrl_c_stops_the_answer_and_not_the_program(model, say):
    reached, left = threading.Event(), threading.Event()

    def hold(_request: object, context: grpc.ServicerContext) -> None:
        context.add_callback(left.set)
        reached.set()
        left.wait(20)

    model.script.on("Generate", answer(say, "Once upon", then=hold), answer(say, "The end"))
    with Terminal("chat", "m", "--target", model.target) as terminal:
        terminal.wait_for("> ")
        terminal.enter("Tell me")
        terminal.wait_for("Once upon")
        assert reached.wait(20)  # a call that is cancelled before never comes here
        terminal.interrupt()
        terminal.wait_for("(stopped)")
        assert left.wait(20)
        terminal.wait_for("> ", times=2)
        terminal.interrupt_at_prompt("/quit or Ctrl-D ends", times=2)
        terminal.enter("And then?")
        terminal.wait_for("The end")
        terminal.enter("/quit")
        code, _ = terminal.wait()
    assert code == 0
    assert turns(model, 1) == [("user", "Tell me"), ("assistant", "Once upon"), ("user", "And then?")]
