"""The shapes that rows come in: which columns each needs, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedllm.data.calls import tools_of
from fedllm.data.faults import RowFault
from fedllm.data.messages import Role, Tags, messages_of
from fedllm.data.rows import TALK, Message, Task

Fields = Mapping[str, Any]
"""A row's columns under our names; a column that the file lacks is not in it."""


@dataclass(frozen=True)
class Content:
    """What a row says, before it is known where it stands and whose it is."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    label: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    rejected: tuple[Message, ...] = ()
    is_desirable: bool | None = None
    unused: int = 0
    """Messages after the last answer."""


@dataclass(frozen=True)
class Shape:
    """One way in which files name their columns."""

    name: str
    tasks: tuple[Task, ...]
    """What rows of this shape can be used for, the usual use first."""
    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[Fields, Tags], Content]
    """From our columns to what the row says."""


def _messages(value: Any, tags: Tags, role: Role) -> tuple[Message, ...]:
    """Return a conversation, or the one message that text is."""
    if isinstance(value, (list, tuple)):
        return messages_of(value, tags)
    if isinstance(value, Mapping):
        return messages_of([value], tags)
    return (Message(role, str(value)),)


def _framed(fields: Fields, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Put the system message and the exchanges of `history` before a conversation."""
    head: list[Message] = []
    system = fields.get("system")
    if system and not any(message.role == "system" for message in messages):
        head.append(Message("system", str(system)))
    for number, pair in enumerate(fields.get("history") or (), start=1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowFault("bad history", f"exchange {number} of the history is no pair")
        head += [Message("user", str(pair[0])), Message("assistant", str(pair[1]))]
    return (*head, *messages)


def _up_to_the_answer(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return a conversation without what follows its last learned answer."""
    last = [i for i, m in enumerate(messages) if m.role == "assistant" and m.is_learned]
    if not last:
        raise RowFault(
            "no answer", "the conversation has no message of the assistant, so no answer"
        )
    if not any(message.role == "user" for message in messages[: last[-1]]):
        raise RowFault("no question", "the conversation has no message of a user before its answer")
    return tuple(messages[: last[-1] + 1])


def _prompt_of(fields: Fields, tags: Tags) -> tuple[Message, ...]:
    """Return what comes before an answer, from whichever columns hold it."""
    if "messages" in fields:
        return messages_of(fields["messages"], tags)
    if "instruction" in fields:
        parts = [str(part) for part in (fields["instruction"], fields.get("input")) if part]
        return (Message("user", "\n".join(parts)),)
    asked = fields.get("prompt", fields.get("question"))
    return () if asked is None else _messages(asked, tags, "user")


def _exchange(answer: str) -> Callable[[Fields, Tags], Content]:
    def build(fields: Fields, tags: Tags) -> Content:
        answers = _messages(fields[answer], tags, "assistant")
        messages = _framed(fields, [*_prompt_of(fields, tags), *answers])
        return Content(_up_to_the_answer(messages), tools=tools_of(fields.get("tools")))

    return build


def _conversation(fields: Fields, tags: Tags) -> Content:
    messages = _framed(fields, messages_of(fields["messages"], tags))
    used = _up_to_the_answer(messages)
    unused = len(messages) - len(used)
    return Content(used, tools=tools_of(fields.get("tools")), unused=unused)


def _pair(fields: Fields, tags: Tags) -> Content:
    """Read a better and a worse answer, alone or with the conversation before them."""
    sides = []
    for name in ("chosen", "rejected"):
        said = _messages(fields[name], tags, "assistant")
        is_whole = said[0].role != "assistant"
        prompt = () if is_whole else _prompt_of(fields, tags)
        sides.append(_up_to_the_answer(_framed(fields, [*prompt, *said])))
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise RowFault(
            "prompts differ",
            "what comes before the last answer differs between 'chosen' and 'rejected'",
            "Give both the same conversation but for one last message of the assistant",
        )
    return Content(chosen, rejected=rejected, tools=tools_of(fields.get("tools")))


def _rated(inner: Callable[[Fields, Tags], Content]) -> Callable[[Fields, Tags], Content]:
    def build(fields: Fields, tags: Tags) -> Content:
        found = inner(fields, tags)
        return replace(found, is_desirable=_truth(fields["desirable"]))

    return build


def _truth(value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in {"true", "false"}:
        raise RowFault("bad rating", f"the rating is {value!r}", "Write true or false")
    return text == "true"


def _labelled(fields: Fields, _: Tags) -> Content:
    return Content(text=str(fields["text"]), label=str(fields["label"]))


def _plain(fields: Fields, _: Tags) -> Content:
    return Content(text=str(fields["text"]))


_FRAME = ("system", "tools", "history")
_TALKS = (
    Shape("messages", TALK, ("messages",), ("system", "tools"), _conversation),
    Shape("prompt, completion", TALK, ("prompt", "completion"), _FRAME, _exchange("completion")),
    Shape(
        "instruction, input, output",
        TALK,
        ("instruction", "output"),
        ("input", *_FRAME),
        _exchange("output"),
    ),
    Shape("question, answer", TALK, ("question", "answer"), _FRAME, _exchange("answer")),
)
_ASKED = ("messages", "prompt", "instruction", "input", "question")

SHAPES: tuple[Shape, ...] = (
    Shape(
        "chosen, rejected",
        ("preference", *TALK),
        ("chosen", "rejected"),
        (*_ASKED, *_FRAME),
        _pair,
    ),
    *(
        Shape(
            f"{shape.name}, desirable",
            ("rated",),
            (*shape.required, "desirable"),
            shape.optional,
            _rated(shape.build),
        )
        for shape in _TALKS
    ),
    *_TALKS,
    Shape("text, label", ("classification",), ("text", "label"), (), _labelled),
    Shape("text", ("text",), ("text",), (), _plain),
)
"""All shapes; where several fit, the first is taken."""
