from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import tiny_tokenizer

from fedllm.config import DataConfig
from fedllm.data import Dataset, TokenSet, load_dataset
from fedllm.data import writer as writer_module
from fedllm.data.cache import cache_dir
from fedllm.errors import DataError


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(path: Path, count: int = 12) -> str:
    rows = [{"prompt": f"how many {i}", "completion": f"{i} apples"} for i in range(count)]
    return write(path, rows)


def load(
    path: str, *, family: str = "qwen2.5", kind: Any = "causal-lm", **settings: Any
) -> Dataset:
    config = DataConfig(path=path, **settings)
    return load_dataset(config, tiny_tokenizer(family), kind=kind, seed=0)


def same(one: TokenSet, other: TokenSet) -> bool:
    arrays = ("tokens", "supervised", "offsets", "prompt_lengths")
    return one.references == other.references and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays
    )


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return cache_dir()


def test_rows_and_tokens_stand_in_the_same_order(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    data = load(pairs(tmp_path / "a.jsonl"))
    assert len(data.train) == len(data.rows.train)
    for i, row in enumerate(data.rows.train):
        tokens, supervised = data.train.row(i)
        assert tokenizer.decode(tokens[supervised]) == f"{row.answer}<|im_end|>"
        assert data.train.references[i] == row.answer
        assert data.train.lengths[i] == len(tokens)
    assert data.stop_ids[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_stop_tokens_are_end_of_turn_and_end_of_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("gemma")
    data = load(pairs(tmp_path / "a.jsonl"), family="gemma")
    expected = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    assert list(data.stop_ids) == expected


def test_the_system_prompt_goes_before_rows_without_one(tmp_path: Path) -> None:
    def talk(*roles: str) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": f"{role} says"} for role in roles]}

    path = write(tmp_path / "a.jsonl", [talk("user", "assistant")])
    own = write(tmp_path / "b.jsonl", [talk("system", "user", "assistant")])
    data = load(path, test_path=own, system_prompt="be brief")
    decode = tiny_tokenizer().decode
    assert "be brief" in decode(data.train.row(0)[0])
    assert "be brief" not in decode(data.test.row(0)[0])
    assert "system says" in decode(data.test.row(0)[0])


def labelled(path: Path) -> str:
    rows = [{"text": f"text {i} " * (i + 1), "label": ("neg", "pos")[i % 2]} for i in range(20)]
    return write(path, rows)


def test_labels_are_answers_for_a_causal_model(tmp_path: Path) -> None:
    data = load(labelled(tmp_path / "a.jsonl"))
    tokens, supervised = data.train.row(0)
    name = data.label_names[data.train.labels[0]]
    assert tiny_tokenizer().decode(tokens[supervised]) == f"{name}<|im_end|>"
    assert data.train.references[0] == name


def test_labels_are_class_ids_for_a_classification_head(tmp_path: Path) -> None:
    data = load(labelled(tmp_path / "a.jsonl"), kind="sequence-classification")
    assert data.label_names == ("neg", "pos")
    names = [data.label_names[i] for i in data.train.labels]
    assert names == [row.label for row in data.rows.train] == list(data.train.groups or ())
    tokens, supervised = data.train.row(0)
    assert tiny_tokenizer().decode(tokens) == data.rows.train[0].text
    assert not supervised.any()


def test_a_classification_head_needs_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs labelled texts, but the task is 'qa'"):
        load(pairs(tmp_path / "a.jsonl"), kind="sequence-classification")


def test_plain_text_has_no_prompt_and_no_reference(tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", [{"text": "hello there"}] * 4))
    assert data.task == "text"
    assert set(data.train.references) == {""}
    assert not data.train.prompt_lengths.any()


def test_dropped_and_truncated_rows_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "completion": "hello " * n} for n in (1, 1, 200)]
    path = write(tmp_path / "a.jsonl", rows)
    dropped = load(path, test_path=path, max_length=60)
    assert dropped.dropped == {"overlong": 2}
    assert [row.where for row in dropped.rows.train] == ["a.jsonl:1", "a.jsonl:2"]
    cut = load(path, test_path=path, max_length=60, overlong="truncate")
    assert (cut.dropped, cut.truncated) == ({}, 2)
    assert cut.train.lengths.max() <= 60
    with pytest.raises(DataError, match=r"no training row is within data\.max_length 2"):
        load(path, test_path=path, max_length=2)


def test_a_truncated_conversation_is_tested_on_its_last_answer(tmp_path: Path) -> None:
    contents = ["hi", "first answer", "more " * 99, "second"]
    roles = ("user", "assistant") * 2
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}])
    data = load(path, test_path=path, max_length=80, overlong="truncate")
    assert data.test.references == ("first answer",)


# --- cache ----------------------------------------------------------------------------------------


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how often rows are really tokenised."""
    calls: list[int] = []
    encode = writer_module.encode_conversations

    def counted(*arguments: Any, **settings: Any) -> Any:
        calls.append(len(arguments[1]))
        return encode(*arguments, **settings)

    monkeypatch.setattr(writer_module, "encode_conversations", counted)
    return calls


def test_rows_are_tokenised_once(tmp_path: Path, own_cache: Path, encodings: list[int]) -> None:
    path = pairs(tmp_path / "a.jsonl")
    one, other = load(path), load(path)
    assert len(encodings) == 2, "train and test, once each"
    assert same(one.train, other.train)
    assert same(one.test, other.test)
    assert {file.suffix for file in own_cache.iterdir()} == {".npz"}


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 300},
        {"overlong": "truncate"},
        {"system_prompt": "be brief"},
        {"family": "llama3"},
        {"holdout": 0.5},
    ],
)
def test_whatever_changes_the_tokens_misses_the_cache(
    tmp_path: Path, own_cache: Path, encodings: list[int], change: dict[str, Any]
) -> None:
    path = pairs(tmp_path / "a.jsonl")
    load(path)
    load(path, **change)
    assert len(encodings) == 4


def test_a_damaged_cache_file_is_made_anew(
    tmp_path: Path, own_cache: Path, encodings: list[int]
) -> None:
    path = pairs(tmp_path / "a.jsonl")
    whole = load(path)
    for file in own_cache.iterdir():
        file.write_bytes(file.read_bytes()[:200])
    again = load(path)
    assert same(whole.train, again.train)
    load(path)
    assert len(encodings) == 4, "made anew once, then read"


def test_an_unusable_cache_folder_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert len(load(pairs(tmp_path / "a.jsonl")).train) == 11


def test_a_full_disk_leaves_no_half_written_file(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert len(load(pairs(tmp_path / "a.jsonl")).train) == 11
    assert list(own_cache.iterdir()) == []


def test_the_cache_can_be_turned_off(tmp_path: Path, own_cache: Path) -> None:
    load(pairs(tmp_path / "a.jsonl"), cache=False)
    assert not own_cache.exists()


# --- real data ------------------------------------------------------------------------------------


def real(name: str) -> str:
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("FEDLLM_REAL_DATA", root.parent / "shared" / "data"))
    if not (folder / name).exists():
        pytest.skip(f"{folder / name} is not here; set FEDLLM_REAL_DATA to the folder that has it")
    return str(folder / name)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "settings", "task", "sizes"),
    [
        ("gsm8k", {}, "math", (7473, 1319)),
        ("sst2", {}, "classification", (60614, 872)),
        ("instruct/alpaca_en_demo.json", {}, "chat", (899, 100)),
    ],
)
def test_real_files_are_recognised_whole(
    name: str, settings: dict[str, Any], task: str, sizes: tuple[int, int]
) -> None:
    from fedllm.data import load_rows

    rows = load_rows(DataConfig(path=real(name), **settings), 0)
    assert rows.task == task
    assert (len(rows.train), len(rows.test)) == sizes


@pytest.mark.realdata
def test_real_conversations_are_learned_to_their_end() -> None:
    data = load(real("gsm8k"), max_length=2000, max_train_rows=200, max_test_rows=50)
    tokenizer = tiny_tokenizer()
    assert not data.dropped
    for i in range(0, 200, 20):
        tokens, supervised = data.train.row(i)
        learned = tokenizer.decode(tokens[supervised], skip_special_tokens=False)
        assert learned == data.train.references[i].strip() + "<|im_end|>"
        assert "####" in learned
