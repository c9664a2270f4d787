"""A data set ready for training: both splits tokenised once, for all clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedllm.config import DataConfig, PartitionConfig
from fedllm.data.cache import cached, fingerprint, key_of
from fedllm.data.overlong import Limits
from fedllm.data.render import Renderer, make_renderer
from fedllm.data.rows import Message, Row, Rows, Task
from fedllm.data.tasks import load_rows
from fedllm.data.template import Tokenizer, chat_template
from fedllm.data.tokenise import encode_conversations, encode_for_classes, encode_texts
from fedllm.data.tokens import Encoded, TokenSet
from fedllm.errors import DataError

Kind = Literal["causal-lm", "sequence-classification"]


@dataclass(frozen=True)
class Dataset:
    """Both splits of a data set, tokenised."""

    task: Task
    train: TokenSet
    test: TokenSet
    label_names: tuple[str, ...]
    """Class names in the order of their ids; empty unless the task is classification."""
    rows: Rows
    """The rows behind `train` and `test`, in the same order: row i was made into tokens i."""
    dropped: Mapping[str, int]
    """Why rows of either split are not used, and how many."""
    truncated: int
    """How many rows of both splits were shortened."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer: end of turn and end of text."""
    source: str
    """Where the rows come from, in one line."""


def load_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    kind: Kind | Callable[[Task], Kind],
    seed: int,
    template: str = "auto",
    partition: PartitionConfig | None = None,
) -> Dataset:
    """Read, recognise, render and tokenise a data set.

    Args:
        config: Where the data is and how to read it.
        tokenizer: Not modified.
        kind: A causal language model gets conversations (the label as the answer), a
            classification head the text alone. A function decides by the task.
        seed: Decides which rows are held out and, with `max_train_rows`, used.
        template: `auto` (the tokenizer's own, else `plain`), a fallback's name or a file.
        partition: Its `by` names a column that rows must carry.

    Raises:
        DataError: If the data cannot be read, does not fit, or no row is short enough.
    """
    rows = load_rows(config, seed, partition=partition)
    kind = kind if isinstance(kind, str) else kind(rows.task)
    writer = _Writer.for_task(config, tokenizer, rows.task, kind, template)
    train, kept_train, short_train = _split(writer, rows, "training")
    test, kept_test, short_test = _split(writer, rows, "test")
    dropped = len(rows.train) + len(rows.test) - len(kept_train) - len(kept_test)
    return Dataset(
        task=rows.task,
        train=train,
        test=test,
        label_names=rows.label_names,
        rows=replace(rows, train=kept_train, test=kept_test),
        dropped={"overlong": dropped} if dropped else {},
        truncated=short_train + short_test,
        stop_ids=writer.stop_ids(),
        source=rows.source,
    )


@dataclass(frozen=True)
class _Writer:
    """How the rows of one task become tokens for one kind of model."""

    config: DataConfig
    tokenizer: Tokenizer
    renderer: Renderer | None
    """Writes conversations; None where rows stay plain text."""
    kind: Kind
    fingerprint: str | None
    """Of the tokenizer; None where tokens are not cached."""

    @classmethod
    def for_task(
        cls, config: DataConfig, tokenizer: Tokenizer, task: Task, kind: Kind, template: str
    ) -> _Writer:
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
            fingerprint(tokenizer) if config.cache else None,
        )

    def conversations(self, rows: Sequence[Row]) -> list[tuple[Message, ...]]:
        """Return what is written for each row; empty where rows stay plain text."""
        if self.renderer is None:
            return [()] * len(rows)
        return [_conversation(row, self.config.system_prompt) for row in rows]

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Tokenise, or take from the cache."""
        limits = Limits(self.config.max_length, self.config.overlong)
        wheres = [row.where for row in rows]
        texts = [row.text or "" for row in rows]
        talks = self.conversations(rows)

        def make() -> Encoded:
            if self.renderer is not None:
                return encode_conversations(self.renderer, talks, wheres, limits)
            if self.kind == "causal-lm":
                return encode_texts(self.tokenizer, texts, wheres, limits)
            return encode_for_classes(self.tokenizer, texts, wheres, limits)

        if self.fingerprint is None:
            return make()
        template = self.renderer.template if self.renderer else None
        contents = [[(m.role, m.content) for m in talk] for talk in talks] if template else texts
        settings = [self.kind, template, limits.max_length, limits.overlong]
        return cached(key_of([self.fingerprint, settings, contents]), make)

    def stop_ids(self) -> tuple[int, ...]:
        """Return the tokens that end an answer."""
        end = self.renderer.end_of_turn if self.renderer else None
        found = [self.tokenizer.convert_tokens_to_ids(end)] if end else []
        found.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def _conversation(row: Row, system_prompt: str | None) -> tuple[Message, ...]:
    messages = row.messages
    if row.text is not None:
        messages = (Message("user", row.text), Message("assistant", row.answer))
    if system_prompt and not any(message.role == "system" for message in messages):
        messages = (Message("system", system_prompt), *messages)
    return messages


def _split(
    writer: _Writer, rows: Rows, name: Literal["training", "test"]
) -> tuple[TokenSet, tuple[Row, ...], int]:
    """Return a split's tokens, the rows behind them, and how many of them were shortened."""
    split = rows.train if name == "training" else rows.test
    made = writer.encode(split)
    kept = tuple(split[i] for i in made.kept.tolist())
    if not kept:
        raise DataError(
            f"{rows.source}: no {name} row is within data.max_length "
            f"{writer.config.max_length}. Raise it, or set data.overlong: truncate"
        )
    tokens = _token_set(made, kept, writer.conversations(kept), rows.label_names)
    return tokens, kept, int(made.truncated)


def _token_set(
    made: Encoded,
    rows: Sequence[Row],
    talks: Sequence[Sequence[Message]],
    label_names: Sequence[str],
) -> TokenSet:
    ids = {name: number for number, name in enumerate(label_names)}
    labels = [ids[row.label] for row in rows if row.label is not None] if ids else None
    groups = [row.group for row in rows if row.group is not None]
    answers = [
        talk[i].content if talk else row.answer
        for i, talk, row in zip(made.answers.tolist(), talks, rows, strict=True)
    ]
    return TokenSet(
        tokens=made.tokens,
        supervised=made.supervised,
        offsets=made.offsets,
        prompt_lengths=made.prompt_lengths,
        labels=None if labels is None else np.array(labels, np.int64),
        groups=tuple(groups) if len(groups) == len(rows) else None,
        references=tuple(answers),
    )
