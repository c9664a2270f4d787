"""Messages as chat templates expect them: OpenAI's shape, with arguments as objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from fedllm.data.rows import Message, ToolCall

Tools = Sequence[Mapping[str, Any]]
"""JSON schemas of functions."""

Turn = dict[str, Any]
"""One message, as a template reads it."""

Escape = Callable[[str], str]


def as_turns(
    messages: Sequence[Message],
    escape: Escape,
    *,
    has_reasoning_field: Callable[[], bool],
    wants_short_ids: Callable[[], bool],
) -> list[Turn]:
    """Return a conversation for a template.

    Args:
        messages: Not modified.
        escape: Applied to every text that comes from the data.
        has_reasoning_field: Whether the template writes `reasoning_content`; where it does not,
            thoughts stand as a `<think>` block before the content.
        wants_short_ids: Whether the template takes no call ids but of nine letters or digits.
    """
    turns: list[Turn] = []
    pending: list[str] = []
    for message in messages:
        turn: Turn = {"role": message.role, "content": escape(message.content)}
        if message.reasoning is not None:
            thought = escape(message.reasoning)
            if has_reasoning_field():
                turn["reasoning_content"] = thought
            else:
                turn["content"] = f"<think>\n{thought}\n</think>\n\n{turn['content']}"
        if message.tool_calls:
            ids = [_call_id(c, len(turns), wants_short_ids) for c in message.tool_calls]
            pending = [i for i in ids if i is not None]
            calls = zip(ids, message.tool_calls, strict=True)
            turn["tool_calls"] = [_as_call(name, call, escape) for name, call in calls]
        if message.role == "tool":
            turn |= _as_result(message, pending, escape, wants_short_ids)
        turns.append(turn)
    return turns


def escaped(value: Any, escape: Escape) -> Any:
    """Return a JSON value with every text in it escaped, names included."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mapping):
        return {escape(str(name)): escaped(inner, escape) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [escaped(inner, escape) for inner in value]
    return value


def _as_call(name: str | None, call: ToolCall, escape: Escape) -> Turn:
    function = {"name": escape(call.name), "arguments": escaped(call.arguments, escape)}
    found: Turn = {"type": "function", "function": function}
    return found if name is None else {"id": escape(name), **found}


def _as_result(
    message: Message, pending: list[str], escape: Escape, wants_short_ids: Callable[[], bool]
) -> Turn:
    """Return what tells which call a tool message answers; `pending` loses that call's id."""
    found: Turn = {}
    call_id = message.tool_call_id
    if call_id is not None and wants_short_ids():
        call_id = _short(call_id)
    elif call_id is None and pending and wants_short_ids():
        call_id = pending[0]
    if call_id in pending:
        pending.remove(call_id)
    if call_id is not None:
        found["tool_call_id"] = escape(call_id)
    if message.name is not None:
        found["name"] = escape(message.name)
    return found


def _call_id(call: ToolCall, place: int, wants_short_ids: Callable[[], bool]) -> str | None:
    if not wants_short_ids():
        return call.id
    return _short(call.id if call.id is not None else f"{place} {call.name}")


def _short(call_id: str) -> str:
    """Return the id as nine letters and digits, the same ones for the same id.

    >>> _short("abc123XYZ"), len(_short("call_1"))
    ('abc123XYZ', 9)
    """
    if len(call_id) == 9 and call_id.isascii() and call_id.isalnum():
        return call_id
    return blake2b(call_id.encode(), digest_size=5).hexdigest()[:9]
