"""FLASH's `state_traces.json`: what phones reported, line by line.

Yang et al., "Characterizing Impacts of Heterogeneity in Federated Learning upon Large-Scale
Smartphone Data", WWW 2021: for each client a text of lines, each a time, a tab and an event.

`flash` is FLASH's own rule: a phone is there while it is locked, charging and on Wi-Fi, which 2G to
5G and "unknown" end, and its trace comes again from its beginning. `reference` is what the
published FedLLM-Factory makes of the same file: the screen may be off instead of locked, only 2G
and "unknown" end Wi-Fi, windows below a minute are dropped, and nothing comes again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from fedllm.errors import DataError
from fedllm.system.traces.own_format import Record
from fedllm.system.traces.problems import Problems
from fedllm.system.traces.window_trace import Window, merge

Policy = Literal["flash", "reference"]
_SHORTEST_S = 60.0
_MOBILE = frozenset({"2g", "3g", "4g", "5g"})
_KNOWN = _MOBILE | {
    *("battery_charged_on", "battery_charged_off", "battery_low", "battery_okay"),
    *("screen_on", "screen_off", "screen_lock", "screen_unlock", "phone_on", "phone_off"),
    *("wifi", "unknown"),
}


@dataclass
class _Phone:
    is_locked: bool = False
    is_screen_off: bool = False
    is_charging: bool = False
    is_on_wifi: bool = False

    def take(self, event: str, policy: Policy) -> None:
        match event:
            case "screen_lock" | "screen_unlock":
                self.is_locked = event == "screen_lock"
            case "screen_on" | "screen_off":
                self.is_screen_off = event == "screen_off"
            case "battery_charged_on" | "battery_charged_off":
                self.is_charging = event == "battery_charged_on"
            case "wifi":
                self.is_on_wifi = True
            case "unknown" | "2g":
                self.is_on_wifi = False
            case _ if event in _MOBILE and policy == "flash":
                self.is_on_wifi = False

    def is_ready(self, policy: Policy) -> bool:
        is_unused = self.is_locked or (policy == "reference" and self.is_screen_off)
        return is_unused and self.is_charging and self.is_on_wifi


def read_flash(path: Path, policy: Policy = "flash") -> tuple[Record, Problems]:
    """Read a file of FLASH's, every client's messages once.

    Time 0 is midnight before the first message of all. A line that cannot be read is left out.

    Raises:
        DataError: If the file is no such table.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no trace {path}; check the path") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise DataError(f"{path} is no table of clients with messages, as FLASH publishes it")
    problems, told = Problems(path), {}
    for key, client in table.items():
        told[str(key)] = list(_messages(str(key), client, problems))
    firsts = [lines[0][0] for lines in told.values() if lines]
    if not firsts:
        raise DataError(f"{path} has no line that tells a time and an event")
    origin = min(firsts).replace(hour=0, minute=0, second=0, microsecond=0)
    record = Record(0.0, wraps=policy == "flash", source=f"{path.name}, policy {policy}")
    for key, lines in told.items():
        seconds = [((time - origin).total_seconds(), event) for time, event in lines]
        record.windows[key] = windows_of(seconds, policy)
        if len(seconds) > 1 and seconds[-1][0] > seconds[0][0]:
            record.coverage[key] = seconds[0][0], seconds[-1][0]
            record.span_s = max(record.span_s, seconds[-1][0])
    days = -(-max(record.span_s, 1.0) // timedelta(days=1).total_seconds())
    record.span_s = days * timedelta(days=1).total_seconds()
    return record, problems


def windows_of(events: list[tuple[float, str]], policy: Policy) -> list[Window]:
    """Return when a phone is there, from its events in order of time.

    All events of one second are taken before it is looked at: a phone that is plugged in and
    unplugged in the same second is not there.
    """
    phone, found, since = _Phone(), [], None
    for time_s, group in groupby(events, key=lambda event: event[0]):
        for _, event in group:
            phone.take(event, policy)
        if phone.is_ready(policy) and since is None:
            since = time_s
        elif not phone.is_ready(policy) and since is not None:
            found.append((since, time_s))
            since = None
    if since is not None and events:
        found.append((since, events[-1][0]))
    merged = merge(found)
    if policy == "reference":
        merged = [window for window in merged if window[1] - window[0] >= _SHORTEST_S]
    return merged


def _messages(key: str, client: Any, problems: Problems) -> Iterator[tuple[datetime, str]]:
    """Yield the time and event of each line, in order of time."""
    messages = client.get("messages") if isinstance(client, dict) else None
    if not isinstance(messages, str):
        problems.lines += 1
        problems.add(f"client {key}", "has no messages")
        return
    found = []
    for number, line in enumerate(messages.splitlines(), start=1):
        if not line.strip():
            continue
        problems.lines += 1
        where = f"client {key}, message {number}"
        stamp, tab, event = line.partition("\t")
        event = event.strip().lower()
        try:
            time = datetime.strptime(stamp.strip(), "%Y-%m-%d %H:%M:%S")
        except ValueError:
            problems.add(where, f"no time like 2020-01-31 23:59:59 in {line[:40]!r}")
            continue
        if not tab or not (event in _KNOWN or event.rstrip("%").replace(".", "", 1).isdigit()):
            problems.add(where, f"no known event in {line[:40]!r}")
            continue
        found.append((time, event))
    yield from sorted(found, key=lambda pair: pair[0])
