"""`fedllm trace`: files in, files out, and one clear message where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_world import call

from fedllm.system.traces import import_trace


def test_a_trace_is_made_up_inspected_imported_and_drawn(tmp_path: Path) -> None:
    made, ours = tmp_path / "phones.json", tmp_path / "ours.jsonl"
    words = ("--clients", "9", "--days", "2", "--seed", "3")
    code, text = call("trace", "generate", "--format", "flash", *words, "--to", str(made))
    assert (code, "9 clients" in text) == (0, True)
    code, text = call("trace", "inspect", str(made))
    assert code == 0
    assert "23:00" in text
    code, text = call("trace", "inspect", str(made), "--json")
    found = json.loads(text)
    assert (found["clients"], found["malformed"], found["span_s"]) == (9, 0, 172800.0)
    assert len(found["share_available_by_hour"]) == 24
    code, text = call("trace", "import", str(made), "--to", str(ours))
    assert code == 0
    _, text = call("trace", "inspect", str(ours), "--json")
    assert json.loads(text)["windows"] == found["windows"]
    picture = tmp_path / "trace.png"
    code, text = call("trace", "plot", str(ours), "--to", str(picture))
    assert code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["import", "plot"])
def test_nothing_is_overwritten(tmp_path: Path, command: str) -> None:
    made, there = tmp_path / "t.jsonl", tmp_path / ("there.png" if command == "plot" else "o.jsonl")
    call("trace", "generate", "--clients", "2", "--days", "1", "--to", str(made))
    there.write_text("mine")
    code, text = call("trace", command, str(made), "--to", str(there))
    assert (code, "nothing is overwritten" in text) == (2, True)
    code, text = call("trace", "generate", "--format", "plato", "--to", str(there))
    assert code == 2
    assert there.read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "name", "told"),
    [
        ("import", "out.csv", "written as .jsonl or .parquet"),
        ("plot", "out.pdf", "written as .png"),
        ("import", "file/out.jsonl", "the folder of"),
        ("plot", "file/out.png", "the folder of"),
    ],
)
def test_a_name_that_nothing_can_be_written_to_is_told(
    tmp_path: Path, command: str, name: str, told: str
) -> None:
    made = tmp_path / "t.jsonl"
    (tmp_path / "file").touch()
    call("trace", "generate", "--clients", "2", "--days", "1", "--to", str(made))
    code, text = call("trace", command, str(made), "--to", str(tmp_path / name))
    assert (code, told in " ".join(text.split())) == (2, True)
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.jsonl", None, "there is no trace"),
        ("odd.txt", "hello", "--format"),
        ("bad.json", '{"a": {"messages": "x"}}', "tells a time and an event"),
        ("bad.pkl", "\x80nonsense", "not a pickle"),
    ],
)
def test_a_file_that_is_no_trace_is_told_of(
    tmp_path: Path, name: str, content: str | None, told: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="latin-1")
    code, text = call("trace", "inspect", str(path))
    assert code == 2
    assert told in " ".join(text.split())
    assert "Traceback" not in text


def test_lines_that_are_left_out_are_told(tmp_path: Path) -> None:
    path = tmp_path / "plato.txt"
    path.write_text("".join(f"c{i}: on, [5, 9]\n" for i in range(30)) + "oops\n")
    code, text = call("trace", "inspect", str(path))
    assert code == 0
    assert "1 of 31 lines cannot be read" in text
    assert "plato.txt:31" in text


def test_capacities_alone_can_be_inspected_and_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "capacity.pkl"
    call("trace", "generate", "--format", "fedscale-capacity", "--clients", "3", "--to", str(path))
    code, text = call("trace", "inspect", str(path))
    assert (code, "3 capacities, 3 links" in text) == (0, True)
    code, text = call("trace", "plot", str(path), "--to", str(tmp_path / "a.png"))
    assert (code, "nothing to draw" in " ".join(text.split())) == (2, True)


def test_time_zone_and_what_is_unknown_go_into_the_file(tmp_path: Path) -> None:
    made, ours = tmp_path / "phones.json", tmp_path / "ours.parquet"
    text = "2020-01-02 05:00:00\twifi\n2020-01-02 06:00:00\tdances\n"
    made.write_text(json.dumps({"3": {"messages": text}}))
    words = ("--time-zone", "Asia/Shanghai", "--unknown", "available")
    code, text = call("trace", "import", str(made), "--to", str(ours), *words)
    assert (code, "event 'dances' is not known" in text) == (0, True)
    found = json.loads(call("trace", "inspect", str(ours), "--json")[1])
    assert (found["origin"], found["unknown"]) == ("2020-01-02T00:00:00+08:00", "available")
    assert found["share_available_by_hour"][4:7] == [1.0, 0.0, 1.0]
    code, text = call("trace", "inspect", str(made), "--time-zone", "Asia/Shangai")
    assert (code, "did you mean Asia/Shanghai" in " ".join(text.split())) == (2, True)


def test_a_picture_is_drawn_by_the_clocks_of_a_time_zone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, asked = tmp_path / "phones.json", []
    words = ("--format", "flash", "--clients", "2", "--days", "1", "--to", str(made))
    call("trace", "generate", *words)

    def watched(path: Path, kind: str, **options: object) -> object:
        asked.append(options["time_zone"])
        return import_trace(path, kind, **options)

    monkeypatch.setattr("fedllm.system.traces.import_trace", watched)
    words = ("--to", str(tmp_path / "a.png"), "--time-zone")
    code, _ = call("trace", "plot", str(made), *words, "Asia/Shanghai")
    assert (code, asked) == (0, ["Asia/Shanghai"])
    code, text = call(
        "trace", "plot", str(made), "--to", str(tmp_path / "b.png"), words[-1], "Mars"
    )
    assert (code, "Mars" in text) == (2, True)
