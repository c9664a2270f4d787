"""A data set ready for training: both splits tokenised once, for all clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedllm.config import DataConfig, PartitionConfig
from fedllm.data.rows import Message, Row, Rows, Task
from fedllm.data.selftest import check_prompts
from fedllm.data.tasks import load_rows
from fedllm.data.template import Tokenizer
from fedllm.data.tokens import Encoded, TokenSet
from fedllm.data.writer import Kind, Writer
from fedllm.errors import DataError


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
        DataError: If the data cannot be read, does not fit, is to be streamed, or no row is short
            enough.
    """
    if config.streaming:
        raise DataError(
            "data.streaming: rows that are counted or divided among clients cannot be streamed. "
            "Turn it off, or train centrally with a number of steps"
        )
    rows = load_rows(config, seed, partition=partition)
    kind = kind if isinstance(kind, str) else kind(rows.task)
    writer = Writer.for_task(config, tokenizer, rows.task, kind, template)
    train, kept_train, lost_train, short_train = _split(writer, rows, "training")
    test, kept_test, lost_test, short_test = _split(writer, rows, "test")
    dropped = Counter(rows.dropped) + lost_train + lost_test
    return Dataset(
        task=rows.task,
        train=train,
        test=test,
        label_names=rows.label_names,
        rows=replace(rows, train=kept_train, test=kept_test),
        dropped=dict(dropped),
        truncated=short_train + short_test,
        stop_ids=writer.stop_ids(),
        source=rows.source,
    )


def _split(
    writer: Writer, rows: Rows, name: Literal["training", "test"]
) -> tuple[TokenSet, tuple[Row, ...], Counter[str], int]:
    """Return a split's tokens, the rows behind them, why rows are dropped, and how many are cut."""
    split = rows.train if name == "training" else rows.test
    made, worse = writer.encode_split(split, is_test=name == "test")
    writer.refuse(made, split, name)
    kept = tuple(split[i] for i in made.kept.tolist())
    if not kept:
        raise DataError(
            f"{rows.source}: no {name} row is within data.max_length "
            f"{writer.config.max_length}. Raise it, or set data.overlong: truncate"
        )
    tokens = _token_set(made, kept, writer.conversations(kept), rows.label_names)
    truncated = made.truncated
    if worse is not None:
        talks = writer.conversations(kept, "rejected")
        tokens = replace(tokens, rejected=_token_set(worse, kept, talks, ()))
        truncated = truncated | worse.truncated
    if rows.task == "rated":
        tokens = replace(tokens, desirable=np.array([row.is_desirable for row in kept], np.bool_))
    dropped = Counter({"refused by the chat template": len(made.refused)})
    dropped["overlong"] = len(split) - len(kept) - len(made.refused)
    check_prompts(writer, made, kept)
    return tokens, kept, dropped, int(truncated.sum())


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
