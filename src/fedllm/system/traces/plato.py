"""Lists of transitions, as users of Plato asked for: `<client>: on, [54, 890, 2042]`.

A client begins `on` or `off` at second 0, and changes at each of the seconds. The trace covers the
time up to the last transition of all, and comes again. In JSON the same is
`{"<client>": ["on", [54, 890, 2042]]}`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedllm.errors import DataError
from fedllm.system.traces.own_format import Record
from fedllm.system.traces.problems import Problems
from fedllm.system.traces.window_trace import Window, merge

_LINE = re.compile(r"\s*(?P<client>[^:]+?)\s*:\s*(?P<state>on|off)\s*,\s*\[(?P<times>[^\]]*)\]\s*$")


def read_plato(path: Path) -> tuple[Record, Problems]:
    """Read transitions from text or JSON; the span is the last of all transitions.

    Raises:
        DataError: If the file is not there.
    """
    if not path.is_file():
        raise DataError(f"there is no trace {path}; check the path")
    text = path.read_text(encoding="utf-8", errors="replace")
    problems, record = Problems(path), Record(0.0, source=path.name)
    found = []
    for where, client, state, times in _entries(text):
        problems.lines += 1
        if client is None:
            problems.add(where, "not like `client: on, [54, 890]`")
        elif times != sorted(times) or not all(0 <= time < math.inf for time in times):
            problems.add(where, "transitions must be seconds in ascending order")
        else:
            found.append((client, state, times))
    record.span_s = max((times[-1] for _, _, times in found if times), default=0.0)
    if not record.span_s:
        raise DataError(f"{path} has no transition, so it covers no time")
    for client, state, times in found:
        record.windows[client] = list(_windows(state == "on", times, record.span_s))
    return record, problems


def _windows(is_on: bool, times: list[float], span_s: float) -> list[Window]:
    edges = [*([0.0] if is_on else []), *times, span_s]
    return merge(list(zip(edges[0::2], edges[1::2], strict=False)))


def _entries(text: str) -> Iterator[tuple[Any, str | None, str, list[float]]]:
    try:
        table = json.loads(text)
    except ValueError:
        table = None
    if isinstance(table, dict):
        for client, value in table.items():
            yield _from_json(client, value)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield _from_line(number, line)


def _from_json(client: str, value: Any) -> tuple[Any, str | None, str, list[float]]:
    try:
        state, times = value
        if state not in ("on", "off"):
            raise ValueError
        return f"client {client}", client, state, [float(time) for time in times]
    except (TypeError, ValueError, OverflowError):
        return f"client {client}", None, "", []


def _from_line(number: int, line: str) -> tuple[Any, str | None, str, list[float]]:
    match = _LINE.match(line)
    try:
        if match is None:
            raise ValueError
        times = [float(part) for part in match["times"].split(",") if part.strip()]
    except ValueError:
        return number, None, "", []
    return number, match["client"], match["state"], times
