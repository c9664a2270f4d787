"""Several sources into one stream of rows: one after another, or drawn in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np

from fedllm.errors import DataError

Mix = Literal["concat", "interleave-under", "interleave-over"]
Item = TypeVar("Item")

_END = object()


def mixed(
    sources: Sequence[Callable[[], Iterator[Item]]],
    how: Mix,
    *,
    weights: Sequence[float] | None,
    generator: np.random.Generator,
) -> Iterator[Item]:
    """Mix sources of unknown length, holding one row of each.

    Args:
        sources: Each opens one source from its start.
        how: `concat` gives each whole; `interleave-under` ends when the first source runs out;
            `interleave-over` when the last one does, the others starting again.
        weights: How often each is drawn when interleaving; None takes them in turn.
        generator: Draws, if there are weights.

    Raises:
        DataError: If a source is empty.
    """
    if how == "concat":
        for open_source in sources:
            yield from open_source()
        return
    heads = [_Head(open_source, number) for number, open_source in enumerate(sources, start=1)]
    ends = any if how == "interleave-under" else all
    for number in _order(len(heads), weights, generator):
        if number is None:  # a lap is complete
            if ends(head.is_through for head in heads):
                return
            continue
        yield heads[number].take()
        if weights is not None and ends(head.is_through for head in heads):
            return


class _Head:
    """The next row of a source that starts again when it is through."""

    def __init__(self, open_source: Callable[[], Iterator[Item]], number: int) -> None:
        self._open = open_source
        self._rows: Iterator[object] = iter(open_source())
        self._next = next(self._rows, _END)
        if self._next is _END:
            raise DataError(f"data.path: source {number} has no rows to mix. Take it out")
        self.is_through = False
        """Whether all its rows were taken at least once."""

    def take(self) -> Item:  # type: ignore[type-var]  # of the source's own kind
        taken = self._next
        self._next = next(self._rows, _END)
        if self._next is _END:
            self.is_through = True
            self._rows = iter(self._open())
            self._next = next(self._rows)
        return taken  # type: ignore[return-value]  # never the mark of the end


def _order(
    count: int, weights: Sequence[float] | None, generator: np.random.Generator
) -> Iterator[int | None]:
    """Return without end which source is next; None after each lap of those in turn."""
    if weights is None:
        while True:
            yield from range(count)
            yield None
    shares = np.asarray(weights, np.float64) / sum(weights)
    while True:
        yield from generator.choice(count, size=256, p=shares).tolist()
