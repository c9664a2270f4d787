"""Tiny byte-level BPE tokenizers with the chat templates of well-known families."""

from __future__ import annotations

from functools import cache
from typing import Any

from tool_templates import LLAMA31, MISTRAL, QWEN3, QWEN25

CONTROLS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens of their own that are no control tokens, as Qwen has them."""

_LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_QWEN25 = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Qwen3 forgets the thoughts of earlier answers and gives the last one an empty thought.
_QWEN3 = (
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The space belongs to the prompt, so BPE would merge it with the first word of the answer.
_MERGING = (
    "{% for message in messages %}"
    "{{ 'Q: ' if message.role == 'user' else 'A: ' }}{{ message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)

# family: chat template, bos, eos
FAMILIES: dict[str, tuple[str | None, str | None, str]] = {
    "llama3": (_LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen2.5": (_QWEN25, None, "<|im_end|>"),
    "qwen3": (_QWEN3, None, "<|endoftext|>"),
    "gemma": (_GEMMA, "<bos>", "<eos>"),
    "merging": (_MERGING, None, "<|endoftext|>"),
    "llama3.1": (LLAMA31, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen2.5-tools": (QWEN25, None, "<|im_end|>"),
    "qwen3-tools": (QWEN3, None, "<|im_end|>"),
    "mistral": (MISTRAL, "<s>", "</s>"),
    "base": (None, None, "<|endoftext|>"),
}

_TEXT = [
    "the quick brown fox jumps over the lazy dog and is 42 years old",
    "Question: how many apples are left? Answer: 7 apples are left.",
    "User says hello, Assistant says: hello there, how can I help you today?",
    "system user assistant model tool\n\n### Instruction:\n### Response:\n",
] * 4


@cache
def _backend(spaced: bool) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if spaced:  # the way of Llama 2: a space before the first word of a text
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        alphabet = [chr(i) for i in range(32, 127)] + ["\n", "▁"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=509,
        special_tokens=list(CONTROLS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer(family: str = "qwen2.5", *, spaced: bool = False) -> Any:
    """Return a fresh tokenizer of about 510 tokens with a family's chat template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    template, bos, eos = FAMILIES[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(spaced)), bos_token=bos, eos_token=eos
    )
    tokenizer.chat_template = template
    if family.startswith("qwen"):
        tokenizer.add_tokens(list(ADDED))
    return tokenizer
