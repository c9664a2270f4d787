"""Parquet files of traces: rows as they are, or millions of windows straight into flat arrays."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedllm.errors import DataError
from fedllm.system.traces.window_trace import WindowTrace, compact, first_wrong

if TYPE_CHECKING:
    from fedllm.system.traces.own_format import Record

_HEADER = b"fedllm-trace"
_NUMBERS = (
    *("t0_s", "t1_s", "flops_per_s", "relative_speed", "memory_bytes"),
    *("up_bps", "down_bps", "rtt_s", "loss"),
)
_ROW = {"client": "string", "kind": "string", "t0_s": "double", "t1_s": "double"}
_KINDS = ("window", "coverage", "capacity", "link")
_BATCH = 100_000


def read_columns(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the header and the rows of a file.

    Raises:
        DataError: If it is no Parquet file.
    """
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from None
    rows: list[dict[str, Any]] = table.to_pylist()
    return _header(table.schema.metadata), rows


def write_columns(path: Path, header: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file, some rows at a time."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    schema = arrow.schema(
        [("client", arrow.string()), ("kind", arrow.string())]
        + [(name, arrow.float64()) for name in _NUMBERS],
        metadata={_HEADER: json.dumps(header)},
    )
    left = iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while part := list(islice(left, _BATCH)):
            writer.write_table(arrow.Table.from_pylist(part, schema=schema))


def fast_trace(path: Path, head: Callable[[dict[str, Any]], Record]) -> WindowTrace | None:
    """Read the windows of a file that is in order; None if it must be gone through row by row.

    Args:
        path: A Parquet file.
        head: Makes a record without rows of a header.

    Raises:
        DataError: If it is no Parquet file, or its header is not ours.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from None
    record = head(_header(file.schema_arrow.metadata))
    types = {field.name: str(field.type) for field in file.schema_arrow}
    if record.unknown == "available" or _ROW.items() - types.items():
        return None
    places: dict[str, int] = {}
    count, filled = file.metadata.num_rows, 0
    # in one piece each, which goes back to the system as a whole
    whole = _Rows(*(np.empty(count, kind) for kind in (np.int32, float, float, bool)))
    for batch in file.iter_batches(columns=list(_ROW), batch_size=_BATCH):
        part = _Rows.of(batch, places, record.span_s)
        if part is None:
            return None
        for column, new in zip(whole, part, strict=True):
            column[filled : filled + len(new)] = new
        filled += len(part.owners)
    arrow.default_memory_pool().release_unused()
    return _Rows(*(column[:filled] for column in whole)).trace(list(places), record)


class _Rows(NamedTuple):
    """Windows and coverages of clients 0, 1, 2, ... in any order."""

    owners: np.ndarray
    lows: np.ndarray
    highs: np.ndarray
    is_window: np.ndarray

    @classmethod
    def of(cls, batch: Any, places: dict[str, int], span_s: float) -> _Rows | None:
        """Return the windows and coverages of some rows; None if a row is wrong.

        Args:
            batch: The rows.
            places: Client to its number; those that are new get the next ones.
            span_s: What the trace covers.
        """
        kinds = batch.column("kind").dictionary_encode()
        names = kinds.dictionary.to_pylist()
        if batch.column("client").null_count or kinds.null_count or not {*names} <= {*_KINDS}:
            return None
        is_kept = np.array([name in _KINDS[:2] for name in names], bool)[kinds.indices.to_numpy()]
        is_window = np.array([name == "window" for name in names], bool)[kinds.indices.to_numpy()]
        kept = batch.filter(is_kept)
        clients = kept.column("client").dictionary_encode()
        told = [places.setdefault(name, len(places)) for name in clients.dictionary.to_pylist()]
        lows, highs = (
            kept.column(name).to_numpy(zero_copy_only=False) for name in ("t0_s", "t1_s")
        )
        if not ((lows >= 0) & (lows < highs) & (highs <= span_s)).all():
            return None
        owners = np.array(told, np.int32)[clients.indices.to_numpy()]
        return cls(owners, lows, highs, is_window[is_kept])

    def trace(self, names: list[str], record: Record) -> WindowTrace | None:
        """Return the trace; None if windows have to be merged, or lie outside of coverages."""
        starts, ends = np.zeros(len(names)), np.full(len(names), record.span_s)
        covered = self.owners[~self.is_window]
        starts[covered], ends[covered] = self.lows[~self.is_window], self.highs[~self.is_window]
        owners, opens, closes = (
            part[self.is_window] if covered.size else part for part in self[:3]
        )
        if (np.diff(owners) < 0).any() or (np.diff(opens)[np.diff(owners) == 0] < 0).any():
            order = np.lexsort((opens, owners))
            owners, opens, closes = owners[order], opens[order], closes[order]
        offsets = np.zeros(len(names) + 1, np.int64)
        np.cumsum(np.bincount(owners, minlength=len(names)), out=offsets[1:])
        if covered.size and ((opens < starts[owners]) | (closes > ends[owners])).any():
            return None
        if first_wrong(opens, closes, offsets) is not None:
            return None
        if not record.wraps:
            starts, periods = np.zeros(len(names)), np.full(len(names), math.inf)
        elif record.unknown == "wrap":
            periods = ends - starts
        else:
            starts, periods = np.zeros(len(names)), np.full(len(names), record.span_s)
        arrays = compact(opens), compact(closes), offsets, starts, periods
        return WindowTrace(names, *arrays, record.span_s, record.source)


def _header(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    try:
        found = json.loads((metadata or {}).get(_HEADER, b""))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
