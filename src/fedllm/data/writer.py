"""How the rows of one task become tokens for one kind of model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from fedllm.config import DataConfig
from fedllm.data.cache import cached, fingerprint, key_of
from fedllm.data.overlong import Cuts, Limits
from fedllm.data.reasoning import settled
from fedllm.data.render import Renderer, make_renderer
from fedllm.data.rows import Message, Row, Task
from fedllm.data.template import Tokenizer, chat_template
from fedllm.data.tokenise import Learned, encode_conversations, encode_for_classes, encode_texts
from fedllm.data.tokens import Encoded, select
from fedllm.errors import DataError

Kind = Literal["causal-lm", "sequence-classification"]
Side = Literal["chosen", "rejected"]


@dataclass(frozen=True)
class Writer:
    """Tokenises rows; `for_task` builds it."""

    config: DataConfig
    tokenizer: Tokenizer
    renderer: Renderer | None
    """Writes conversations; None where rows stay plain text."""
    kind: Kind
    task: Task
    fingerprint: str | None
    """Of the tokenizer; None where tokens are not cached."""

    @classmethod
    def for_task(
        cls, config: DataConfig, tokenizer: Tokenizer, task: Task, kind: Kind, template: str
    ) -> Writer:
        """Choose how rows are written.

        Raises:
            DataError: If the kind of model does not fit the task, or there is no such template.
        """
        if kind == "sequence-classification" and task != "classification":
            raise DataError(
                f"a sequence-classification model needs labelled texts, but the task is '{task}'. "
                "Set data.columns: {text: YOURS, label: YOURS}, or model.kind: causal-lm"
            )
        has_talk = kind == "causal-lm" and task != "text"
        return cls(
            config,
            tokenizer,
            make_renderer(tokenizer, chat_template(tokenizer, template)) if has_talk else None,
            kind,
            task,
            fingerprint(tokenizer) if config.cache else None,
        )

    def conversations(
        self, rows: Sequence[Row], side: Side = "chosen"
    ) -> list[tuple[Message, ...]]:
        """Return what is written for each row; empty where rows stay plain text."""
        if self.renderer is None:
            return [()] * len(rows)
        return [self._conversation(row, side) for row in rows]

    def _conversation(self, row: Row, side: Side) -> tuple[Message, ...]:
        messages = row.messages if side == "chosen" else row.rejected
        if row.text is not None:
            messages = (Message("user", row.text), Message("assistant", row.answer))
        prompt = self.config.system_prompt
        if prompt and not any(message.role == "system" for message in messages):
            messages = (Message("system", prompt), *messages)
        return settled(messages, self.config.reasoning)

    def encode_split(self, rows: Sequence[Row], *, is_test: bool) -> tuple[Encoded, Encoded | None]:
        """Tokenise rows; of preference pairs both sides, row by row, or neither.

        Args:
            rows: One split.
            is_test: Whether answers are generated and compared for them.

        Returns:
            The (better) answers, and the worse ones if the task is preference.

        Raises:
            DataError: As `encode`.
        """
        made = self.encode(rows, is_test=is_test)
        if self.task != "preference":
            return made, None
        worse = self.encode(rows, is_test=is_test, side="rejected")
        _, first, second = np.intersect1d(made.kept, worse.kept, return_indices=True)
        made, worse = (
            replace(select(side, places), refused=np.union1d(made.refused, worse.refused))
            for side, places in ((made, first), (worse, second))
        )
        return made, worse

    def encode(self, rows: Sequence[Row], *, is_test: bool, side: Side = "chosen") -> Encoded:
        """Tokenise, or take from the cache.

        Args:
            rows: One split.
            is_test: Whether answers are generated and compared for them.
            side: Of preference pairs, which answer.

        Raises:
            DataError: If a row cannot be written, or is too long and that is an error.
        """
        limits = Limits(self.config.max_length, self.config.overlong, self._cuts(is_test))
        wheres = [row.where for row in rows]
        texts = [row.text or "" for row in rows]
        talks = self.conversations(rows, side)
        learned, rule = self._learned(), self.config.reasoning
        tolerates = self.config.max_broken_share > 0

        def make() -> Encoded:
            if self.renderer is not None:
                return encode_conversations(
                    self.renderer,
                    talks,
                    wheres,
                    limits,
                    tools=[row.tools for row in rows],
                    learned=learned,
                    tolerates=tolerates,
                    reasoning=rule,
                )
            if self.kind == "causal-lm":
                return encode_texts(self.tokenizer, texts, wheres, limits)
            return encode_for_classes(self.tokenizer, texts, wheres, limits)

        if self.fingerprint is None:
            return make()
        template = self.renderer.template if self.renderer else None
        contents: Any = texts
        if template:
            contents = [[_key(m) for m in talk] for talk in talks]
            contents = [contents, [json.dumps(row.tools) if row.tools else None for row in rows]]
        settings = [self.kind, template, asdict(limits), learned, tolerates, rule]
        return cached(key_of([self.fingerprint, settings, contents]), make)

    def refuse(self, made: Encoded, rows: Sequence[Row], name: str) -> None:
        """Raise DataError if the template refused more rows than may be broken."""
        count = len(made.refused)
        if self.renderer is None or count <= self.config.max_broken_share * len(rows):
            return
        row = rows[int(made.refused[0])]
        where = f"{count} of {len(rows)} {name} rows cannot be written; {row.where}"
        sides: tuple[Side, ...] = ("chosen", "rejected") if row.rejected else ("chosen",)
        for side in sides:  # one of them raises what was wrong
            encode_conversations(
                self.renderer,
                self.conversations([row], side),
                [where],
                Limits(self.config.max_length, "drop"),
                tools=[row.tools],
                reasoning=self.config.reasoning,
            )

    def _cuts(self, is_test: bool) -> Cuts:
        if self.task == "preference":
            return "answer"
        return "answer-first" if is_test else "both"

    def _learned(self) -> Learned:
        if self.task in ("preference", "rated") or self.config.mask_history:
            return "last-answer"
        return "all" if self.config.train_on_prompt else "answers"

    def stop_ids(self) -> tuple[int, ...]:
        """Return the tokens that end an answer."""
        end = self.renderer.end_of_turn if self.renderer else None
        found = [self.tokenizer.convert_tokens_to_ids(end)] if end else []
        found.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def _key(message: Message) -> list[Any]:
    """Return all of a message that tokens depend on, the order of arguments included."""
    if message == Message(message.role, message.content):
        return [message.role, message.content]
    return [
        message.role,
        message.content,
        [[call.name, json.dumps(call.arguments), call.id] for call in message.tool_calls],
        message.reasoning,
        message.tool_call_id,
        message.name,
        message.is_learned,
    ]
