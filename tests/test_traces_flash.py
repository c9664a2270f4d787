"""FLASH's files: which events open and close windows, lines that are wrong, clocks, brute force."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import DataError
from fedllm.system.traces import import_trace
from fedllm.system.traces.flash import Policy, windows_of
from fedllm.system.traces.window_trace import merge

LOCKED = [(0.0, "screen_lock"), (0.0, "battery_charged_on"), (0.0, "wifi")]


SECONDS = 30
EVENTS = (
    *("screen_lock", "screen_unlock", "battery_charged_on", "battery_charged_off"),
    *("wifi", "2G", "4G", "Unknown", "screen_on", "screen_off", "57.0%", "dances"),
)
events = st.lists(
    st.tuples(st.integers(0, SECONDS).map(float), st.sampled_from(EVENTS)), max_size=25
).map(lambda pairs: sorted(pairs, key=lambda pair: pair[0]))


def is_ready(told: list[tuple[float, str]], second: float) -> bool:
    """Look at the last word on each condition: nothing is tracked from event to event."""

    def last(names: set[str]) -> str:
        said = [name for time_s, name in told if time_s <= second and name in names]
        return said[-1] if said else ""

    return (
        last({"screen_lock", "screen_unlock"}) == "screen_lock"
        and last({"battery_charged_on", "battery_charged_off"}) == "battery_charged_on"
        and last({"wifi", "2G", "4G", "Unknown"}) == "wifi"
    )


@given(events)
def test_windows_are_those_of_a_walk_over_all_seconds(told: list[tuple[float, str]]) -> None:
    found = windows_of(told, "flash")
    end = told[-1][0] if told else 0.0
    for second in range(SECONDS + 2):
        wanted = second < end and is_ready(told, second)
        assert any(low <= second < high for low, high in found) == wanted
    assert found == merge(found)


@given(events.filter(bool), st.floats(0, 5 * SECONDS))
def test_a_client_of_a_file_is_there_as_its_events_say_again_and_again(
    tmp_path_factory: pytest.TempPathFactory, told: list[tuple[float, str]], time_s: float
) -> None:
    text = "".join(f"2020-01-02 00:00:{int(at):02d}\t{event}\n" for at, event in told)
    path = flash_file(tmp_path_factory.mktemp("flash"), {"7": text})
    trace = import_trace(path)[0].trace()
    low, high = told[0][0], told[-1][0]
    wanted = low < high and is_ready(told, low + (time_s - low) % (high - low))
    assert trace.is_available(0, time_s) == wanted


@pytest.mark.parametrize("network", ["2G", "3G", "4G", "5G", "Unknown", "unknown"])
def test_every_mobile_network_ends_wifi(network: str) -> None:
    # in the published reference only 2G and Unknown do, written so
    told = [*LOCKED, (60.0, network), (7200.0, "screen_unlock")]
    assert windows_of(told, "flash") == [(0.0, 60.0)]
    ends = 60.0 if network in ("2G", "Unknown") else 7200.0
    assert windows_of(told, "reference") == [(0.0, ends)]


def test_policies_differ_in_the_screen_and_in_short_windows() -> None:
    off = [(0.0, "screen_off"), (0.0, "battery_charged_on"), (0.0, "wifi"), (99.0, "4g")]
    assert windows_of(off, "flash") == []
    assert windows_of([*off, (120.0, "2G")], "reference") == [(0.0, 120.0)]
    short = [*LOCKED, (59.0, "battery_charged_off"), (200.0, "wifi")]
    assert windows_of(short, "flash") == [(0.0, 59.0)]
    assert windows_of(short, "reference") == []


def test_events_of_one_second_are_taken_before_a_window_opens() -> None:
    told = [*LOCKED[:2], (5.0, "wifi"), (5.0, "4g"), (9.0, "wifi"), (12.0, "battery_charged_off")]
    assert windows_of(told, "flash") == [(9.0, 12.0)]


def test_the_reference_drops_short_windows_that_meet() -> None:
    # a flicker leaves two windows of under a minute, and neither is kept
    told = [*LOCKED, (50.0, "screen_unlock"), (50.0, "screen_lock"), (100.0, "2G")]
    assert windows_of(told, "flash") == [(0.0, 100.0)]
    assert windows_of(told, "reference") == []


def test_the_reference_does_not_begin_again(tmp_path: Path) -> None:
    text = "".join(f"2020-01-02 00:00:00\t{event}\n" for _, event in LOCKED)
    path = flash_file(tmp_path, {"7": text + "2020-01-02 01:00:00\tscreen_unlock\n"})
    policy: Policy
    for policy, wanted in (("flash", True), ("reference", False)):
        trace = import_trace(path, policy=policy)[0].trace()
        assert trace.is_available(0, 1800.0)
        assert trace.is_available(0, 3600.0 + 1800.0) == wanted


def flash_file(folder: Path, messages: dict[str, str]) -> Path:
    path = folder / "state_traces.json"
    table = {key: {"guid": "g", "model": "m", "messages": text} for key, text in messages.items()}
    path.write_text(json.dumps(table))
    return path


def test_lines_that_cannot_be_read_are_counted_and_named(tmp_path: Path) -> None:
    good = "2020-01-02 00:00:01\tscreen_lock\n" * 30
    path = flash_file(tmp_path, {"7": good + "rubbish\n2020-01-02 00:00:09\t\n"})
    _, problems = import_trace(path, malformed=0.1)
    assert (problems.count, problems.lines) == (2, 32)
    assert problems.named[0].startswith(f"{path}:client 7, message 31: no time like")
    assert "no event after a tab" in problems.named[1]
    with pytest.raises(DataError, match=r"2 of 32 lines .* more than 5%") as told:
        import_trace(path)
    assert "--malformed" in str(told.value)


def test_only_the_first_ten_are_named(tmp_path: Path) -> None:
    path = flash_file(tmp_path, {"7": "2020-01-02 00:00:01\twifi\n" + "rubbish\n" * 25})
    _, problems = import_trace(path, malformed=1.0)
    assert (problems.count, len(problems.named)) == (25, 10)
    with pytest.raises(DataError, match="and 15 more"):
        import_trace(path)


def test_events_that_are_not_known_are_counted_and_change_nothing(tmp_path: Path) -> None:
    # FLASH itself stops the program
    text = "".join(f"2020-01-02 00:00:00\t{event}\n" for _, event in LOCKED)
    path = flash_file(tmp_path, {"7": text + "2020-01-02 01:00:00\tDances\n" * 9})
    record, problems = import_trace(path)
    assert (problems.count, problems.unknown_events) == (0, {"dances": 9})
    assert record.windows == {"7": [(0.0, 3600.0)]}


@pytest.mark.parametrize(
    "stamp", ["2020-01-02", "2020-13-02 00:00:00", "2020-01-02T00:00:00", "0001-01-01 00:00:00"]
)
def test_a_time_that_is_not_flash_s_is_not_taken(tmp_path: Path, stamp: str) -> None:
    path = flash_file(tmp_path, {"7": f"2020-01-02 00:00:01\twifi\n{stamp}\twifi\n"})
    _, problems = import_trace(path, malformed=1.0, time_zone="Asia/Shanghai")
    line = f"{stamp}\twifi"
    assert problems.named == [
        f"{path}:client 7, message 2: no time like 2020-01-31 23:59:59 in {line!r}"
    ]


@given(st.sampled_from(["UTC", "Asia/Shanghai", "America/New_York", "Asia/Kolkata"]), events)
def test_clocks_that_stand_elsewhere_change_the_origin_alone(
    tmp_path_factory: pytest.TempPathFactory, zone: str, told: list[tuple[float, str]]
) -> None:
    text = "".join(f"2020-01-02 23:00:{int(at):02d}\t{event}\n" for at, event in told)
    path = flash_file(tmp_path_factory.mktemp("zones"), {"7": text + "2020-01-03 01:00:00\t9%"})
    there, utc = (import_trace(path, time_zone=name)[0] for name in (zone, "UTC"))
    assert (there.windows, there.coverage) == (utc.windows, utc.coverage)
    hours = {"UTC": "+00:00", "Asia/Shanghai": "+08:00", "Asia/Kolkata": "+05:30"}
    assert there.origin[-6:] == hours.get(zone, "-05:00")
    assert there.origin[11:19] == "00:00:00"


def test_an_hour_that_clocks_leave_out_does_not_pass(tmp_path: Path) -> None:
    text = "".join(f"2020-03-29 01:30:00\t{event}\n" for _, event in LOCKED)
    path = flash_file(tmp_path, {"7": text + "2020-03-29 03:30:00\tscreen_unlock\n"})
    record, _ = import_trace(path, time_zone="Europe/Berlin")
    assert record.windows == {"7": [(5400.0, 9000.0)]}
    assert import_trace(path)[0].windows == {"7": [(5400.0, 12600.0)]}


@pytest.mark.parametrize(
    ("zone", "hint"),
    [("Europe/Berln", "did you mean Europe/Berlin"), ("", "names are like"), ("../x", "names are")],
)
def test_a_time_zone_that_is_not_known_is_told(tmp_path: Path, zone: str, hint: str) -> None:
    path = flash_file(tmp_path, {"7": "2020-01-02 00:00:01\twifi\n"})
    with pytest.raises(DataError, match=hint):
        import_trace(path, time_zone=zone)


def test_lines_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    lines = [f"2020-01-02 00:00:00\t{event}" for _, event in LOCKED]
    lines = ["2020-01-02 01:00:00\tscreen_unlock", *lines]
    record, _ = import_trace(flash_file(tmp_path, {"7": "\n".join(lines)}))
    assert record.windows == {"7": [(0.0, 3600.0)]}


def test_a_file_is_parsed_once_however_many_clients_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the published reference reads it all for each of its clients
    path = flash_file(tmp_path, {str(key): "2020-01-02 00:00:01\twifi\n" for key in range(50)})
    parse, parsed = json.loads, []

    def counted(text: str) -> object:
        parsed.append(len(text))
        return parse(text)

    monkeypatch.setattr(json, "loads", counted)
    record, _ = import_trace(path)
    assert len(record.windows) == 50
    assert parsed == [path.stat().st_size]
