"""A whole model folder in a fraction of a second: a random 2-layer Llama with a real BPE tokenizer and chat template.

Needs neither network nor torch: the weights are drawn by numpy and written as safetensors.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HIDDEN_SIZE = 64
INTERMEDIATE_SIZE = 128
NUM_LAYERS = 2
NUM_HEADS = 4
NUM_KEY_VALUE_HEADS = 2
HEAD_DIM = HIDDEN_SIZE // NUM_HEADS
VOCAB_SIZE = 640
MAX_POSITIONS = 512

PAD, BOS, EOS = "<|pad|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Sentences of the kind that the tests train on, so that common words become few tokens.
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "Write a response that appropriately completes the request.",
    "### Instruction:\nAdd the numbers.\n\n### Input:\n2 and 3\n\n### Response:\nThe answer is 5.",
    "system user assistant tool You are a helpful assistant. Hello, how are you? I am fine, thank you.",
    "Good morning. Thank you very much. Please tell me a story about the sea and the old man.",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 20 30 40 50 60 70 80 90 100",
    "Grüße aus München, 東京 and Ελλάδα: the model shall learn every language.",
]


def build_tiny_llama(
    folder: Path, *, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE, tie_word_embeddings: bool = False
) -> Path:
    """Writes config, safetensors weights and tokenizer into `folder` (made if needed) and returns it.

    Args:
        folder: Where the model goes.
        seed: Of the weights; equal seeds give equal files.
        chat_template: Jinja template of the tokenizer; None = a tokenizer without one.
        tie_word_embeddings: True leaves out lm_head.weight.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    _write_tokenizer(folder, tokenizer, chat_template)
    _write_config(folder, tokenizer, tie_word_embeddings)
    save_file(_random_weights(seed, tie_word_embeddings), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens that knows common words of the tests."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, chat_template: str | None) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "padding_side": "right",
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    _write_json(folder / "tokenizer_config.json", settings)


def _write_config(folder: Path, tokenizer: Tokenizer, tie_word_embeddings: bool) -> None:
    ids = {name: tokenizer.token_to_id(token) for name, token in (("pad", PAD), ("bos", BOS), ("eos", EOS))}
    special = {f"{name}_token_id": number for name, number in ids.items()}
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": INTERMEDIATE_SIZE,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": NUM_HEADS,
            "num_key_value_heads": NUM_KEY_VALUE_HEADS,
            "head_dim": HEAD_DIM,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "tie_word_embeddings": tie_word_embeddings,
            "torch_dtype": "float32",
            **special,
        },
    )
    _write_json(folder / "generation_config.json", special)


def _random_weights(seed: int, tie_word_embeddings: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = dict(_weight_shapes())
    if tie_word_embeddings:
        del shapes["lm_head.weight"]
    return {
        name: np.ones(shape, np.float32) if len(shape) == 1 else random.normal(0, 0.05, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def _weight_shapes() -> list[tuple[str, tuple[int, ...]]]:
    key_value_size = NUM_KEY_VALUE_HEADS * HEAD_DIM
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (VOCAB_SIZE, HIDDEN_SIZE)),
        ("model.norm.weight", (HIDDEN_SIZE,)),
        ("lm_head.weight", (VOCAB_SIZE, HIDDEN_SIZE)),
    ]
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        shapes += [
            (f"{prefix}.input_layernorm.weight", (HIDDEN_SIZE,)),
            (f"{prefix}.post_attention_layernorm.weight", (HIDDEN_SIZE,)),
            (f"{prefix}.self_attn.q_proj.weight", (HIDDEN_SIZE, HIDDEN_SIZE)),
            (f"{prefix}.self_attn.k_proj.weight", (key_value_size, HIDDEN_SIZE)),
            (f"{prefix}.self_attn.v_proj.weight", (key_value_size, HIDDEN_SIZE)),
            (f"{prefix}.self_attn.o_proj.weight", (HIDDEN_SIZE, HIDDEN_SIZE)),
            (f"{prefix}.mlp.gate_proj.weight", (INTERMEDIATE_SIZE, HIDDEN_SIZE)),
            (f"{prefix}.mlp.up_proj.weight", (INTERMEDIATE_SIZE, HIDDEN_SIZE)),
            (f"{prefix}.mlp.down_proj.weight", (HIDDEN_SIZE, INTERMEDIATE_SIZE)),
        ]
    return shapes


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
