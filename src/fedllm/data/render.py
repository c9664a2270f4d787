"""Conversations to text by the chat template, with the places that are learned marked in it.

The tokenizer's own template is the truth; a base model without one gets a fallback. What a
template would write before the assistant speaks is the prompt, in training as in inference; what
follows it, up to and including the end of the turn, is learned. Control tokens that stand in the
data (a user who writes `<|im_end|>`) are escaped before rendering, so they stay text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from fedllm.data.rows import Message
from fedllm.errors import DataError, unknown

FALLBACKS = ("plain", "chatml", "alpaca", "llama3")
"""Templates for tokenizers that have none, beside this file in `templates/`."""

# Noncharacters never stand in text; they enclose the number of an escaped control token.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_ESCAPED = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
_PROBE = "\ufdd2"

# Some templates (Llama 3.2) write today's date, which would make a run depend on the day.
_FIXED = {"date_string": "26 Jul 2024"}


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer; none of it changes the tokenizer."""

    chat_template: Any
    eos_token_id: Any
    added_tokens_decoder: Any
    special_tokens_map: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenise texts."""

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Write conversations."""

    def convert_tokens_to_ids(self, *args: Any, **kwargs: Any) -> Any:
        """Look tokens up in the vocabulary."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Where one answer stands in a rendered text."""

    start: int
    """First character after the prompt."""
    end: int
    """First character after the end of the turn."""
    message: int
    """Which message of the conversation it is."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, cut after its last answer; control tokens of the data escaped."""

    text: str
    turns: tuple[Turn, ...]

    @property
    def is_escaped(self) -> bool:
        """Whether the data holds control tokens."""
        return _OPEN in self.text


def chat_template(tokenizer: Tokenizer, name: str = "auto") -> str:
    """Return the Jinja source of a chat template.

    Args:
        tokenizer: Its own template is taken for `auto`, if it has one, else `plain`.
        name: `auto`, one of `FALLBACKS`, or the path of a `.jinja` file.

    Raises:
        DataError: If there is no such template.
    """
    if name == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):  # several templates under names
            own = own.get("default")
        if own:
            return str(own)
        name = "plain"
    if name in FALLBACKS:
        file = resources.files("fedllm.data") / "templates" / f"{name}.jinja"
        return file.read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if path.suffix != ".jinja":
        raise DataError(unknown("chat template", name, ("auto", *FALLBACKS, "FILE.jinja")))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"model.chat_template: {path} cannot be read: {error}") from None


@dataclass(frozen=True)
class Renderer:
    """One tokenizer's way to write conversations; `make_renderer` builds it."""

    tokenizer: Tokenizer
    """Not modified."""
    template: str
    """Jinja source of the chat template."""
    controls: tuple[str, ...]
    """The tokenizer's control tokens as they are written, longest first."""
    end_of_turn: str | None = None
    """The control token that ends an answer, if the template writes one."""
    ends_every_turn: bool = False
    """Whether answers in the middle of a conversation end with it, too."""

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches any control token."""
        return re.compile("|".join(map(re.escape, self.controls)) or "(?!)")

    def escape(self, text: str) -> str:
        """Return text of the data with its control tokens replaced by numbered marks."""
        clean = _MARKS.sub("", text)
        return self.control_pattern.sub(
            lambda match: f"{_OPEN}{self.controls.index(match[0])}{_CLOSE}", clean
        )

    def unescape(self, text: str) -> str:
        """Return the text that `escape` was given."""
        return _ESCAPED.sub(lambda match: self.controls[int(match[1])], text)

    def write(
        self,
        conversations: Sequence[Sequence[Message]],
        wheres: Sequence[str],
        *,
        generation: bool = False,
    ) -> list[str]:
        """Apply the chat template to conversations of at least one message.

        With `generation`, each ends with what the template writes before the assistant speaks.

        Raises:
            DataError: If the template refuses a conversation.
        """
        import jinja2

        if not conversations:
            return []
        try:
            return list(
                self.tokenizer.apply_chat_template(
                    [[{"role": m.role, "content": m.content} for m in c] for c in conversations],
                    chat_template=self.template,
                    add_generation_prompt=generation,
                    tokenize=False,
                    **_FIXED,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            if len(conversations) == 1:
                raise DataError(
                    f"{wheres[0]}: the chat template cannot write this conversation: {error}. "
                    "Mend the row, drop data.system_prompt if the model knows no system role, "
                    "or set model.chat_template"
                ) from None
        half = len(conversations) // 2  # find the row that is refused
        return [
            *self.write(conversations[:half], wheres[:half], generation=generation),
            *self.write(conversations[half:], wheres[half:], generation=generation),
        ]

    def render(
        self, conversations: Sequence[Sequence[Message]], wheres: Sequence[str]
    ) -> list[Rendered]:
        """Write conversations and mark the answers in them.

        Args:
            conversations: Each ends with an answer that a user message precedes.
            wheres: Where each stands, for messages.

        Raises:
            DataError: If the template refuses a conversation.
        """
        escaped = [[Message(m.role, self.escape(m.content)) for m in c] for c in conversations]
        texts = self.write(escaped, wheres)
        asked = [(row, i) for row, c in enumerate(escaped) for i in _answers(c)]
        prompts = self.write(
            [escaped[row][:i] for row, i in asked],
            [wheres[row] for row, _ in asked],
            generation=True,
        )
        by_row: list[list[tuple[int, str]]] = [[] for _ in texts]
        for (row, i), prompt in zip(asked, prompts, strict=True):
            by_row[row].append((i, prompt))
        return [self._mark(*parts) for parts in zip(texts, escaped, by_row, strict=True)]

    def _mark(
        self, text: str, messages: Sequence[Message], prompts: Sequence[tuple[int, str]]
    ) -> Rendered:
        """Find the answers by prefix difference; those the template rewrites later are masked."""
        turns = []
        for i, prompt in prompts:
            answer, is_last = messages[i].content.strip(), i == prompts[-1][0]
            end = self._end(text, len(prompt), answer, is_last)
            if text.startswith(prompt) and end is not None:
                turns.append(Turn(len(prompt), end, i))
            elif is_last:  # inference will see this prompt, so training does
                text = prompt + answer + (self.end_of_turn or "")
                turns = [Turn(len(prompt), len(text), i)]
        return Rendered(text[: turns[-1].end], tuple(turns))

    def _end(self, text: str, start: int, answer: str, is_last: bool) -> int | None:
        mark = answer
        if self.end_of_turn and (is_last or self.ends_every_turn):
            mark = self.end_of_turn
        at = text.find(mark, start)
        return None if at < 0 else at + len(mark)


def make_renderer(tokenizer: Tokenizer, template: str) -> Renderer:
    """Learn from two short conversations how a template ends turns.

    Raises:
        DataError: If the template cannot write a simple conversation.
    """
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    controls = sorted((t for t in special if t.strip()), key=lambda t: (-len(t), t))
    bare = Renderer(tokenizer, template, tuple(controls))
    exchange = [Message("user", "?"), Message("assistant", _PROBE)]
    once, twice = bare.write([exchange, exchange * 2], ["a first try"] * 2)

    def first_control(text: str) -> str | None:
        match = bare.control_pattern.search(text)
        return match[0] if match else None

    end = first_control(once.partition(_PROBE)[2])
    middle = twice.split(_PROBE)[1] if twice.count(_PROBE) == 2 else ""
    return replace(bare, end_of_turn=end, ends_every_turn=end == first_control(middle))


def _answers(messages: Sequence[Message]) -> list[int]:
    """Return which messages are answers to something a user said."""
    first = next((i for i, m in enumerate(messages) if m.role == "user"), len(messages))
    return [i for i, m in enumerate(messages) if m.role == "assistant" and i > first]
