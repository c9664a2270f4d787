"""Files to records: JSON, JSONL, CSV, TSV and Parquet, each fault with its file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedllm.data.faults import RowFault
from fedllm.data.rows import Record
from fedllm.errors import DataError, did_you_mean


def read_file(path: Path) -> list[Record]:
    """Do as `iter_file`, for the whole file at once."""
    return list(iter_file(path))


def iter_file(path: Path) -> Iterator[Record]:
    """Read row by row, whatever the columns; a row that cannot be read is a fault.

    All but JSON and TSV are read as rows are asked for.

    Args:
        path: A file whose ending is one of `SUFFIXES`.

    Raises:
        DataError: If the file is missing, unreadable, empty, or not what its ending says.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: cannot read a '{path.suffix}' file. Convert it to one of: "
            f"{', '.join(SUFFIXES)}"
        )
    try:
        is_empty = True
        for record in reader(path):
            is_empty = False
            yield record
    except FileNotFoundError:
        raise DataError(missing(path)) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if is_empty:
        raise DataError(f"{path}: the file has no rows. Give a file with at least one row")


def missing(path: Path) -> str:
    """Return the sentence for a path that does not exist, with the nearest name beside it."""
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"{path}: there is no such file.{did_you_mean(path.name, beside)} Check the path"


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                what = f"not JSON: {error.msg} at column {error.colno}"
                yield where, RowFault("not JSON", what, "Each line must be one JSON object")
            else:
                yield where, _mapping(row)


def _json(path: Path) -> Iterator[Record]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under a .json name are common
            yield from _jsonl(path)
            return
        raise DataError(
            f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from None
    if isinstance(tree, dict) and isinstance(tree.get("data"), list):
        tree = tree["data"]
    if isinstance(tree, dict):
        tree = [tree]  # a JSON lines file of one line
    if not isinstance(tree, list):
        raise DataError(
            f"{path}: the top level must be a list of objects or {{'data': [...]}}, "
            f"not a {type(tree).__name__}"
        )
    for number, row in enumerate(tree, start=1):
        where = f"{path.name}: row {number}"
        yield where, _mapping(row)


def _mapping(row: Any) -> Mapping[str, Any] | RowFault:
    if isinstance(row, dict):
        return row
    kind = type(row).__name__
    return RowFault(
        "no object", f"a row must be an object with named columns, not a {kind}", "Name its columns"
    )


def _csv(path: Path) -> Iterator[Record]:
    return _separated(path, ",")


def _tsv(path: Path) -> Iterator[Record]:
    """Read tab-separated lines, in which a quotation mark is usually just a quotation mark."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    table = [
        (number, [_unquote(cell) for cell in line.removesuffix("\r").split("\t")])
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if len({len(cells) for _, cells in table}) > 1:  # quoted cells that hold tabs or line ends
        return _separated(path, "\t")
    return _table(path, table)


def _separated(path: Path, separator: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of 128 kB
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=separator, strict=True)
        try:
            yield from _table(path, ((reader.line_num, cells) for cells in reader))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: quotes do not match: {error}") from None


def _unquote(cell: str) -> str:
    """Take off quotes that enclose the whole cell, the way spreadsheets write them."""
    inner = cell[1:-1]
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def _table(path: Path, lines: Iterable[tuple[int, list[str]]]) -> Iterator[Record]:
    header: list[str] = []
    for number, cells in lines:
        if not cells:
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            continue
        if len(cells) != len(header):
            yield (
                f"{path.name}:{number}",
                RowFault(
                    "wrong number of fields",
                    f"{len(cells)} fields where the header has {len(header)}",
                    "Mend the line, or quote the field that holds the separator",
                ),
            )
            continue
        yield f"{path.name}:{number}", dict(zip(header, cells, strict=True))


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}: row {number}", row
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path}: not Parquet: {error}") from None


def _txt(path: Path) -> Iterator[Record]:
    """Read a text for each line that is not blank."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path.name}:{number}", {"text": line.rstrip("\n")}


_READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _txt,
}
SUFFIXES = tuple(_READERS)
"""Endings of the files that can be read."""
