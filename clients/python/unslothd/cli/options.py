"""Options that several commands share, declared once."""

import getpass
import inspect
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_type_hints

import typer

from unslothd import _connection
from unslothd._row_format import Layout
from unslothd.v1.model_pb2 import LoraConfig

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a line, with the names of the contract.")]

_DATA = "Rows"
Dataset = Annotated[
    str,
    typer.Option(
        help="A file here (.jsonl, .json, .csv, .parquet, .arrow; beyond 4 MiB it is uploaded first), server:PATH, "
        "hub:ORG/NAME or hub:ORG/NAME:SPLIT, or the sha256:… of an uploaded dataset.",
        rich_help_panel=_DATA,
    ),
]
EvalDataset = Annotated[str | None, typer.Option(help="Rows to evaluate on, as --dataset.", rich_help_panel=_DATA)]
RowLayout = Annotated[Layout | None, typer.Option(help="Layout of the rows. (default detected)", rich_help_panel=_DATA)]
Template = Annotated[
    str, typer.Option(help='Text with {column} places, e.g. "Q: {question} A: {answer}".', rich_help_panel=_DATA)
]
ModelToLoad = Annotated[str | None, typer.Option(metavar="NAME", help="Load this model first.")]
LoadedModel = Annotated[str | None, typer.Option(metavar="ID", help="Take this model, loaded before.")]

_CONFIG = "Training config"
_LORA = "Adapter (LoRA)"
_LOAD = "Loading (with --model)"


def _config(text: str, metavar: str | None = None) -> Any:
    return typer.Option(help=text, rich_help_panel=_CONFIG, metavar=metavar, show_default=False)


def _lora(text: str, metavar: str | None = None) -> Any:
    return typer.Option(help=text, rich_help_panel=_LORA, metavar=metavar, show_default=False)


def _load(text: str, metavar: str | None = None) -> Any:
    return typer.Option(help=text, rich_help_panel=_LOAD, metavar=metavar, show_default=False)


def _server(flag: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(flag, help=text, rich_help_panel="Server", metavar=metavar, show_default=False)


def _hf_token(file: str | None) -> str | None:
    """Returns the token in a file; "-" is stdin, where a person is asked and sees nothing of it."""
    if file is None:
        return None
    problems: list[str] = []
    if file != "-":
        token = _connection.token_in(Path(file).expanduser(), problems)
    elif sys.stdin.isatty():
        token = getpass.getpass("Hugging Face token: ")
    else:
        token = sys.stdin.read()
    token = (token or "").strip()
    if not problems and not _connection.is_token(token):
        problems.append(f"{file} is no token: it must be one word of ASCII characters, as the Hub shows it once")
    if problems:
        raise typer.BadParameter("\n".join(problems))
    return token


Server = _connection.ConnectionOptions
HF_FLAG = "--hf-token-file"


class ServerOptions:
    """An option for everything that says where the server is and how to reach it.

    A token comes from a file: what stands on a command line can be seen by everybody on the machine.
    """

    target: Annotated[
        str | None,
        _server("--target", "Server to talk to, or UNSLOTHD_TARGET. (default 127.0.0.1:50051)", "HOST:PORT"),
    ]
    token_file: Annotated[
        str | None,
        _server("--token-file", "File with your token, or UNSLOTHD_TOKEN_FILE, UNSLOTHD_TOKEN.", "FILE"),
    ]
    ca: Annotated[
        str | None, _server("--ca", "Use TLS, and trust the authority of this PEM file, or UNSLOTHD_CA.", "FILE")
    ]
    client_certificate: Annotated[
        str | None, _server("--client-cert", "Certificate to show, in PEM, or UNSLOTHD_CLIENT_CERT.", "FILE")
    ]
    client_key: Annotated[str | None, _server("--client-key", "Its private key, or UNSLOTHD_CLIENT_KEY.", "FILE")]
    tls: Annotated[bool | None, _server("--tls", "Use TLS, and trust the public authorities, or UNSLOTHD_TLS=1.")]
    profile: Annotated[
        str | None, _server("--profile", "Profile in ~/.config/unslothd/config.toml, or UNSLOTHD_PROFILE.", "NAME")
    ]


class ConfigOptions:
    """An option for every field of TrainingConfig. Ranges are checked by the server, which names every wrong field."""

    learning_rate: Annotated[float | None, _config("Peak learning rate. (default 2e-4)")]
    batch_size: Annotated[int | None, _config("Sequences per device and forward pass. (default 2)")]
    gradient_accumulation_steps: Annotated[int | None, _config("Forward passes per optimizer step. (default 4)")]
    warmup_steps: Annotated[int | None, _config("Steps over which the learning rate rises. (default 10)")]
    max_steps: Annotated[int | None, _config("Optimizer steps; not with --num-train-epochs. (default 100)")]
    num_train_epochs: Annotated[float | None, _config("Passes over the rows; not with --max-steps.")]
    output_dir: Annotated[str | None, _config("Folder of the results, below the server's output root.", "DIR")]
    fp16: Annotated[bool | None, _config("Mixed precision in float16.")]
    bf16: Annotated[bool | None, _config("Mixed precision in bfloat16. (default where supported)")]
    logging_steps: Annotated[int | None, _config("A step event every N steps. (default 1)")]
    save_steps: Annotated[int | None, _config("A checkpoint every N steps. (default 100)")]
    optim: Annotated[str | None, _config("Optimizer, as Transformers names it. (default adamw_8bit)", "NAME")]
    weight_decay: Annotated[float | None, _config("Decoupled weight decay. (default 0.01)")]
    lr_scheduler_type: Annotated[str | None, _config("Course of the learning rate. (default cosine)", "NAME")]
    seed: Annotated[int | None, _config("Seed of data order, dropout and adapter weights. (default 42)")]
    use_gradient_checkpointing: Annotated[bool | None, _config("Less memory, more time. (default on)")]
    packing: Annotated[bool | None, _config("Several short sequences in one row. (default off)")]
    max_grad_norm: Annotated[float | None, _config("Gradients are scaled down to this norm. (default 1)")]
    eval_steps: Annotated[int | None, _config("Evaluate every N steps; 0 = only at the end. (default 0)")]
    save_total_limit: Annotated[int | None, _config("Keep the newest N checkpoints; 0 = all. (default 0)")]
    early_stopping_patience: Annotated[int | None, _config("Stop after N evaluations that are no better; 0 = never.")]
    neftune_noise_alpha: Annotated[float | None, _config("Noise on the embeddings (NEFTune); 0 = none.")]
    micro_batching: Annotated[
        Literal["fixed", "tuned"] | None,
        _config("How a step is split over passes: as given, or the fastest that fits."),
    ]


class LoraOptions:
    """An option for every field of LoraConfig."""

    lora_r: Annotated[int | None, _lora("Rank. (default 16)")]
    lora_alpha: Annotated[int | None, _lora("Scale of the update is alpha / r. (default r)")]
    lora_dropout: Annotated[float | None, _lora("Probability. (default 0)")]
    lora_target_modules: Annotated[
        list[str] | None, _lora("Linear modules, e.g. q_proj,v_proj; repeatable. (default all)", "NAMES")
    ]
    lora_use_rslora: Annotated[bool | None, _lora("Rank-stabilised scaling. (default off)")]
    lora_modules_to_save: Annotated[
        list[str] | None, _lora("Modules trained in full, e.g. embed_tokens,lm_head; repeatable.", "NAMES")
    ]
    lora_layers_to_transform: Annotated[
        list[int] | None, _lora("Index of a layer to adapt, from 0; repeatable. (default all)")
    ]


class LoadOptions:
    """An option for every field of LoadModelRequest that says how to load; the token comes from a file, as above."""

    max_seq_length: Annotated[int | None, _load("Tokens of the longest sequence. (default 2048)")]
    load_in_4bit: Annotated[bool | None, _load("4-bit weights. (default where the device can)")]
    token: Annotated[
        str | None,
        typer.Option(
            HF_FLAG,
            help="File with your Hugging Face token, for gated models; - reads it from stdin. Never stored or logged.",
            rich_help_panel=_LOAD,
            metavar="FILE",
            show_default=False,
            callback=_hf_token,
        ),
    ]
    device_map: Annotated[str | None, _load("auto, cpu, cuda or cuda:N. (default auto)", "DEVICE")]
    dtype: Annotated[str | None, _load("bfloat16, float16 or float32. (default bfloat16 where supported)", "DTYPE")]
    revision: Annotated[str | None, _load("Branch, tag or commit of a Hub repository. (default main)")]
    full_finetuning: Annotated[bool | None, _load("Train all weights instead of an adapter. (default off)")]
    wait_for_memory: Annotated[
        bool | None, _load("Wait until a device that is too full has room, instead of being refused. (default off)")
    ]


def takes(parameter: str, declared: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of a class; those that were used arrive as one dict by field name.

    Args:
        parameter: Keyword parameter of the command that receives the dict.
        declared: Class whose annotations are the options.
    """
    hints = get_type_hints(declared, include_extras=True)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.name != parameter]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
            for name, hint in hints.items()
        ]

        @wraps(command)
        def with_options(**values: Any) -> None:
            used = {name: values.pop(name) for name in hints}
            command(
                **values,
                **{parameter: {_field(name): _split(value) for name, value in used.items() if value not in (None, [])}},
            )

        with_options.__dict__["__signature__"] = signature.replace(parameters=[*own, *added])
        with_options.__annotations__ = {each.name: each.annotation for each in [*own, *added]}
        return with_options

    return decorate


def connects(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the ServerOptions, as its parameter `server`."""
    return takes("server", ServerOptions)(command)


def _field(option: str) -> str:
    """Returns the field of an option: --lora-r is `r`, but --lora-alpha is `lora_alpha`."""
    short = option.removeprefix("lora_")
    return short if short != option and short in LoraConfig.DESCRIPTOR.fields_by_name else option


def _split(value: Any) -> Any:
    """Returns the names of a repeatable option, of which each use may name several: "a,b"."""
    if not isinstance(value, list):
        return value
    split: list[object] = []
    for each in cast(list[object], value):
        split += [name.strip() for name in each.split(",") if name.strip()] if isinstance(each, str) else [each]
    return split


def labels(pairs: list[str]) -> dict[str, str]:
    """Returns the labels that KEY=VALUE arguments give.

    Raises:
        typer.BadParameter: One has no "=".
    """
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise typer.BadParameter(f"{', '.join(wrong)}: write KEY=VALUE", param_hint="--label")
    return dict(pair.split("=", 1) for pair in pairs)
