"""From the messages of a file or a request to ours: OpenAI's shape, ShareGPT's, and mixtures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.data.calls import read_call, read_calls, tools_of
from fedllm.data.faults import RowFault
from fedllm.data.rows import Message
from fedllm.errors import DataError, did_you_mean

Role = Literal["system", "user", "assistant", "tool"]

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Roles of OpenAI and ShareGPT conversations, and what they are here."""

_MEANT = {"ai": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
_CALL_ROLE = "function_call"


@dataclass(frozen=True)
class Tags:
    """How a file writes messages, where it does so in a way of its own."""

    role: str | None = None
    """The key that holds the role; `role` or `from` unless told."""
    content: str | None = None
    """The key that holds the content; `content` or `value` unless told."""
    roles: Mapping[str, str] | None = None
    """The file's names of roles to those in `ROLES`, beside which they are known."""


def read_messages(turns: Any, *, where: str = "the request") -> tuple[Message, ...]:
    """Read a conversation in OpenAI's or ShareGPT's shape.

    Args:
        turns: A list of objects with `role` and `content` (or `from` and `value`); content may be
            text, a list of text parts or, beside tool calls, null.
        where: What the conversation is, for messages.

    Raises:
        DataError: If it is not such a list; names the message.
    """
    try:
        return messages_of(turns)
    except RowFault as fault:
        raise DataError(f"{where}: {fault}") from None


def read_tools(value: Any, *, where: str = "the request") -> tuple[Mapping[str, Any], ...]:
    """Read the functions that an assistant may call, as chat templates expect them.

    Args:
        value: A list of schemas, wrapped in `{"type": "function", "function": ...}` or bare, or
            the JSON of such a list, or nothing.
        where: What they belong to, for messages.

    Raises:
        DataError: If a schema has no name or is none.
    """
    try:
        return tools_of(value)
    except RowFault as fault:
        raise DataError(f"{where}: {fault}") from None


def messages_of(turns: Any, tags: Tags | None = None) -> tuple[Message, ...]:
    """Do as `read_messages`, for a row of a file.

    Raises:
        RowFault: If it is not a list of messages.
    """
    if not isinstance(turns, Iterable) or isinstance(turns, (str, bytes, Mapping)):
        raise RowFault(
            "not a list of messages",
            f"a conversation must be a list of messages, not a {type(turns).__name__}",
        )
    tags = tags or Tags()
    return tuple(_message(turn, number, tags) for number, turn in enumerate(turns, start=1))


def message_of(turn: Any, number: int, tags: Tags | None = None) -> Message:
    """Read one message; `number` says in faults which it is.

    Raises:
        RowFault: If it is no message.
    """
    return _message(turn, number, tags or Tags())


def _message(turn: Any, number: int, tags: Tags) -> Message:
    if not isinstance(turn, Mapping):
        raise RowFault(
            "a message is no object",
            f"message {number} must be an object, not a {type(turn).__name__}",
        )
    name = turn.get("role", turn.get("from"))
    name = turn.get(tags.role, name) if tags.role else name
    kind = _kind(name, number, tags)
    place = f"message {number} ({name})"
    content = turn.get("content", turn.get("value"))
    content = turn.get(tags.content, content) if tags.content else content
    if kind == _CALL_ROLE:
        calls = read_call(content, place)
        return Message("assistant", "", calls, is_learned=_is_learned(turn, place))
    role = ROLES[kind]
    if role == "assistant":
        return _answer(turn, content, place)
    if turn.get("weight") or turn.get("train"):
        raise RowFault("weight on a prompt", f"{place} is never learned, but has a weight")
    if role == "tool":
        call_id, function = turn.get("tool_call_id"), turn.get("name")
        return Message(
            role,
            _text(content, place),
            tool_call_id=None if call_id is None else str(call_id),
            name=None if function is None else str(function),
        )
    return Message(role, _text(content, place))


def _kind(name: Any, number: int, tags: Tags) -> str:
    known = {**{role: role for role in ROLES}, **(tags.roles or {})}
    if isinstance(name, str) and name in known:
        return known[name]
    near = _MEANT.get(str(name).lower())
    hint = f" Did you mean '{near}'?" if near else did_you_mean(str(name), known)
    raise RowFault(
        "unknown role",
        f"message {number} has the role '{name}'.{hint} Known roles: {', '.join(known)}",
    )


def _answer(turn: Mapping[str, Any], content: Any, place: str) -> Message:
    calls = read_calls(turn, place)
    text = "" if calls and content is None else _text(content, place)
    if not calls and not text.strip():
        raise RowFault("empty answer", f"{place} is empty", "Give it text, or delete the row")
    thought = turn.get("reasoning_content", turn.get("reasoning"))
    if thought is not None and not isinstance(thought, str):
        raise RowFault("reasoning is no text", f"{place}: its reasoning must be text")
    return Message(
        "assistant",
        text,
        calls,
        reasoning=thought or None,
        is_learned=_is_learned(turn, place),
    )


def _text(content: Any, place: str) -> str:
    """Return text, or the parts of one, joined as templates join them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise RowFault("content is no text", f"{place} needs text as its content")
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            raise RowFault(
                "content is no text", f"{place} has a part that is no text, but '{kind}'"
            )
        parts.append(text)
    return "".join(parts)


def _is_learned(turn: Mapping[str, Any], place: str) -> bool:
    """Tell whether an answer is supervised, by OpenAI's `weight` or by `train`."""
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowFault("wrong weight", f"{place} has the weight {weight!r}", "Write 0 or 1")
    if train is not None and not isinstance(train, bool):
        raise RowFault("wrong weight", f"{place} has train: {train!r}", "Write true or false")
    if weight is not None and train is not None and bool(weight) is not train:
        raise RowFault("wrong weight", f"{place} has a weight and a train that disagree")
    return bool(weight if weight is not None else train if train is not None else True)
