"""Training rows that are read while training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
from datasets import IterableDataset
from datasets.iterable_dataset import ExamplesIterable

from fedllm.central.examples import IGNORED
from fedllm.config import CentralConfig
from fedllm.data.stream import stream_rows

_REMEMBERED = 10_000


class Stream:
    """An endless row of examples, the same one for the same seed.

    Args:
        config: The checked configuration.
        tokenizer: Not modified.
    """

    def __init__(self, config: CentralConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._known: dict[int, tuple[int, str]] = {}

    def examples(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield number and example, pass after pass over the rows, from the beginning."""
        number = 0
        for epoch in count():
            for one in stream_rows(
                self.config.data,
                self.tokenizer,
                seed=self.config.seed,
                template=self.config.model.chat_template,
                epoch=epoch,
            ):
                labels = np.where(one.supervised, one.tokens, IGNORED)
                self._known[number] = (len(one.tokens), one.row.where)
                self._known.pop(number - _REMEMBERED, None)
                yield (
                    number,
                    {
                        "input_ids": one.tokens.tolist(),
                        "labels": labels.tolist(),
                        "rows": [number],
                    },
                )
                number += 1

    def table(self) -> Any:
        """Return the examples as a trainer takes them."""
        return IterableDataset(ExamplesIterable(self.examples, {}))

    def tokens_in(self, rows: Sequence[int]) -> int:
        """Return how many tokens some of the latest rows have."""
        return sum(self._known.get(row, (0, ""))[0] for row in rows)

    def where(self, row: int) -> str:
        """Name a row: where it stands."""
        return self._known.get(row, (0, f"row {row} of the stream"))[1]
