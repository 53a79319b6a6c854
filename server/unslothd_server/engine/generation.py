"""Text from the loaded model: streamed as it is made, stopped by texts, limits or the caller."""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from unslothd.v1.generation_pb2 import GenerateSummary
from unslothd.v1.service_pb2 import GenerateRequest
from unslothd_server.engine.devices import compute_device
from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.engine.oom import exhausted
from unslothd_server.engine.text_stream import StopTexts, TokenText
from unslothd_server.errors import FieldViolation, InvalidFieldsError

DEFAULT_MAX_NEW_TOKENS = 256


def generate(
    loaded: LoadedModel, request: GenerateRequest, cancelled: threading.Event
) -> Iterator[str | GenerateSummary]:
    """Yields text as it comes and the summary as the last item.

    Args:
        loaded: The model; its weights, gradients and random state are left as they are.
        request: Prompt or chat, and how to go on.
        cancelled: Ends the generation at the next token; then there is no summary.

    Raises:
        InvalidFieldsError: The prompt does not fit, or chat without a chat template.
        ExhaustedError: OUT_OF_MEMORY.
    """
    prompt_ids = _encode(loaded.tokenizer, request)
    room = loaded.max_seq_length - len(prompt_ids)
    if room < 1:
        raise InvalidFieldsError(
            [
                FieldViolation(
                    str(request.WhichOneof("input")),
                    f"it has {len(prompt_ids)} tokens and leaves no room within max_seq_length "
                    f"{loaded.max_seq_length}; shorten it, or load the model with a larger max_seq_length",
                )
            ]
        )
    asked = request.max_new_tokens if request.HasField("max_new_tokens") else DEFAULT_MAX_NEW_TOKENS
    run = _Generation(loaded, request, prompt_ids, min(asked, room), cancelled)
    yield from run.stream()


def _encode(tokenizer: Any, request: GenerateRequest) -> list[int]:
    if request.WhichOneof("input") == "prompt":
        return list(tokenizer(request.prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise InvalidFieldsError(
            [FieldViolation("chat", "this model's tokenizer has no chat template; send the text as prompt")]
        )
    turns = [{"role": turn.role, "content": turn.content} for turn in request.chat.messages]
    try:
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    except Exception as error:
        raise InvalidFieldsError(
            [FieldViolation("chat.messages", f"the model's chat template refuses these turns: {error}")]
        ) from error
    return list(encoded["input_ids"])


class _Generation:
    """Runs Transformers' generate on a thread of its own, because it pushes tokens and we are asked to yield them."""

    def __init__(
        self,
        loaded: LoadedModel,
        request: GenerateRequest,
        prompt_ids: list[int],
        max_new_tokens: int,
        cancelled: threading.Event,
    ) -> None:
        self._loaded = loaded
        self._request = request
        self._prompt_ids = prompt_ids
        self._max_new_tokens = max_new_tokens
        self._cancelled = cancelled
        self._end = threading.Event()
        self._tokens: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._seconds = 0.0

    def stream(self) -> Iterator[str | GenerateSummary]:
        thread = threading.Thread(target=self._run, name="generate", daemon=True)
        thread.start()
        try:
            yield from self._texts()
        finally:
            # Also when the caller walks away in the middle.
            self._end.set()
            thread.join()

    def _texts(self) -> Iterator[str | GenerateSummary]:
        text, stops = TokenText(self._loaded.tokenizer), StopTexts(self._request.stop)
        ends = set(self._end_ids())
        count, reason = 0, "length"
        while (token := self._tokens.get()) is not None:
            if isinstance(token, BaseException):
                known = exhausted(token, "ask for fewer max_new_tokens or send a shorter prompt")
                raise known if known is not None else token
            count += 1
            if token in ends:
                reason = "stop"
                break
            piece = stops.pass_on(text.add(token))
            if piece:
                yield piece
            if stops.found:
                reason = "stop"
                break
        self._end.set()
        if self._cancelled.is_set():
            return
        rest = stops.pass_on(text.rest()) + stops.rest()
        if rest:
            yield rest
        yield GenerateSummary(
            prompt_tokens=len(self._prompt_ids),
            completion_tokens=count,
            finish_reason="stop" if stops.found else reason,
            tokens_per_second=count / max(time.perf_counter() - self._started, 1e-9),
        )

    def _run(self) -> None:
        self._started = time.perf_counter()
        try:
            self._generate()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self._tokens.put(error)
        finally:
            self._tokens.put(None)

    def _generate(self) -> None:
        import torch
        from transformers import StoppingCriteriaList
        from unsloth import FastLanguageModel

        model, request = self._loaded.model, self._request
        FastLanguageModel.for_inference(model)
        base_only = request.without_adapter and hasattr(model, "disable_adapter")
        ids = torch.tensor([self._prompt_ids], device=compute_device(model))
        with torch.random.fork_rng(), torch.no_grad(), model.disable_adapter() if base_only else nullcontext():
            if request.HasField("seed"):
                torch.manual_seed(request.seed)
            else:
                torch.seed()
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._max_new_tokens,
                eos_token_id=self._end_ids() or None,
                pad_token_id=self._loaded.tokenizer.pad_token_id,
                streamer=_QueueStreamer(self._tokens),
                stopping_criteria=StoppingCriteriaList([self._should_end]),
                use_cache=True,
                **self._sampling(),
            )

    def _should_end(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        end = self._end.is_set() or self._cancelled.is_set()
        return torch.full((input_ids.shape[0],), end, device=input_ids.device, dtype=torch.bool)

    def _sampling(self) -> dict[str, Any]:
        request = self._request
        if not request.temperature:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        top_p = request.top_p if request.HasField("top_p") else 1.0
        return {"do_sample": True, "temperature": request.temperature, "top_p": top_p, "top_k": 0}

    def _end_ids(self) -> list[int]:
        """Every token that ends a text: the model's, which may be several, and the tokenizer's."""
        configured = self._loaded.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        return list(dict.fromkeys(token for token in [*ids, self._loaded.tokenizer.eos_token_id] if token is not None))


class _QueueStreamer:
    """What generate calls for each new token; its first call carries the prompt."""

    def __init__(self, tokens: "queue.SimpleQueue[Any]") -> None:
        self._tokens = tokens
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self._tokens.put(int(token))

    def end(self) -> None:
        """The thread's end says it."""
