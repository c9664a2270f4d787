"""A pass: sequences of several clients laid out end to end, or padded for models that need it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Segment(NamedTuple):
    """A stretch of rows of an activation that belongs to one client."""

    row: int
    """Row of the client in the cohort's buffers."""
    start: int
    end: int


class Run(NamedTuple):
    """Consecutive sequences of one length: attention treats them as a batch."""

    start: int
    """First token of the first sequence."""
    sequences: int
    """How many there are."""
    length: int
    """Tokens of each."""

    @property
    def tokens(self) -> int:
        """Tokens of all."""
        return self.sequences * self.length


@dataclass(frozen=True)
class Sequences:
    """What one pass works on, in the order in which it is laid out."""

    tokens: np.ndarray
    """int (T,): token ids of all sequences, end to end."""
    lengths: np.ndarray
    """int (N,): tokens of each sequence."""
    rows: np.ndarray
    """int (N,): row of the owning client, non-decreasing."""
    supervised: np.ndarray
    """bool (T,): whether the token is predicted in the loss."""
    classes: np.ndarray | None
    """int (N,): class of each sequence, for classification."""

    @property
    def starts(self) -> np.ndarray:
        """First token of each sequence, int (N,)."""
        return np.asarray(np.cumsum(self.lengths) - self.lengths)


def segments(rows: np.ndarray, sizes: np.ndarray) -> list[Segment]:
    """Return the stretches of equal `rows`, measured in `sizes`."""
    ends = np.cumsum(sizes)
    edges = np.flatnonzero(np.diff(rows)) + 1
    firsts = np.concatenate([[0], edges])
    lasts = np.concatenate([edges, [len(rows)]]) - 1
    return [
        Segment(int(rows[f]), int(ends[f] - sizes[f]), int(ends[last]))
        for f, last in zip(firsts, lasts, strict=True)
    ]


def runs(lengths: np.ndarray) -> list[Run]:
    """Return the runs of consecutive sequences of equal length."""
    found = segments(lengths, lengths)
    return [Run(s.start, (s.end - s.start) // s.row, s.row) for s in found]


class Packing:
    """Where the sequences of a pass are, as attention needs it.

    Args:
        lengths: int (N,): tokens of each sequence.
        device: Where the activations are.
        is_one_batch: Whether attention pads all sequences into one batch.
    """

    def __init__(self, lengths: np.ndarray, device: torch.device, *, is_one_batch: bool) -> None:
        self.runs = runs(lengths)
        self.is_one_batch = is_one_batch
        self._lengths, self._device = lengths, device

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self._lengths.max())

    @cached_property
    def is_token(self) -> Tensor:
        """Whether a place of the padded batch holds a token, bool (N, L)."""
        place = np.arange(int(self._lengths.max()))
        return torch.from_numpy(place[None, :] < self._lengths[:, None]).to(self._device)

    @cached_property
    def index(self) -> Tensor:
        """Token of each place of the padded batch, int (N, L); padding repeats the last one."""
        starts = np.cumsum(self._lengths) - self._lengths
        place = np.minimum(np.arange(int(self._lengths.max()))[None, :], self._lengths[:, None] - 1)
        return torch.from_numpy(starts[:, None] + place).to(self._device)


def positions(lengths: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... restarting at each sequence, int (T,)."""
    starts = np.cumsum(lengths) - lengths
    return np.asarray(np.arange(int(lengths.sum())) - np.repeat(starts, lengths))


def predicted(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions whose next token is supervised, and the sequence each belongs to."""
    target = np.flatnonzero(sequences.supervised & (positions(sequences.lengths) > 0))
    owner = np.repeat(np.arange(len(sequences.lengths)), sequences.lengths)[target]
    return target - 1, owner


def padded(sequences: Sequences, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids (N, L) padded on the right, and the attention mask (N, L)."""
    longest = int(sequences.lengths.max())
    mask = np.arange(longest)[None, :] < sequences.lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = sequences.tokens
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask.astype(np.int64)).to(device)


def split(
    lengths: np.ndarray, rows: np.ndarray, tokens_per_pass: int, *, is_padded: bool = False
) -> Iterator[np.ndarray]:
    """Divide sequences into passes of at most `tokens_per_pass` tokens (at least one sequence).

    Within a pass sequences are ordered by client, then by length, so that equal lengths meet; when
    padded, passes are cut by length first, so that little is padded.

    Yields:
        Indices of the sequences of each pass, int (n,).
    """
    order = np.lexsort((lengths, rows)) if not is_padded else np.lexsort((rows, lengths))
    begin, longest, total = 0, 0, 0
    for end, index in enumerate(order):
        length = int(lengths[index])
        longest, total = max(longest, length), total + length
        size = longest * (end - begin + 1) if is_padded else total
        if end > begin and size > tokens_per_pass:
            yield _by_client(order[begin:end], lengths, rows)
            begin, longest, total = end, length, length
    if len(order):
        yield _by_client(order[begin:], lengths, rows)


def _by_client(chosen: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return chosen[np.lexsort((lengths[chosen], rows[chosen]))]
