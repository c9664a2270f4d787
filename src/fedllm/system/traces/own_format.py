"""Our own format: one row a window, in JSON lines or Parquet, with a header that says the rest.

    {"format": "fedllm-trace", "version": 1, "span_s": 86400, "wraps": true, "source": "..."}
    {"client": "a", "kind": "window", "t0_s": 0, "t1_s": 3600}
    {"client": "a", "kind": "coverage", "t0_s": 0, "t1_s": 86400}
    {"client": "a", "kind": "capacity", "relative_speed": 0.5, "memory_bytes": 4e9}
    {"client": "a", "kind": "link", "up_bps": 5e6, "down_bps": 2e7, "rtt_s": 0.05, "loss": 0.01}

A client of whom no window is told is never there; `coverage` is the stretch that a client's own
windows repeat in, all of `span_s` where it is not told. In Parquet the header is the metadata of
the schema, under `fedllm-trace`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm.errors import ConfigError, DataError
from fedllm.system.traces.problems import Problems
from fedllm.system.traces.window_trace import Window, WindowTrace

FORMAT, VERSION = "fedllm-trace", 1
_COLUMNS = {
    "window": ("t0_s", "t1_s"),
    "coverage": ("t0_s", "t1_s"),
    "capacity": ("relative_speed", "memory_bytes"),
    "link": ("up_bps", "down_bps", "rtt_s", "loss"),
}


@dataclass
class Record:
    """All that a trace file tells."""

    span_s: float
    wraps: bool = True
    source: str = ""
    windows: dict[str, list[Window]] = field(default_factory=dict)
    coverage: dict[str, Window] = field(default_factory=dict)
    capacities: dict[str, dict[str, float]] = field(default_factory=dict)
    """Client to `relative_speed` (1 is the median) and, if known, `memory_bytes`."""
    links: dict[str, dict[str, float]] = field(default_factory=dict)
    """Client to `up_bps`, `down_bps` and, if known, `rtt_s` and `loss`."""

    def trace(self) -> WindowTrace:
        """Return the windows, ready to be asked."""
        return WindowTrace.of(
            self.windows,
            self.span_s,
            wraps=self.wraps,
            coverage=self.coverage,
            source=self.source,
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the file."""
        for kind, spans in (("coverage", self.coverage),):
            for client, (low, high) in spans.items():
                yield {"client": client, "kind": kind, "t0_s": low, "t1_s": high}
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
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value < 0:
                return f"{name} must be a number of 0 or more, not {value!r}"
        name = str(client)
        if kind in ("window", "coverage"):
            if len(values) < 2 or values["t0_s"] >= values["t1_s"]:
                return "needs t0_s and t1_s, with t0_s before t1_s"
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


def read_trace(path: Path) -> WindowTrace:
    """Read the windows of a trace in our own format.

    Raises:
        ConfigError: If it is not there, or not in our format.
    """
    return recorded(path, "system.availability.path").trace()


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
    header, rows = _parquet(path) if path.suffix == ".parquet" else _lines(path, problems)
    if header.get("format") != FORMAT or not isinstance(header.get("span_s"), (int, float)):
        raise DataError(
            f"{path} is not in our format (no header with format: {FORMAT} and span_s). Traces of"
            " other programs become ours with: fedllm trace import FILE --to OUT.jsonl"
        )
    if header.get("version", VERSION) != VERSION:
        raise DataError(f"{path} is of version {header['version']}; this fedllm reads {VERSION}")
    record = Record(
        float(header["span_s"]), bool(header.get("wraps", True)), str(header.get("source", ""))
    )
    for number, row in rows:
        problems.lines += 1
        if reason := record.take(row):
            problems.add(number, reason)
    return record, problems


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
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _parquet(path: Path) -> tuple[dict[str, Any], Iterable[tuple[int, dict[str, Any]]]]:
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from None
    header = _object((table.schema.metadata or {}).get(FORMAT.encode(), b"").decode()) or {}
    return header, enumerate(table.to_pylist(), start=1)


def write_record(record: Record, path: Path) -> None:
    """Write a trace in our own format, as the suffix says: `.jsonl` or `.parquet`.

    Raises:
        DataError: If a file is there already, or the suffix is another.
    """
    if path.exists():
        raise DataError(f"{path} exists, and nothing is overwritten; choose another name")
    header = {
        "format": FORMAT,
        "version": VERSION,
        "span_s": record.span_s,
        "wraps": record.wraps,
        "source": record.source,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        lines = (json.dumps(row) for row in (header, *record.rows()))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        _write_parquet(header, list(record.rows()), path)
    else:
        raise DataError(f"{path}: a trace is written as .jsonl or .parquet; choose one of them")


def _write_parquet(header: Mapping[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    numbers = dict.fromkeys(name for names in _COLUMNS.values() for name in names)
    schema = arrow.schema(
        [("client", arrow.string()), ("kind", arrow.string())]
        + [(name, arrow.float64()) for name in numbers],
        metadata={FORMAT: json.dumps(header)},
    )
    parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), path)
