"""Chat templates written after the habits of four families of models, each with the special tokens that it needs.

None is copied from a model; each does what makes answers hard to find in that family.
"""

from dataclasses import dataclass
from typing import Any

from support.tiny_model import train_tokenizer


@dataclass(frozen=True)
class ChatStyle:
    """A chat template and its tokens.

    Args:
        name: Family.
        template: Jinja.
        bos: Beginning-of-sequence token; None = none.
        eos: End-of-sequence token.
        special: Special tokens besides these.
        plain: Tokens that are in the vocabulary as a whole but not special.
    """

    name: str
    template: str
    bos: str | None
    eos: str
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()


# Headers around roles, a header for the tools in the first user turn, calls as bare JSON, results from "ipython".
LLAMA3 = ChatStyle(
    name="llama-3",
    template=(
        "{{ bos_token }}"
        "{% if messages[0].role == 'system' %}"
        "{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}"
        "{% else %}{% set system = '' %}{% endif %}"
        "{% if system or tools %}<|start_header_id|>system<|end_header_id|>\n\n"
        "{% if tools %}Environment: ipython\n{% endif %}{{ system }}<|eot_id|>{% endif %}"
        "{% for m in messages %}"
        "{% if m.tool_calls %}"
        "{% if m.tool_calls | length != 1 %}{{ raise_exception('one tool call at a time') }}{% endif %}"
        "{% set call = m.tool_calls[0].function %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>'
        "{% elif m.role == 'tool' %}"
        "<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
        "{% else %}"
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if tools and loop.first and m.role == 'user' %}"
        "Answer with one of these functions.\n{% for tool in tools %}{{ tool | tojson(indent=4) }}\n{% endfor %}"
        "{% endif %}"
        "{{ m.content | trim }}<|eot_id|>"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    special=("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
)

# ChatML with a default system turn; thoughts are kept only after the last question, and then even when there are none;
# calls between tags, results inside user turns.
QWEN = ChatStyle(
    name="qwen",
    template=(
        "{% if tools %}<|im_start|>system\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}# Tools\n<tools>"
        "{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n' }}</tools><|im_end|>\n"
        "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n"
        "{% else %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% set ns = namespace(last=0) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}"
        "{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        "{% elif m.role == 'assistant' %}"
        "{% set thought = m.reasoning_content if m.reasoning_content is defined else '' %}{% set said = m.content %}"
        "{% if not thought and '</think>' in said %}"
        "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "<|im_start|>assistant\n"
        "{% if loop.index0 > ns.last and (loop.last or thought) %}"
        "<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
        "{% for call in m.tool_calls or [] %}{% if said or not loop.first %}{{ '\n' }}{% endif %}"
        '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
        "</tool_call>{% endfor %}<|im_end|>\n"
        "{% elif m.role == 'tool' %}"
        "{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}{{ '\n' }}"
        "<tool_response>\n{{ m.content }}\n</tool_response>"
        "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    bos=None,
    eos="<|im_end|>",
    special=("<|im_start|>", "<|endoftext|>"),
    plain=("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)

# Users and assistants must alternate; the system text and the tools are put into the last user turn, so that every turn
# before is written differently once others follow; there is no generation prompt.
MISTRAL = ChatStyle(
    name="mistral",
    template=(
        "{% if messages[0].role == 'system' %}"
        "{% set system = messages[0].content %}{% set turns = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% set ns = namespace(user=true, last=0) %}"
        "{% for m in turns %}{% if m.role == 'user' or m.role == 'assistant' and not m.tool_calls %}"
        "{% if (m.role == 'user') != ns.user %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% set ns.user = not ns.user %}{% endif %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{{ bos_token }}"
        "{% for m in turns %}"
        "{% if m.role == 'user' %}"
        "{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "[INST]{% if system and loop.index0 == ns.last %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% elif m.tool_calls %}"
        "[TOOL_CALLS][{% for call in m.tool_calls %}"
        "{% if call.id | length != 9 %}{{ raise_exception('a call id has 9 characters') }}{% endif %}"
        '{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}, '
        '"id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}'
        "{% elif m.role == 'tool' %}"
        '[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
        "{% else %} {{ m.content | trim }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    bos="<s>",
    eos="</s>",
    special=(
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
)

# The assistant is called "model", there is no system turn, and every text is trimmed.
GEMMA = ChatStyle(
    name="gemma",
    template=(
        "{{ bos_token }}"
        "{% if messages[0].role == 'system' %}{{ raise_exception('system role not supported') }}{% endif %}"
        "{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    bos="<bos>",
    eos="<eos>",
    special=("<start_of_turn>", "<end_of_turn>"),
)

STYLES = (LLAMA3, QWEN, MISTRAL, GEMMA)


def style_tokenizer(style: ChatStyle) -> Any:
    """A small real BPE tokenizer with the template and the tokens of a style. Needs transformers."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = train_tokenizer()
    special = [token for token in (style.bos, style.eos, *style.special) if token]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in style.plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=style.bos,
        eos_token=style.eos,
        pad_token="<|pad|>",
        chat_template=style.template,
        clean_up_tokenization_spaces=False,
    )
