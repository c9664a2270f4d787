"""Where answers stand in rendered text, found by comparing it with the prompts before them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedllm.data.rows import Message

if TYPE_CHECKING:
    from fedllm.data.render import Renderer


@dataclass(frozen=True, slots=True)
class Turn:
    """Where one answer stands in a rendered text."""

    start: int
    """First character after the prompt."""
    end: int
    """First character after the end of the turn."""
    message: int
    """Which message of the conversation it is."""
    is_learned: bool = True
    """Whether it is supervised, or only read."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text; control tokens of the data are escaped."""

    text: str
    turns: tuple[Turn, ...]
    """The answers in it, the last of which ends the text, unless that is a prompt."""


def found(
    renderer: Renderer, text: str, messages: Sequence[Message], prompts: Sequence[tuple[int, str]]
) -> tuple[Turn, ...]:
    """Return the answers in a text, but for those that the template rewrites later.

    Args:
        renderer: Wrote the text.
        text: The whole conversation, or the prompt after it.
        messages: The conversation.
        prompts: For each answer which message it is and the prompt before it.
    """
    turns = []
    for i, prompt in prompts:
        end = _end(renderer, text, len(prompt), messages[i], is_last=i == len(messages) - 1)
        if text.startswith(prompt) and end is not None:
            turns.append(Turn(len(prompt), end, i, messages[i].is_learned))
    return tuple(turns)


def _end(
    renderer: Renderer, text: str, start: int, answer: Message, *, is_last: bool
) -> int | None:
    """Return where an answer ends; None where that cannot be told."""
    mark = renderer.escape(answer.content).strip()
    if renderer.end_of_turn and (is_last or renderer.ends_every_turn):
        mark = renderer.end_of_turn
    elif answer.tool_calls:  # written as the template likes, up to the end of the text
        return len(text.rstrip()) if is_last else None
    elif answer.reasoning is not None:
        thought = renderer.escape(answer.reasoning).strip()
        start = max(text.find(thought, start) + len(thought), start)
    at = text.find(mark, start)
    return None if at < 0 else at + len(mark)


def spoken(renderer: Renderer, text: str, prompt: str, before: str, answer: Message) -> str:
    """Return the last answer of a text that does not start with the prompt before it.

    Either the prompt ends with more than the text has there (an opened thought), or the
    template writes what comes before the answer in another way.
    """
    if text.startswith(before):
        start = bisect_left(
            range(len(prompt)), True, key=lambda n: text[: n + 1] != prompt[: n + 1]
        )
    else:
        start = _behind_the_end_of(prompt, text)
    end = _end(renderer, text, start, answer, is_last=True)
    content = renderer.escape(answer.content).strip()
    if end is not None and (answer.tool_calls or content in text[start:end]):
        return text[start:end]
    return content + (renderer.end_of_turn or "")


def _behind_the_end_of(prompt: str, text: str) -> int:
    """Return where in the text the longest end of the prompt that stands in it ends."""
    length = bisect_left(range(len(prompt)), True, key=lambda n: prompt[-n - 1 :] not in text)
    return text.rfind(prompt[len(prompt) - length :]) + length
