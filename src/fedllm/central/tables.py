"""Tables of token rows that trainers cannot change: they are tokenised already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable


class Settled(Dataset):  # type: ignore[misc]  # datasets is untyped
    """A data set that stays as it is when a trainer would tokenise it."""

    def map(self, *_: Any, **__: Any) -> Settled:
        """Return the rows as they are."""
        return self


def flat(**columns: tuple[npt.NDArray[Any], npt.NDArray[Any]]) -> Settled:
    """Return lists of numbers, given as values and offsets, without a copy of each row."""
    return _settled(
        {
            name: pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))
            for name, (values, offsets) in columns.items()
        }
    )


def listed(columns: Mapping[str, Sequence[Any]]) -> Settled:
    """Return columns that are given as Python lists."""
    return _settled({name: pa.array(list(values)) for name, values in columns.items()})


def _settled(arrays: Mapping[str, Any]) -> Settled:
    # with a name of its own nothing is hashed
    return Settled(InMemoryTable(pa.table(dict(arrays))), fingerprint="fedllm")
