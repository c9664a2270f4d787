"""Traces that are made up, in every format: for trying things without anybody's data."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import numpy as np

from fedllm.seeding import rng
from fedllm.system.traces.own_format import Record, make_way, write_record
from fedllm.system.traces.window_trace import Window, merge

Behaviour = Literal["overnight", "office", "random"]
Written = Literal["ours", "flash", "fedscale", "fedscale-capacity", "plato"]
BEHAVIOURS: Mapping[Behaviour, str] = {
    "overnight": "from about 22:00 to 6:00 of the client's local time, on most nights",
    "office": "from about 9:00 to 17:00 on working days",
    "random": "on and off for exponential times of about two hours",
}
_DAY_S, _HOUR_S = 86400, 3600
_ORIGIN = datetime(2020, 1, 6, tzinfo=UTC)  # a Monday
_ZONES = (-8, -5, 0, 1, 5.5, 9)


def generate(clients: int, days: int, behaviour: Behaviour = "overnight", seed: int = 0) -> Record:
    """Return made-up windows to the second, and capacities and links of the same clients."""
    span = days * _DAY_S
    source = f"generated: {behaviour}, seed {seed}"
    record = Record(float(span), source=source, origin=_ORIGIN.isoformat())
    for client in range(clients):
        stream = rng(seed, "trace", client)
        name = f"client-{client}"
        drawn = _random(stream, span) if behaviour == "random" else _daily(stream, days, behaviour)
        kept = [(max(low, 0), min(high, span)) for low, high in drawn]
        record.windows[name] = [(float(a), float(b)) for a, b in merge(kept)]
        record.coverage[name] = 0.0, float(span)
        speed, rate = float(stream.lognormal(0.0, 0.6)), float(stream.lognormal(16.0, 0.8))
        record.capacities[name] = {"relative_speed": speed, "memory_bytes": 4e9}
        record.links[name] = {"up_bps": rate / 2, "down_bps": rate, "rtt_s": 0.05, "loss": 0.01}
    return record


def _daily(stream: np.random.Generator, days: int, behaviour: Behaviour) -> list[Window]:
    zone = _ZONES[int(stream.integers(len(_ZONES)))] if behaviour == "overnight" else 0
    start, hours, chance = (22, 8, 0.85) if behaviour == "overnight" else (9, 8, 0.95)
    found = []
    for day in range(-1, days + 1):
        hour, length = start + stream.normal(0, 0.7) - zone, max(hours + stream.normal(0, 1), 0.1)
        is_there = stream.random() < chance and not (behaviour == "office" and day % 7 >= 5)
        if is_there:
            opens = round(day * _DAY_S + hour * _HOUR_S)
            found.append((float(opens), float(opens + round(length * _HOUR_S))))
    return found


def _random(stream: np.random.Generator, span: int) -> list[Window]:
    found, now = [], -round(stream.exponential(2 * _HOUR_S))
    while now < span:
        length = max(round(stream.exponential(2 * _HOUR_S)), 1)
        found.append((now, now + length))
        now += length + max(round(stream.exponential(2 * _HOUR_S)), 1)
    return [(float(low), float(high)) for low, high in found if high > 0]


def write_as(record: Record, kind: Written, path: Path) -> None:
    """Write a trace in one of the formats that `import_trace` reads; `fedscale` is its behaviour.

    Raises:
        DataError: If a file is there already, or cannot be.
    """
    if kind == "ours":
        write_record(record, path)
        return
    make_way(path)
    match kind:
        case "flash":
            path.write_text(json.dumps(_flash(record), indent=1), encoding="utf-8")
        case "fedscale":
            path.write_bytes(pickle.dumps(_fedscale(record)))
        case "fedscale-capacity":
            path.write_bytes(pickle.dumps(_capacity(record)))
        case "plato":
            path.write_text(_plato(record), encoding="utf-8")


def _flash(record: Record) -> dict[str, dict[str, str]]:
    """Return phones that lock, charge and join Wi-Fi for each window; all begin at midnight."""
    table = {}
    for number, (name, windows) in enumerate(record.windows.items()):
        lines = [(0.0, "screen_unlock"), (0.0, "battery_charged_off"), (0.0, "4G")]
        for low, high in windows:
            lines += [(low, event) for event in ("screen_lock", "battery_charged_on", "wifi")]
            lines += [(high, "4G" if number % 2 else "battery_charged_off")]
        lines.append((record.span_s, "50%"))
        text = "\n".join(f"{_stamp(time_s)}\t{event}" for time_s, event in sorted(lines, key=_time))
        table[name] = {"guid": f"{number:032x}", "model": "generated", "messages": text}
    return table


def _time(line: tuple[float, str]) -> float:
    return line[0]


def _stamp(time_s: float) -> str:
    return f"{_ORIGIN + timedelta(seconds=time_s):%Y-%m-%d %H:%M:%S}"


def _fedscale(record: Record) -> dict[int, dict[str, object]]:
    return {
        number: {
            "active": [int(low) for low, _ in windows],
            "inactive": [int(high) for _, high in windows],
            "finish_time": int(record.span_s),
            "duration": int(record.span_s),
            "model": "generated",
        }
        for number, windows in enumerate(record.windows.values())
    }


def _capacity(record: Record) -> dict[int, dict[str, float]]:
    pairs = zip(record.capacities.values(), record.links.values(), strict=True)
    return {
        number: {
            "computation": 100.0 / capacity["relative_speed"],
            "communication": link["down_bps"] / 1e3,
        }
        for number, (capacity, link) in enumerate(pairs)
    }


def _plato(record: Record) -> str:
    lines = []
    for name, windows in record.windows.items():
        begins_on = bool(windows) and windows[0][0] == 0.0
        edges = [edge for window in windows for edge in window][1 if begins_on else 0 :]
        # the last transition tells how far the trace goes
        times = [
            f"{edge:g}" for edge in [*edges, *([] if record.span_s in edges else [record.span_s])]
        ]
        times = [f"{int(float(time))}" if float(time).is_integer() else time for time in times]
        lines.append(f"{name}: {'on' if begins_on else 'off'}, [{', '.join(times)}]")
    return "\n".join(lines) + "\n"
