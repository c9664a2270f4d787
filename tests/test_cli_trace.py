"""`fedllm trace`: files in, files out, and one clear message where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_world import call


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
    made, there = tmp_path / "t.jsonl", tmp_path / "there.jsonl"
    call("trace", "generate", "--clients", "2", "--days", "1", "--to", str(made))
    there.write_text("mine")
    code, text = call("trace", command, str(made), "--to", str(there))
    assert (code, "nothing is overwritten" in text) == (2, True)
    code, text = call("trace", "generate", "--to", str(there))
    assert code == 2
    assert there.read_text() == "mine"


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
