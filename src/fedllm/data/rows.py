"""What a row is once its shape is recognised, before any tokenizer has seen it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Task = Literal["classification", "qa", "math", "chat", "text"]

Record = tuple[str, Mapping[str, Any]]
"""Where a row stands ("train.jsonl:12") and its columns as the file has them."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


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
