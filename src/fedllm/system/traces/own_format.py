"""Our own format: one row a window, in JSON lines or Parquet, with a header that says the rest.

    {"format": "fedllm-trace", "version": 1, "span_s": 86400, "wraps": true, "unknown": "wrap",
     "origin": "2020-01-06T00:00:00+00:00", "source": "..."}
    {"client": "a", "kind": "window", "t0_s": 0, "t1_s": 3600}
    {"client": "a", "kind": "coverage", "t0_s": 0, "t1_s": 86400}
    {"client": "a", "kind": "capacity", "flops_per_s": 2e12, "memory_bytes": 4e9}
    {"client": "a", "kind": "link", "up_bps": 5e6, "down_bps": 2e7, "rtt_s": 0.05, "loss": 0.01}

Only `format` and `span_s` are needed in a header, which is one line. A client of whom no window is
told is never there; `coverage` is the stretch in which something is known of a client, all of
`span_s` where it is not told, and `unknown` says what holds outside of it. `origin` is the time and
the time zone of second 0. A capacity may be a `relative_speed` instead, 1 for the median. In
Parquet the header is the metadata of the schema, under `fedllm-trace`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from fedllm.errors import ConfigError, DataError
from fedllm.system.traces.columns import fast_trace, read_columns, write_columns
from fedllm.system.traces.problems import Problems
from fedllm.system.traces.window_trace import Unknown, Window, WindowTrace

FORMAT, VERSION = "fedllm-trace", 1
_HEAD = ("span_s", "wraps", "unknown", "origin", "source")
_COLUMNS = {
    "window": ("t0_s", "t1_s"),
    "coverage": ("t0_s", "t1_s"),
    "capacity": ("flops_per_s", "relative_speed", "memory_bytes"),
    "link": ("up_bps", "down_bps", "rtt_s", "loss"),
}


@dataclass
class Record:
    """All that a trace file tells."""

    span_s: float
    wraps: bool = True
    source: str = ""
    unknown: Unknown = "wrap"
    """What holds outside of a client's coverage; see `WindowTrace.of`."""
    origin: str = ""
    """Time and time zone of second 0, in ISO 8601; empty if it is not known."""
    windows: dict[str, list[Window]] = field(default_factory=dict)
    coverage: dict[str, Window] = field(default_factory=dict)
    capacities: dict[str, dict[str, float]] = field(default_factory=dict)
    """Client to `flops_per_s` or `relative_speed` (1 is the median), and `memory_bytes`."""
    links: dict[str, dict[str, float]] = field(default_factory=dict)
    """Client to `up_bps`, `down_bps` and, if known, `rtt_s` and `loss`."""

    def trace(self) -> WindowTrace:
        """Return the windows, ready to be asked."""
        return WindowTrace.of(
            self.windows,
            self.span_s,
            wraps=self.wraps,
            coverage=self.coverage,
            unknown=self.unknown,
            source=self.source,
        )

    def header(self) -> dict[str, Any]:
        """Return the header of the file."""
        names = ("span_s", "wraps", "unknown", "origin", "source")
        return {"format": FORMAT, "version": VERSION} | {
            name: getattr(self, name) for name in names
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the file."""
        for client, (low, high) in self.coverage.items():
            yield {"client": client, "kind": "coverage", "t0_s": low, "t1_s": high}
        for client, windows in self.windows.items():
            for low, high in windows:
                yield {"client": client, "kind": "window", "t0_s": low, "t1_s": high}
        for kind, table in (("capacity", self.capacities), ("link", self.links)):
            for client, values in table.items():
                yield {"client": client, "kind": kind, **values}

    def take(self, row: Mapping[str, Any]) -> str:
        """Take in a row; return what is wrong with it, or nothing."""
        kind, client = row.get("kind"), row.get("client")
        if kind not in _COLUMNS:
            return f"kind {kind!r} is none of {', '.join(_COLUMNS)}"
        if not isinstance(client, (str, int)) or isinstance(client, bool):
            return "client must be text or a whole number"
        values = {name: row[name] for name in _COLUMNS[kind] if row.get(name) is not None}
        for name, value in values.items():
            if not _is_number(value) or value < 0:
                return f"{name} must be a number of 0 or more, not {str(value)[:40]!r}"
        name = str(client)
        if kind in ("window", "coverage"):
            if len(values) < 2 or values["t0_s"] >= values["t1_s"]:
                return "needs t0_s and t1_s, with t0_s before t1_s"
            if values["t1_s"] > self.span_s:
                return f"t1_s is {values['t1_s']}, beyond the header's span_s of {self.span_s}"
            span = float(values["t0_s"]), float(values["t1_s"])
            if kind == "window":
                self.windows.setdefault(name, []).append(span)
            else:
                self.coverage[name] = span
                self.windows.setdefault(name, [])
        elif not values:
            return f"needs at least one of {', '.join(_COLUMNS[kind])}"
        else:
            (self.capacities if kind == "capacity" else self.links)[name] = values
        return ""

    def strays(self) -> Iterator[tuple[str, str]]:
        """Yield clients that have a window outside of their own coverage, and which."""
        for client, (low, high) in self.coverage.items():
            for open_s, close_s in self.windows[client]:
                if open_s < low or close_s > high:
                    yield client, f"{open_s} to {close_s} s is not in its coverage, {low} to {high}"


def read_trace(path: Path) -> WindowTrace:
    """Read the windows of a trace in our own format.

    Raises:
        ConfigError: If it is not there, or not in our format, or a line of it is wrong.
    """
    where = "system.availability.path"
    if path.suffix == ".parquet" and path.is_file():
        try:
            # millions of windows, and nothing to tell of them
            found = fast_trace(path, lambda header: _head(path, header))
        except DataError as error:
            raise ConfigError([f"{where}: {error}"]) from None
        if found is not None:
            return found
    return recorded(path, where).trace()


def recorded(path: Path, where: str) -> Record:
    """Read a trace that a configuration names, without a line that is wrong.

    Raises:
        ConfigError: If it is not there, or not in our format; it names the setting.
    """
    try:
        record, problems = read_record(path)
        problems.check(0.0)
    except DataError as error:
        raise ConfigError([f"{where}: {error}"]) from None
    return record


def read_record(path: Path) -> tuple[Record, Problems]:
    """Read a trace in our own format, and what is wrong with its lines.

    Raises:
        DataError: If the file is not there, or its header is not ours.
    """
    if not path.is_file():
        raise DataError(f"there is no trace {path}; check the path")
    problems = Problems(path)
    if path.suffix == ".parquet":
        header, listed = read_columns(path)
        rows: Iterable[tuple[int, dict[str, Any]]] = enumerate(listed, start=1)
    else:
        header, rows = _lines(path, problems)
    record = _head(path, header)
    for number, row in rows:
        problems.lines += 1
        if reason := record.take(row):
            problems.add(number, reason)
    for client, reason in record.strays():
        problems.add(f"client {client}", reason)
    return record, problems


def _head(path: Path, header: Mapping[str, Any]) -> Record:
    """Return a record without rows, as a header says."""
    if header.get("format") != FORMAT:
        raise DataError(
            f"{path} is not in our format (no header with format: {FORMAT}). Traces of other"
            " programs become ours with: fedllm trace import FILE --to OUT.jsonl"
        )
    if header.get("version", VERSION) != VERSION:
        raise DataError(f"{path} is of version {header['version']}; this fedllm reads {VERSION}")
    told = {name: header[name] for name in _HEAD if name in header}
    record = Record(**{"span_s": None} | told)
    if not _is_number(record.span_s) or record.span_s <= 0:
        raise DataError(f"{path}: span_s must be seconds above 0, not {record.span_s!r}")
    if not isinstance(record.wraps, bool):
        raise DataError(f"{path}: wraps must be true or false, not {record.wraps!r}")
    if record.unknown not in get_args(Unknown):
        wanted = ", ".join(get_args(Unknown))
        raise DataError(f"{path}: unknown must be one of {wanted}, not {record.unknown!r}")
    record.span_s = float(record.span_s)
    return record


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def _lines(
    path: Path, problems: Problems
) -> tuple[dict[str, Any], Iterator[tuple[int, dict[str, Any]]]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = _object(next(lines, "")) or {}

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if number > 1 and line.strip():
                    row = _object(line)
                    if row is None:
                        problems.lines += 1
                        problems.add(number, "not a JSON object")
                    else:
                        yield number, row

    return first, rows()


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_record(record: Record, path: Path) -> None:
    """Write a trace in our own format, as the suffix says: `.jsonl` or `.parquet`.

    Raises:
        DataError: If a file is there already, or cannot be, or the suffix is another.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: a trace is written as .jsonl or .parquet; choose one of them")
    make_way(path)
    if path.suffix == ".parquet":
        write_columns(path, record.header(), record.rows())
        return
    with path.open("w", encoding="utf-8") as out:
        for row in chain([record.header()], record.rows()):
            out.write(json.dumps(row) + "\n")


def make_way(path: Path) -> None:
    """Make the folder of a file that is to be written.

    Raises:
        DataError: If the file is there already, or its folder cannot be written to.
    """
    if path.exists():
        raise DataError(f"{path} exists, and nothing is overwritten; choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder of {path} cannot be made: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path.parent} may not be written to; choose another folder")
