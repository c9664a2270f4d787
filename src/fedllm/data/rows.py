"""What a row is once its shape is recognised, before any tokenizer has seen it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedllm.data.faults import RowFault

Task = Literal["classification", "qa", "math", "chat", "text", "preference", "rated"]

TALK: tuple[Task, ...] = ("qa", "math", "chat")
"""Tasks whose rows are conversations that answers are learned from."""

Record = tuple[str, Mapping[str, Any] | RowFault]
"""Where a row stands ("train.jsonl:12"), and its columns in the file or what is wrong with it."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant asks for."""

    name: str
    arguments: Mapping[str, Any]
    """The arguments as an object, however the file wrote them (as an object or as its JSON)."""
    id: str | None = None
    """By which a tool message refers to the call."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """What an assistant message asks for, beside or instead of its content."""
    reasoning: str | None = None
    """What an assistant thinks before it answers, without the marks around it."""
    tool_call_id: str | None = None
    """Which call a tool message answers."""
    name: str | None = None
    """Name of the function that a tool message comes from."""
    is_learned: bool = True
    """Whether an assistant message is supervised (OpenAI's `weight` of 1) or only read (0)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example: a conversation, or a text with or without a label."""

    messages: tuple[Message, ...]
    """The conversation; empty for plain and labelled texts."""
    text: str | None
    """The text of a plain or labelled row; None for conversations."""
    label: str | None
    """The class name of a labelled text."""
    group: str | None
    """Label, category or other column that splits go by; None if the row has none."""
    client: str | None
    """The row's natural owner, if a column names it."""
    where: str
    """Where the row stands, for messages: "train.jsonl:12"."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the functions the assistant may call, as chat templates expect them."""
    rejected: tuple[Message, ...] = ()
    """For preference data: the conversation with the worse answer. It has the prompt of `messages`,
    in which the better one stands. Empty for other rows."""
    is_desirable: bool | None = None
    """For rated data (KTO): whether the answer is wanted; None for other rows."""
    unused_messages: int = 0
    """How many messages after the last answer are left out."""

    @property
    def subject(self) -> str:
        """What the row is about: its text, or what the user says in it."""
        if self.text is not None:
            return self.text
        return "\n".join(m.content for m in self.messages if m.role == "user")

    @property
    def answer(self) -> str:
        """The last thing the assistant says, the label, or nothing."""
        if self.text is not None:
            return self.label or ""
        return next(m.content for m in reversed(self.messages) if m.role == "assistant")

    @property
    def size(self) -> int:
        """Length in characters."""
        return len(self.text or "") + sum(len(m.content) for m in self.messages)


@dataclass(frozen=True)
class Rows:
    """A data set as read, with its two splits apart."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]
    task: Task
    label_names: tuple[str, ...]
    """Class names in the order of their ids; empty unless the task is classification."""
    source: str
    """Where train and test come from, in one line."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Why broken rows are left out, and how many."""
