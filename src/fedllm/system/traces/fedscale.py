"""FedScale's pickled traces, read by an unpickler that makes nothing but plain containers.

`client_behave_trace`: id to `active`, `inactive` (seconds, paired) and `finish_time`; a client is
there while active[i] <= t mod finish_time <= inactive[i]; here a window's last instant is no part
of it. `client_device_capacity`: id to `computation` (milliseconds a sample) and `communication`
(kbit/s).
"""

from __future__ import annotations

import math
import pickle
import statistics
from pathlib import Path
from typing import Any, NoReturn

from fedllm.errors import DataError
from fedllm.system.traces.own_format import Record
from fedllm.system.traces.problems import Problems
from fedllm.system.traces.window_trace import merge


class _Plain(pickle.Unpickler):
    """Refuses every class and function: dicts, lists, texts and numbers need none."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(
            f"the pickle asks for {module}.{name}, which could run code; only plain dictionaries,"
            " lists, texts and numbers are read"
        )


def read_pickle(path: Path) -> Any:
    """Return the plain containers of a pickle.

    Raises:
        DataError: If it holds anything else, or is no pickle.
    """
    try:
        with path.open("rb") as data:
            return _Plain(data).load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"there is no trace {path}; check the path") from None
    except Exception as error:  # a torn pickle may raise nearly anything
        raise DataError(f"{path} is not a pickle that can be read: {error}") from None


def read_fedscale(path: Path) -> tuple[Record, Problems]:
    """Read either of FedScale's files: which of the two it is, its entries tell.

    Raises:
        DataError: If the file is neither.
    """
    table = read_pickle(path)
    if not isinstance(table, dict) or not table:
        raise DataError(f"{path} is no table of clients, as FedScale publishes it")
    problems = Problems(path, lines=len(table))
    record = Record(0.0, source=path.name)
    is_behaviour = any(isinstance(row, dict) and "active" in row for row in table.values())
    for client, row in table.items():
        reason = (
            _behaviour(record, str(client), row)
            if is_behaviour
            else _capacity(record, str(client), row)
        )
        if reason:
            problems.add(f"client {client}", reason)
    if not is_behaviour:
        _relate(record)
        record.span_s = 1.0
    return record, problems


def _behaviour(record: Record, client: str, row: Any) -> str:
    try:
        active, inactive = [list(map(float, row[key])) for key in ("active", "inactive")]
        finish = float(row["finish_time"])
    except (TypeError, KeyError, ValueError, OverflowError):
        return "needs active and inactive (lists of seconds) and finish_time"
    if not all(map(math.isfinite, (*active, *inactive, finish))):
        return "times must be finite"
    if finish <= 0 or len(inactive) not in (len(active), len(active) - 1):
        return "needs a positive finish_time, and an inactive for each active"
    ends = [*inactive, finish][: len(active)]
    windows = [(max(low, 0.0), min(high, finish)) for low, high in zip(active, ends, strict=True)]
    record.windows[client] = merge(windows)
    record.coverage[client] = 0.0, finish
    record.span_s = max(record.span_s, finish)
    return ""


def _capacity(record: Record, client: str, row: Any) -> str:
    try:
        computing, kbps = float(row["computation"]), float(row["communication"])
    except (TypeError, KeyError, ValueError, OverflowError):
        return "needs computation (ms a sample) and communication (kbit/s)"
    if not (0 < computing < math.inf and 0 < kbps < math.inf):
        return "computation and communication must be positive"
    record.capacities[client] = {"relative_speed": 1.0 / computing}
    record.links[client] = {"up_bps": 1e3 * kbps, "down_bps": 1e3 * kbps}
    return ""


def _relate(record: Record) -> None:
    """Make the median speed 1: milliseconds of a small network say nothing about another model."""
    speeds = [values["relative_speed"] for values in record.capacities.values()]
    median = statistics.median(speeds) if speeds else 1.0
    for values in record.capacities.values():
        values["relative_speed"] /= median
