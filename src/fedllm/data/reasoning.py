"""What becomes of an assistant's thoughts, as `data.reasoning` says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fedllm.data.rows import Message
from fedllm.errors import DataError

Reasoning = Literal["as-template", "keep", "strip"]

_BLOCK = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


def settled(messages: Sequence[Message], rule: Reasoning) -> tuple[Message, ...]:
    """Return a conversation with its thoughts where the rule wants them.

    Args:
        messages: Not modified.
        rule: `as-template` changes nothing, `keep` moves `<think>` blocks into
            `Message.reasoning`, and `strip` takes both kinds out.
    """
    if rule == "as-template":
        return tuple(messages)
    return tuple(_settled(m, rule) if m.role == "assistant" else m for m in messages)


def _settled(message: Message, rule: Reasoning) -> Message:
    thought, content = split(message.content)
    thought = message.reasoning if message.reasoning is not None else thought
    if thought is None:
        return message
    return replace(message, content=content, reasoning=thought if rule == "keep" else None)


def split(content: str) -> tuple[str | None, str]:
    """Return the thoughts that a text begins with, if any, and what follows them.

    >>> split("<think>2 and 2</think>4")
    ('2 and 2', '4')
    >>> split("4")
    (None, '4')
    """
    match = _BLOCK.fullmatch(content)
    return (match[1].strip(), match[2]) if match else (None, content)


def check_answers(messages: Sequence[Message], learned: str, where: str) -> None:
    """Check what `settled` left of a conversation, and what the template made of it.

    Args:
        messages: Up to the last answer.
        learned: The last answer as it is written.
        where: Where the row stands, for messages.

    Raises:
        DataError: If an answer was nothing but thoughts that are taken out, or the thoughts of the
            last answer are not written.
    """
    for message in messages:
        if message.role == "assistant" and not (
            message.content.strip() or message.tool_calls or message.reasoning
        ):
            raise DataError(
                f"{where}: an answer is nothing but thoughts, which data.reasoning: strip takes "
                "out. Give it an answer, delete the row, or set data.reasoning: keep"
            )
    if (messages[-1].reasoning or "").strip() not in learned:
        raise DataError(
            f"{where}: the chat template leaves the last answer's thoughts out, but "
            "data.reasoning is keep. Set it to as-template or strip, or set model.chat_template"
        )
