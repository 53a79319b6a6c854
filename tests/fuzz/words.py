"""What makes a request reach the inside: names that mean something to the server, and names that must not."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

ROWS = "rows.jsonl"
MODELS = ("tiny", "raw")
ODD_PATHS = (
    "..",
    "../..",
    "../secret/rows.jsonl",
    "/etc/passwd",
    "/etc/shadow.jsonl",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/environ",
    "/proc/self/fd/0",
    "~",
    "~/rows.jsonl",
    "~nobody-of-that-name/rows.jsonl",
    "rows.jsonl/",
    "rows.jsonl/../../..",
    "rows\0.jsonl",
    "tiny/../../output",
    "./" * 400,
    "a" * 300,
    "a" * 300 + "/b.jsonl",
    "/".join(["b"] * 500),
    "ro\u0301ws.jsonl",
    "\u202elnosj.swor",
    "\uff0e\uff0e/rows.jsonl",
    "loop",
    "outside/rows.jsonl",
    "pipe.jsonl",
    "\\..\\..\\rows.jsonl",
    "file:///etc/passwd",
    "rows.pkl",
    " ",
    "\n",
)
ODD_TEXTS = (
    "\0",
    "\u202e\u2066",
    "e\u0301",
    "\ufeff",
    "\U0010ffff",
    "%s%n{0}",
    "'; --",
    "<a>",
    "\x1b[2J",
    "\ud7ff\ue000",
)
_SOME_ID = "sha256:" + "0" * 64


@dataclass
class Known:
    """What is on the server, as far as the answers told.

    Args:
        models: Ids of loaded models.
        trainings: Ids of trainings.
        datasets: Ids of stored datasets.
        artifacts: Ids of exports.
        names: Names of files that can be downloaded.
        may_store: False once enough trainings and exports are stored: the rest of a run must leave memory as it is.
    """

    models: list[str] = field(default_factory=list)
    trainings: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=lambda: ["config.json", "trainer_state.json"])
    may_store: bool = True


class Words:
    """Values for fields that have a meaning, by the field's name; the request's type where that matters.

    Args:
        random: Source of every choice.
        known: What is on the server.
    """

    def __init__(self, random: Random, known: Known) -> None:
        self._random = random
        self._known = known
        self._makers: dict[str, Callable[[], object]] = {
            "artifact_id": lambda: self._one(known.artifacts, "artifact-none"),
            "dataset_id": lambda: self._one(known.datasets, _SOME_ID),
            "training_id": lambda: self._one(known.trainings, "training-20261124-120000-abcdef"),
            "names": lambda: self._one(known.names, "../../etc/passwd"),
            "path": self._path,
            "page_token": lambda: random.choice(("", "", "x", *ODD_TEXTS, *ODD_PATHS[:3])),
            "request_id": lambda: random.choice(("", "", f"request-{random.randrange(40)}")),
            "output_dir": lambda: random.choice((f"out-{random.randrange(60)}", "a/b", "a")),
            "template": lambda: random.choice(("{text}", "{text} {{}}", "{", "{a!r}", "{a.b}", "{0}", "x", "{}")),
            "device_map": lambda: random.choice(("auto", "cpu", "cuda", "cuda:7")),
            "sha256": lambda: random.choice(("", "0" * 64)),
            "target_modules": lambda: random.choice(("q_proj", "k_proj", "v_proj", "a.b-c_9")),
            "modules_to_save": lambda: random.choice(("lm_head", "embed_tokens")),
            "gguf_quantization": lambda: random.choice(("", "q8_0", "F16", "q9_9", "../x")),
            "name": lambda: random.choice(("org/name", "name", "a" * 200)),
            "data": self.rows,
            # A scripted training of a hundred million steps takes its time, and its place.
            "max_steps": lambda: random.randint(1, 3),
            "max_new_tokens": lambda: random.randint(1, 40),
        }

    def of(self, request: str, name: str) -> object | None:
        """A value for a field of that name in a request of that type; None where it has no meaning here."""
        if name == "model_id":
            return self._model_id(request)
        if name == "model_name":
            return self._model_name()
        if name == "training_id" and request == "ExportModelRequest" and not self._known.may_store:
            return "training-none"
        maker = self._makers.get(name)
        return None if maker is None else maker()

    def rows(self) -> bytes:
        """JSON lines, the first of which scripts the training; or something like them."""
        random = self._random
        good = json.dumps({"text": "some text", "fake": {"steps": random.randint(1, 3)}}) + '\n{"text": "more"}\n'
        bad = (
            "\n",
            "\n\n",
            "[1]",
            "{",
            '{"text": 1}',
            "null",
            '{"text": "' + "x" * 5000 + '"}',
            "\x00\xff",
            "a,b\n1,2",
        )
        return (good if random.random() < 0.7 else random.choice(bad)).encode()

    def _one(self, known: list[str], else_this: str) -> str:
        return self._random.choice(known) if known and self._random.random() < 0.7 else else_this

    def _path(self) -> str:
        return ROWS if self._random.random() < 0.4 else self._random.choice(ODD_PATHS)

    def _model_id(self, request: str) -> str:
        stores = request in {"TrainRequest", "ExportModelRequest"}
        chance = {"UnloadModelRequest": 0.01}.get(request, 0.6)
        if (stores and not self._known.may_store) or self._random.random() > chance:
            return self._random.choice(("no-model", *ODD_TEXTS[:3]))
        return self._one(self._known.models, MODELS[0])

    def _model_name(self) -> str:
        random = self._random
        if random.random() < 0.05:
            return MODELS[0]
        training = self._one(self._known.trainings, "none")
        odd = (f"training:{training}/checkpoint-99", "training:", f"training:{training}/checkpoint-²", "org/na/me")
        return random.choice((*odd, "no model", "weights.gguf", *ODD_PATHS))
