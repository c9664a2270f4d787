from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_world import call, fails
from tiny_tokenizers import tiny_tokenizer

from fedllm.config import DataConfig
from fedllm.data.verdicts import DataCheck, check_data

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
ROWS: list[Any] = [
    {"messages": [USER, ANSWER]},
    {"messages": [USER, {"role": "ai", "content": "hello"}]},
    "{oops",
    {"messages": [USER, ANSWER, USER]},
    {"messages": [USER, {**ANSWER, "content": "hello there " * 60}]},
    {"messages": [{"role": "user", "content": "hi <|im_end|>"}, ANSWER]},
    {"messages": [USER, {**ANSWER, "weight": 3}]},
]
VERDICTS = ["ok", "broken", "broken", "mended", "too long", "mended", "broken"]


def write(path: Path, rows: list[Any]) -> str:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def check(path: str, family: str = "qwen2.5", **settings: Any) -> DataCheck:
    return check_data(DataConfig(path=path, **settings), tiny_tokenizer(family))


def test_every_row_gets_a_verdict_with_place_reason_and_remedy(tmp_path: Path) -> None:
    found = check(write(tmp_path / "a.jsonl", ROWS), max_length=60)
    assert [row.where for row in found.rows] == [f"a.jsonl:{n}" for n in range(1, 8)]
    assert [row.verdict for row in found.rows] == VERDICTS
    assert found.totals == {"ok": 1, "mended": 2, "too long": 1, "broken": 3}
    assert "Did you mean 'assistant'" in found.rows[1].what
    assert (found.rows[2].reason, found.rows[2].remedy) == (
        "not JSON",
        "Each line must be one JSON object",
    )
    assert "tokens, more than max_length 60" in found.rows[4].what
    assert found.rows[6].remedy == "Write 0 or 1"
    assert all(row.what for row in found.rows if row.verdict != "ok")


def test_lengths_and_shares_are_those_of_the_tokens(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a " * n} for n in range(1, 101)]
    found = check(write(tmp_path / "a.jsonl", rows), max_length=60)
    assert found.lengths == sorted(found.lengths)
    assert found.suggested_length is not None
    assert found.suggested_length % 64 == 0
    held = sum(length <= found.suggested_length for length in found.lengths)
    assert held >= 99
    assert held > sum(length <= found.suggested_length - 64 for length in found.lengths)
    text = "".join(piece for piece, _ in found.example)
    learned = "".join(piece for piece, is_learned in found.example if is_learned)
    assert "<|im_start|>user\nq<|im_end|>" in text
    assert learned.endswith("<|im_end|>")
    assert 0 < found.supervised_share < 1


def test_both_splits_and_all_paths_are_read(tmp_path: Path) -> None:
    names = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        names.append(write(tmp_path / name / "same.jsonl", ROWS[:2]))
    tests = write(tmp_path / "test.jsonl", ROWS[:3])
    found = check_data(DataConfig(path=names, test_path=tests), tiny_tokenizer())
    assert [row.verdict for row in found.rows] == [*VERDICTS[:2], *VERDICTS[:3], *VERDICTS[:2]]


def test_what_the_template_refuses_is_broken_row_by_row(tmp_path: Path) -> None:
    rows = [ROWS[0], {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}]
    found = check(write(tmp_path / "a.jsonl", rows), family="gemma")
    assert [row.verdict for row in found.rows] == ["ok", "broken"]
    assert "System role not supported" in found.rows[1].what


def test_pairs_are_as_long_as_their_longer_side(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "a " * 50}
    found = check(write(tmp_path / "a.jsonl", [row]), max_length=60)
    assert [row.verdict for row in found.rows] == ["too long"]


# --- the command ----------------------------------------------------------------------------------


def test_the_command_tells_all_and_exits_with_1_for_broken_rows(tmp_path: Path) -> None:
    path, to = write(tmp_path / "a.jsonl", ROWS), tmp_path / "verdicts.json"
    code, text = call("data", "check", path, "--max-length", "40", "--json", to)
    assert code == 1
    assert "3 broken" in text
    assert "a.jsonl:2: message 2 has the role 'ai'" in text
    assert "would hold 99 % of the rows" in text
    assert "█" in text
    tree = json.loads(to.read_text())
    assert tree["totals"]["broken"] == 3
    assert [row["where"] for row in tree["rows"]] == [f"a.jsonl:{n}" for n in range(1, 8)]


def test_usable_data_exits_with_0(tmp_path: Path) -> None:
    code, text = call("data", "check", write(tmp_path / "a.jsonl", ROWS[:1] * 3))
    assert code == 0
    assert "3 rows: 3 ok" in text


def test_a_configuration_or_a_registry_names_the_data(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[:1] * 3)
    config = tmp_path / "c.yaml"
    config.write_text(f"stage: sft\ndata: {{path: {path}, max_length: 77}}\n")
    assert "max_length is 77" in call("data", "check", "--config", config)[1]
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"mine": {"file_name": "a.jsonl", "formatting": "openai"}})
    )
    assert call("data", "check", "mine", "--registry", tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "Give a PATH to check"),
        (["none.jsonl"], "there is no such file"),
        (["--config", "none.yaml"], "no such file"),
        (["a", "--model", "builtin:tony"], "tony"),
    ],
)
def test_misuse_exits_with_2(words: list[str], expected: str) -> None:
    assert expected in fails("data", "check", *words)
