"""FLASH's `state_traces.json`: what phones reported, line by line.

Yang et al., "Characterizing Impacts of Heterogeneity in Federated Learning upon Large-Scale
Smartphone Data", WWW 2021: for each client a text of lines, each a time, a tab and an event.

`flash` is FLASH's own rule: a phone is there while it is locked, charging and on Wi-Fi, which 2G to
5G and "unknown" end, however it is written, and its trace comes again from its beginning.
`reference` is what the published FedLLM-Factory (utils/trace_utils.py) makes of the same file: the
screen may be off instead of locked, only "2G" and "Unknown", written so, end Wi-Fi, windows below a
minute are dropped, even where they meet, and nothing comes again.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo, available_timezones

from fedllm.errors import DataError
from fedllm.system.traces.own_format import Record
from fedllm.system.traces.problems import Problems
from fedllm.system.traces.window_trace import Window, merge

Policy = Literal["flash", "reference"]
_SHORTEST_S, _DAY_S = 60.0, 86400.0
_ENDS_WIFI: Mapping[Policy, frozenset[str]] = {
    "flash": frozenset({"2g", "3g", "4g", "5g", "unknown"}),
    "reference": frozenset({"2G", "Unknown"}),
}
_KNOWN = _ENDS_WIFI["flash"] | {
    *("battery_charged_on", "battery_charged_off", "battery_low", "battery_okay"),
    *("screen_on", "screen_off", "screen_lock", "screen_unlock", "phone_on", "phone_off"),
    "wifi",
}
_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


@dataclass
class _Phone:
    is_locked: bool = False
    is_screen_off: bool = False
    is_charging: bool = False
    is_on_wifi: bool = False

    def take(self, event: str, policy: Policy) -> None:
        match event.lower() if policy == "flash" else event:
            case "screen_lock" | "screen_unlock" as change:
                self.is_locked = change == "screen_lock"
            case "screen_on" | "screen_off" as change:
                self.is_screen_off = change == "screen_off"
            case "battery_charged_on" | "battery_charged_off" as change:
                self.is_charging = change == "battery_charged_on"
            case "wifi":
                self.is_on_wifi = True
            case change if change in _ENDS_WIFI[policy]:
                self.is_on_wifi = False

    def is_ready(self, policy: Policy) -> bool:
        is_unused = self.is_locked or (policy == "reference" and self.is_screen_off)
        return is_unused and self.is_charging and self.is_on_wifi


def read_flash(
    path: Path, policy: Policy = "flash", time_zone: str = "UTC"
) -> tuple[Record, Problems]:
    """Read a file of FLASH's, every client's messages once.

    Second 0 is the midnight before the first message of all. A line that cannot be read is left
    out; an event that is not known is counted, and changes nothing.

    Args:
        path: The file.
        policy: When a phone counts as there.
        time_zone: Where the clocks are that the file's times were read from.

    Raises:
        DataError: If the file is no such table, or the time zone is not known.
    """
    zone = _zone(time_zone)
    problems, told = Problems(path), {}
    for key, client in _table(path).items():
        told[key] = sorted(_messages(key, client, zone, problems), key=itemgetter(0))
    firsts = [lines[0][0] for lines in told.values() if lines]
    if not firsts:
        raise DataError(f"{path} has no line that tells a time and an event")
    first = min(firsts).astimezone(zone)
    origin = first.replace(hour=0, minute=0, second=0).astimezone(UTC)
    record = Record(0.0, policy == "flash", f"{path.name}, policy {policy}")
    record.origin = origin.astimezone(zone).isoformat()
    for key, lines in told.items():
        seconds = [((time - origin).total_seconds(), event) for time, event in lines]
        record.windows[key] = windows_of(seconds, policy)
        if len(seconds) > 1 and seconds[-1][0] > seconds[0][0]:
            record.coverage[key] = seconds[0][0], seconds[-1][0]
            record.span_s = max(record.span_s, seconds[-1][0])
    record.span_s = _DAY_S * -(-max(record.span_s, 1.0) // _DAY_S)
    return record, problems


def _table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no trace {path}; check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise DataError(f"{path} is no table of clients with messages, as FLASH publishes it")
    return table


def _zone(name: str) -> tzinfo:
    if name == "UTC":  # known where no database of time zones is, too
        return UTC
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        near = difflib.get_close_matches(name, available_timezones(), n=1)
        hint = f"did you mean {near[0]}?" if near else "names are like Europe/Berlin or UTC"
        raise DataError(f"there is no time zone {name!r}; {hint}") from None


def windows_of(events: list[tuple[float, str]], policy: Policy) -> list[Window]:
    """Return when a phone is there, from its events in order of time.

    What holds after all events of a second counts: a window that opens and closes in one has no
    length and is left out, and two that meet in one are one. `reference` drops short windows before
    any are joined.
    """
    phone, found, since = _Phone(), list[Window](), None
    for time_s, event in events:
        phone.take(event, policy)
        if phone.is_ready(policy) and since is None:
            since = time_s
        elif not phone.is_ready(policy) and since is not None:
            found.append((since, time_s))
            since = None
    if since is not None:
        found.append((since, events[-1][0]))
    if policy == "reference":
        found = [window for window in found if window[1] - window[0] >= _SHORTEST_S]
    return merge(found)


def _messages(
    key: str, client: Any, zone: tzinfo, problems: Problems
) -> Iterator[tuple[datetime, str]]:
    """Yield the time, in UTC, and event of each line."""
    messages = client.get("messages") if isinstance(client, dict) else None
    if not isinstance(messages, str):
        problems.lines += 1
        problems.add(f"client {key}", "has no messages")
        return
    for number, line in enumerate(messages.splitlines(), start=1):
        if not line.strip():
            continue
        problems.lines += 1
        stamp, _, event = (part.strip() for part in line.strip().partition("\t"))
        time = _time(stamp, zone)
        if time is None or not event:
            wanted = "event after a tab" if time else "time like 2020-01-31 23:59:59"
            problems.add(f"client {key}, message {number}", f"no {wanted} in {line[:40]!r}")
            continue
        name = event.lower()
        if name not in _KNOWN and not name.rstrip("%").replace(".", "", 1).isdigit():
            problems.unknown_events[name[:40]] += 1
        yield time, event


def _time(stamp: str, zone: tzinfo) -> datetime | None:
    try:
        # fromisoformat is ten times as fast as strptime, and lets more pass
        local = datetime.fromisoformat(stamp) if _STAMP.fullmatch(stamp) else None
        return local and local.replace(tzinfo=zone).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
