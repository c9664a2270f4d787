"""Clients' training rows: one flat token set for all, and an index slice for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedllm.engine.examples import Examples
from fedllm.engine.packing import Sequences
from fedllm.federation import Objective

if TYPE_CHECKING:
    from fedllm.data import Partition, TokenSet


@dataclass(frozen=True)
class Shards:
    """The training rows of every client; a client costs two integers, a row one."""

    examples: Examples
    partition: Partition
    entries: np.ndarray
    """int (rows,): terms that each row adds to the loss."""

    @classmethod
    def of(cls, tokens: TokenSet, partition: Partition, kind: str, objective: Objective) -> Shards:
        """Count the loss terms of each row: supervised tokens, or one class, pair or rating."""
        examples = Examples.of(tokens, objective)
        is_by_token = objective == "sft"
        entries = loss_entries(tokens, kind) if is_by_token else np.ones(len(tokens), np.int64)
        return cls(examples, partition, entries)

    def rows(self, cid: int) -> np.ndarray:
        """Return the training rows of a client."""
        return self.partition.train(cid)


def loss_entries(tokens: TokenSet, kind: str) -> np.ndarray:
    """Return how many terms each row adds to the loss, int (rows,).

    A row's first token is never predicted: nothing comes before it.
    """
    if kind != "causal-lm":
        return np.ones(len(tokens), dtype=np.int64)
    flags = tokens.supervised.copy()
    flags[tokens.offsets[:-1][tokens.lengths > 0]] = False
    total = np.concatenate([[0], np.cumsum(flags)])
    return np.asarray(total[tokens.offsets[1:]] - total[tokens.offsets[:-1]])


def collect(
    tokens: TokenSet, chosen: np.ndarray, owners: np.ndarray, *, is_prompt: bool = False
) -> Sequences:
    """Copy the chosen rows of a token set into one pass.

    Args:
        tokens: All rows.
        chosen: int (N,): rows in the order of the pass.
        owners: int (N,): the client of each, non-decreasing.
        is_prompt: Take the prompts alone.
    """
    begin = tokens.offsets[chosen]
    lengths = tokens.offsets[chosen + 1] - begin
    if is_prompt:
        lengths = np.maximum(tokens.prompt_lengths[chosen].astype(lengths.dtype), 1)
    index = np.repeat(begin - (np.cumsum(lengths) - lengths), lengths)
    index += np.arange(int(lengths.sum()))
    classes = None if tokens.labels is None else tokens.labels[chosen]
    return Sequences(tokens.tokens[index], lengths, owners, tokens.supervised[index], classes)
