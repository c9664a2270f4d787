"""Conversations to text by the chat template, with the places that are learned marked in it.

The tokenizer's own template is the truth; a base model without one gets a fallback. What a
template would write before the assistant speaks is the prompt, in training as in inference; what
follows it, up to and including the end of the turn, is learned. Control tokens that stand in the
data (a user who writes `<|im_end|>`, the description of a tool) are escaped before rendering, so
they stay text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fedllm.data import marks, pieces, support
from fedllm.data.marks import Rendered, Turn
from fedllm.data.rows import Message
from fedllm.data.template import FIXED, Tokenizer
from fedllm.data.turns import Tools, as_turns, escaped
from fedllm.data.turns import Turn as TemplateTurn
from fedllm.errors import DataError

# Noncharacters never stand in text; they enclose the number of an escaped control token.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_ESCAPED = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
_PROBE = "\ufdd2"


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

    @cached_property
    def support(self) -> support.Support:
        """What the template writes beside roles and contents."""
        return support.Support(self.tokenizer, self.template)

    def escape(self, text: str) -> str:
        """Return text of the data with its control tokens replaced by numbered marks."""
        clean = _MARKS.sub("", text)
        return self.control_pattern.sub(
            lambda match: f"{_OPEN}{self.controls.index(match[0])}{_CLOSE}", clean
        )

    def unescape(self, text: str) -> str:
        """Return the text that `escape` was given."""
        return _ESCAPED.sub(lambda match: self.controls[int(match[1])], text)

    @staticmethod
    def is_escaped(text: str) -> bool:
        """Tell whether a rendered text holds control tokens of the data."""
        return _OPEN in text

    def write(
        self,
        conversations: Sequence[Sequence[Message]],
        wheres: Sequence[str],
        *,
        tools: Sequence[Tools] | None = None,
        generation: bool = False,
    ) -> list[str]:
        """Apply the chat template to conversations of at least one message.

        Args:
            conversations: Not modified; control tokens in their texts are escaped.
            wheres: Where each stands, for messages.
            tools: What the assistant of each may call; none unless given.
            generation: End each with what the template writes before the assistant speaks.

        Raises:
            DataError: If the template refuses a conversation.
        """
        turns = [self._turns(c) for c in conversations]
        if tools is None or not any(tools):
            return self._written(turns, wheres, (), generation=generation)
        texts = [""] * len(turns)
        plain = [i for i, of_row in enumerate(tools) if not of_row]
        for i, text in zip(
            plain,
            self._written(
                [turns[i] for i in plain], [wheres[i] for i in plain], (), generation=generation
            ),
            strict=True,
        ):
            texts[i] = text
        for i, of_row in enumerate(tools):
            if of_row:
                schemas = [escaped(tool, self.escape) for tool in of_row]
                (texts[i],) = self._written([turns[i]], [wheres[i]], schemas, generation=generation)
        return texts

    def _turns(self, messages: Sequence[Message]) -> list[TemplateTurn]:
        return as_turns(
            messages,
            self.escape,
            has_reasoning_field=lambda: self.support.writes_reasoning,
            wants_short_ids=lambda: self.support.wants_short_ids,
        )

    def _written(
        self,
        conversations: Sequence[list[TemplateTurn]],
        wheres: Sequence[str],
        tools: Tools,
        *,
        generation: bool,
    ) -> list[str]:
        import jinja2

        if not conversations:
            return []
        try:
            return list(
                self.tokenizer.apply_chat_template(
                    conversations,
                    tools=list(tools) or None,
                    chat_template=self.template,
                    add_generation_prompt=generation,
                    tokenize=False,
                    **FIXED,
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
        parts = (slice(half), slice(half, None))
        return [
            text
            for part in parts
            for text in self._written(
                conversations[part], wheres[part], tools, generation=generation
            )
        ]

    def render(
        self,
        conversations: Sequence[Sequence[Message]],
        wheres: Sequence[str],
        tools: Sequence[Tools] | None = None,
    ) -> list[Rendered]:
        """Write conversations, each up to its last learned answer, and mark the answers in them.

        Args:
            conversations: Each has a learned answer that a user message precedes.
            wheres: Where each stands, for messages.
            tools: What the assistant of each may call; none unless given.

        Raises:
            DataError: If the template refuses a conversation, or writes no tools and needs to.
        """
        tools = tools or [()] * len(conversations)
        conversations = [_up_to_the_last_learned(talk) for talk in conversations]
        for talk, where, of_row in zip(conversations, wheres, tools, strict=True):
            self.support.check(talk, of_row, where)
        texts = self.write(conversations, wheres, tools=tools)
        asked = [(row, i) for row, talk in enumerate(conversations) for i in _answers(talk)]
        prompts = self.write(
            [conversations[row][:i] for row, i in asked],
            [wheres[row] for row, _ in asked],
            tools=[tools[row] for row, _ in asked],
            generation=True,
        )
        by_row: list[list[tuple[int, str]]] = [[] for _ in texts]
        for (row, i), prompt in zip(asked, prompts, strict=True):
            by_row[row].append((i, prompt))
        parts = zip(texts, conversations, tools, by_row, strict=True)
        return [self._mark(*part, where) for part, where in zip(parts, wheres, strict=True)]

    def prompt_ids(
        self, messages: Sequence[Message], tools: Tools = (), *, where: str = "the request"
    ) -> list[int]:
        """Return the tokens that the assistant's answer to a conversation is generated from.

        They are those that training sees before the answer.

        Args:
            messages: At least one.
            tools: What the assistant may call.
            where: What the conversation is, for messages.

        Raises:
            DataError: If the template refuses the conversation, or writes no tools and needs to.
        """
        if not messages:
            raise DataError(f"{where}: there is no message. Give at least one")
        self.support.check(messages, tools, where)
        (text,) = self.write([messages], [where], tools=[tools], generation=True)
        answers = _answers(messages)
        heads = self.write(
            [messages[:i] for i in answers],
            [where] * len(answers),
            tools=[tools] * len(answers),
            generation=True,
        )
        turns = marks.found(self, text, messages, list(zip(answers, heads, strict=True)))
        return pieces.prompt_tokens(self, Rendered(text, turns))[0]

    def _mark(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Tools,
        prompts: Sequence[tuple[int, str]],
        where: str,
    ) -> Rendered:
        """Find the answers by prefix difference; those the template rewrites later are masked."""
        *_, (i, prompt) = prompts
        turns = marks.found(self, text, messages, prompts)
        if not turns or turns[-1].message != i:  # inference will see this prompt, so training does
            (before,) = self.write([messages[:i]], [where], tools=[tools])
            text = prompt + marks.spoken(self, text, prompt, before, messages[i])
            turns = (Turn(len(prompt), len(text), i),)
        return Rendered(text[: turns[-1].end], turns)


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


def _up_to_the_last_learned(messages: Sequence[Message]) -> Sequence[Message]:
    last = max(i for i in _answers(messages) if messages[i].is_learned)
    return messages[: last + 1]
