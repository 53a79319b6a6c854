"""The adapter of the Python client: commands as JSON lines on stdin, outcomes as JSON lines on stdout (README.md)."""

import json
import queue
import sys
import threading
import time
from typing import Any

from google.protobuf.json_format import MessageToDict, Parse
from google.protobuf.message import Message

import unslothd
from unslothd.v1 import service_pb2


class Adapter:
    """One client, and the calls that a command can name."""

    def __init__(self, options: dict[str, Any]) -> None:
        if "client_cert" in options:
            options["client_certificate"] = options.pop("client_cert")
        self.client = unslothd.Client(options.pop("target"), **options)
        self.open: Any = None
        self.stopped = False

    def carry_out(self, command: dict[str, Any]) -> None:
        """Makes the call and says its outcome; "stopped" when a stop came in between."""
        try:
            result = getattr(self, command.pop("call"))(**command)
        except unslothd.UnslothdError as error:
            say({"error": error_of(error)})
        else:
            say({"stopped": True} if self.stopped else {"result": plain(result)})

    def stop(self) -> None:
        """Ends the open stream, as a user that loses interest."""
        self.stopped = True
        if self.open is not None:
            self.open.close()

    def server_info(self) -> Message:
        return self.client.server_info()

    def load_model(self, request: dict[str, Any]) -> Message:
        message = parsed(request, service_pb2.LoadModelRequest())
        options: Any = given(message, "model_name", "request_id")
        return self.client.load_model(
            message.model_name, request_id=message.request_id or None, on_progress=progress, **options
        )

    def get_model(self, model_id: str) -> Message:
        return self.client.get_model(model_id)

    def prepare(self, request: dict[str, Any]) -> Message:
        message = parsed(request, service_pb2.PrepareForTrainingRequest())
        lora = message.lora if message.HasField("lora") else None
        return self.client.prepare(message.model_id, lora=lora, training_config=message.training_config)

    def unload_model(self, model_id: str, force: bool = False) -> dict[str, Any]:
        return {"freed": self.client.unload_model(model_id, force=force)}

    def plan(self, request: dict[str, Any]) -> Message:
        message = parsed(request, service_pb2.PlanTrainingRequest())
        return self.client.plan(message.model_id, message.train_dataset, training_config=message.training_config)

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        message = parsed(request, service_pb2.TrainRequest())
        cancels = message.disconnect_policy == service_pb2.DISCONNECT_POLICY_CANCEL
        return self._follow(
            self.client.train(
                message.model_id,
                message.train_dataset,
                training_config=message.training_config,
                request_id=message.request_id or None,
                disconnect_policy="cancel" if cancels else "detach",
                labels=message.labels,
            )
        )

    def watch(self, training_id: str, after_sequence: int = 0) -> dict[str, Any]:
        return self._follow(self.client.watch(training_id, after_sequence=after_sequence))

    def resume(self, training_id: str, checkpoint_step: int = 0) -> dict[str, Any]:
        return self._follow(self.client.resume(training_id, checkpoint_step=checkpoint_step))

    def _follow(self, run: unslothd.TrainingRun) -> dict[str, Any]:
        self.open = run
        for event in run:
            say({"event": MessageToDict(event)})
        if self.stopped:
            return {}
        return {"training_id": run.training_id, "last_sequence": run.last_sequence, "metrics": plain(run.result())}

    def timed_watch(self, training_id: str) -> dict[str, Any]:
        """For benchmarks/clients.py: reads the whole log of a finished training and keeps nothing."""
        began = time.perf_counter()
        first, count = 0.0, 0
        for _ in self.client.watch(training_id):
            first = first or time.perf_counter() - began
            count += 1
        return {"events": count, "first_event_seconds": first, "seconds": time.perf_counter() - began}

    def pause(self, training_id: str) -> Message:
        return self.client.pause(training_id)

    def cancel(self, training_id: str, save_checkpoint: bool = True) -> Message:
        return self.client.cancel(training_id, save_checkpoint=save_checkpoint)

    def get_training(self, training_id: str) -> Message:
        return self.client.get_training(training_id)

    def list_trainings(self, labels: dict[str, str], limit: int | None = None) -> dict[str, Any]:
        return {"trainings": [plain(each) for each in self.client.list_trainings(labels=labels, limit=limit)]}

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        message = parsed(request, service_pb2.GenerateRequest())
        options: Any = given(message, "model_id", "prompt")
        self.open = stream = self.client.generate(message.model_id, message.prompt, **options)
        text = ""
        for piece in stream:
            say({"text": piece})
            text += piece
        return {} if self.stopped else {"text": text, "summary": plain(stream.summary)}

    def upload_dataset(self, path: str, name: str) -> Message:
        return self.client.upload_dataset(path, name=name)

    def export(self, request: dict[str, Any]) -> Message:
        return self.client.export(request["modelId"], "merged_16bit", on_progress=progress)

    def download(self, request: dict[str, Any], folder: str) -> dict[str, Any]:
        return {"paths": [str(path) for path in self.client.download(request["artifactId"], folder)]}


def error_of(error: unslothd.UnslothdError) -> dict[str, Any]:
    """What the cases compare of an error."""
    return {
        "kind": type(error).__name__,
        "code": error.code.value[0],
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "fields": [each.field for each in error.field_violations],
        "retry_after": error.retry_after,
    }


def parsed(request: dict[str, Any], message: Any) -> Any:
    return Parse(json.dumps(request), message)


def given(message: Message, *but: str) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields() if field.name not in but}


def plain(result: Any) -> Any:
    return MessageToDict(result) if isinstance(result, Message) else result


def progress(message: Message) -> None:
    say({"progress": MessageToDict(message)})


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    """Carries out one command after the other; a stop is heard in between."""
    adapter = Adapter(json.loads(sys.stdin.readline()))
    commands: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            command = json.loads(line)
            if command.get("stop"):
                adapter.stop()
            else:
                commands.put(command)
        commands.put(None)

    threading.Thread(target=listen, daemon=True).start()
    command: dict[str, Any] | None
    for command in iter(commands.get, None):
        adapter.stopped, adapter.open = False, None
        adapter.carry_out(command)


if __name__ == "__main__":
    main()
