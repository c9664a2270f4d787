from __future__ import annotations

import json
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm.config import DataConfig, read, validate
from fedllm.data import Row, load_rows
from fedllm.data.mixing import Mix, mixed
from fedllm.errors import ConfigError, DataError
from fedllm.seeding import rng


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int, name: str) -> list[dict[str, Any]]:
    return [{"prompt": f"{name}{i}", "completion": "a"} for i in range(count)]


def prompts(rows: tuple[Row, ...]) -> list[str]:
    return [row.messages[0].content for row in rows]


def registry(folder: Path, **entries: Any) -> Path:
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return folder


def load(folder: Path, *names: str, **settings: Any) -> Any:
    path: Any = list(names) if len(names) > 1 else names[0]
    return load_rows(DataConfig(path=path, registry=folder, **settings), 0)


def fault(folder: Path, *names: str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, *names, **settings)
    return str(caught.value)


# --- dataset_info.json ----------------------------------------------------------------------------


def test_names_are_looked_up_beside_the_registry(tmp_path: Path) -> None:
    rows = [{"instruction": f"i{n}", "input": "", "output": "o"} for n in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = load(registry(tmp_path, mine={"file_name": "a.json"}), "mine")
    assert sorted(prompts(found.train) + prompts(found.test)) == ["i0", "i1", "i2", "i3"]
    again = load(tmp_path / "dataset_info.json", "mine")
    assert again == found


def test_unlisted_columns_keep_their_defaults(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"ask": "q", "input": "in", "output": "o", "system": "s"}] * 2)
    folder = registry(tmp_path, a={"file_name": "a.jsonl", "columns": {"prompt": "ask"}})
    (row,) = load(folder, "a").train
    assert [m.content for m in row.messages] == ["s", "q\nin", "o"]


def test_tags_and_columns_of_sharegpt_are_read(tmp_path: Path) -> None:
    turns = [{"who": "me", "says": "q"}, {"who": "it", "says": "a"}]
    write(tmp_path / "a.jsonl", [{"talk": turns, "text": "not this"}] * 2)
    entry = {
        "file_name": "a.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "talk"},
        "tags": {
            "role_tag": "who",
            "content_tag": "says",
            "user_tag": "me",
            "assistant_tag": "it",
        },
    }
    (row,) = load(registry(tmp_path, a=entry), "a").train
    assert [(m.role, m.content) for m in row.messages] == [("user", "q"), ("assistant", "a")]


def test_ranking_kto_tag_and_plain_text_are_read(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", [{"instruction": "q", "good": "a", "bad": "b"}] * 2)
    write(tmp_path / "k.jsonl", [{"instruction": "q", "output": "a", "liked": True}] * 2)
    write(tmp_path / "t.jsonl", [{"body": "words"}] * 2)
    ranked = {"chosen": "good", "rejected": "bad"}
    folder = registry(
        tmp_path,
        pairs={"file_name": "p.jsonl", "ranking": True, "columns": ranked},
        rated={"file_name": "k.jsonl", "columns": {"kto_tag": "liked"}},
        plain={"file_name": "t.jsonl", "columns": {"prompt": "body"}},
    )
    assert [load(folder, name).task for name in ("pairs", "rated", "plain")] == [
        "preference",
        "rated",
        "text",
    ]


def test_a_folder_of_a_registry_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    write(tmp_path / "many" / "b.jsonl", pairs(2, "b"))
    write(tmp_path / "many" / "a.jsonl", pairs(2, "a"))
    found = load(registry(tmp_path, many={"file_name": "many"}), "many")
    assert sorted(prompts(found.train) + prompts(found.test)) == ["a0", "a1", "b0", "b1"]


@pytest.mark.parametrize("count", [3, 25])
def test_num_samples_takes_fewer_or_repeats(tmp_path: Path, count: int) -> None:
    write(tmp_path / "a.jsonl", pairs(10, "a"))
    folder = registry(tmp_path, a={"file_name": "a.jsonl", "num_samples": count})
    times = Counter(prompts(load(folder, "a").train))
    assert times.total() == count
    assert len(times) == min(count, 9), "one row of ten is held out"


def test_hub_names_subsets_and_folders_reach_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[Any] = []

    def answer(*words: Any, **named: Any) -> Any:
        asked.append((words, named))
        return {"part": datasets.Dataset.from_list(pairs(4, "h"))}

    monkeypatch.setattr(datasets, "load_dataset", answer)
    entry = {
        "hf_hub_url": "some/where",
        "file_name": "not.json",
        "subset": "en",
        "split": "part",
        "folder": "deep",
    }
    assert len(load(registry(tmp_path, h=entry), "h").train) == 4 - 1
    assert asked == [(("some/where", "en"), {"data_dir": "deep"})]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"file_nam": "a"}, "'a': unknown key 'file_nam'. Did you mean 'file_name'?"),
        (
            {"file_name": "a", "columns": {"promt": "x"}},
            "columns: unknown key 'promt'. Did you mean 'prompt'?",
        ),
        (
            {"file_name": "a", "tags": {"role_tga": "x"}},
            "tags: unknown key 'role_tga'. Did you mean 'role_tag'?",
        ),
        ({"file_name": "a", "formatting": "sharegtp"}, "Did you mean 'sharegpt'?"),
        ({"ms_hub_url": "a/b"}, "ms_hub_url is not read here. Download the data"),
        ({"script_url": "a"}, "script_url is not read here"),
        ({"cloud_file_name": "s3://a"}, "cloud_file_name is not read here"),
        ({}, "no source. Give file_name or hf_hub_url"),
        ({"file_name": "a", "num_samples": 0}, "num_samples must be a whole number above 0"),
        ("a.json", "must be an object, not a str"),
        (
            {"file_name": "a.jsonl", "columns": {"prompt": "promtp"}},
            "is 'promtp', a column that",
        ),
    ],
)
def test_faulty_entries_are_named(tmp_path: Path, entry: Any, expected: str) -> None:
    write(tmp_path / "a.jsonl", pairs(3, "a"))
    assert expected in fault(registry(tmp_path, a=entry), "a")


def test_an_unknown_name_gets_a_suggestion_and_a_path_is_a_path(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", pairs(3, "a"))
    folder = registry(tmp_path, alpaca={"file_name": "a.jsonl"})
    assert "Unknown data set 'alpca'. Did you mean 'alpaca'?" in fault(folder, "alpca")
    assert load(folder, str(file)) == load_rows(DataConfig(path=str(file)), 0)


def test_a_registry_that_is_none_is_named(tmp_path: Path) -> None:
    assert "there is no" in fault(tmp_path, "a")
    (tmp_path / "dataset_info.json").write_text("{oops")
    assert "dataset_info.json:1: not JSON" in fault(tmp_path, "a")
    (tmp_path / "dataset_info.json").write_text("[]")
    assert "top level must be an object" in fault(tmp_path, "a")


# --- mixing ---------------------------------------------------------------------------------------


def mix(sizes: list[int], how: Mix, weights: list[float] | None = None) -> list[str]:
    sources = [[f"{chr(97 + n)}{i}" for i in range(size)] for n, size in enumerate(sizes)]
    opened = [partial(iter, rows) for rows in sources]
    return list(mixed(opened, how, weights=weights, generator=rng(0, "mix")))


@pytest.mark.parametrize("sizes", [[3, 5, 4], [1, 1], [6, 2]])
@pytest.mark.parametrize(
    ("how", "theirs"),
    [("interleave-under", "first_exhausted"), ("interleave-over", "all_exhausted")],
)
def test_taking_in_turn_is_what_datasets_does(sizes: list[int], how: Any, theirs: Any) -> None:
    import datasets

    parts = [
        datasets.Dataset.from_dict({"x": [f"{chr(97 + n)}{i}" for i in range(size)]})
        for n, size in enumerate(sizes)
    ]
    expected = datasets.interleave_datasets(parts, stopping_strategy=theirs)["x"]
    assert mix(sizes, how) == list(expected)


def test_weights_decide_how_often_a_source_is_drawn() -> None:
    found = Counter(item[0] for item in mix([5000, 5000], "interleave-under", [3.0, 1.0]))
    assert found["a"] == 5000
    assert found["b"] / found["a"] == pytest.approx(1 / 3, abs=0.03)
    assert mix([50, 50], "interleave-under", [3, 1]) == mix([50, 50], "interleave-under", [3, 1])


def test_drawing_over_repeats_the_short_source_and_loses_no_row() -> None:
    found = mix([3, 200], "interleave-over", [1.0, 1.0])
    assert set(found) == {f"a{i}" for i in range(3)} | {f"b{i}" for i in range(200)}
    assert Counter(found)["a0"] > 10
    assert max(Counter(item for item in found if item[0] == "b").values()) == 1


def test_mixing_holds_one_row_of_each_source() -> None:
    def endless(name: str) -> Any:
        number = 0
        while True:
            yield f"{name}{number}"
            number += 1

    sources = [partial(endless, "a"), partial(endless, "b")]
    found = mixed(sources, "interleave-over", weights=None, generator=np.random.default_rng(0))
    assert list(islice(found, 4)) == ["a0", "b0", "a1", "b1"]


def test_an_empty_source_cannot_be_mixed() -> None:
    with pytest.raises(DataError, match="source 2 has no rows"):
        mix([2, 0], "interleave-under")


def test_several_paths_are_mixed_after_rows_are_held_out(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / f"{n}.jsonl", pairs(20, n))) for n in "ab"]
    rows = load_rows(DataConfig(path=paths, mix="interleave-over", mix_weights=[9, 1]), 0)
    assert {p[0] for p in prompts(rows.test)} == {"a", "b"}
    assert len(rows.test) == 4
    assert not set(prompts(rows.train)) & set(prompts(rows.test))
    assert set(prompts(rows.train)) | set(prompts(rows.test)) == {
        f"{n}{i}" for n in "ab" for i in range(20)
    }
    assert "a.jsonl" in rows.source
    assert "b.jsonl" in rows.source


def test_each_source_gives_at_most_so_many_rows(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / f"{n}.jsonl", pairs(20, n))) for n in "ab"]
    rows = load_rows(DataConfig(path=paths, max_rows_per_source=5), 0)
    assert Counter(p[0] for p in prompts(rows.train)) == {"a": 5, "b": 5}


def test_the_test_split_of_one_path_serves_for_all(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    write(tmp_path / "f" / "train.jsonl", pairs(5, "a"))
    write(tmp_path / "f" / "test.jsonl", pairs(3, "t"))
    other = write(tmp_path / "b.jsonl", pairs(5, "b"))
    rows = load_rows(DataConfig(path=[str(tmp_path / "f"), str(other)]), 0)
    assert prompts(rows.test) == ["t0", "t1", "t2"]
    assert len(rows.train) == 10


def test_rows_of_different_kinds_are_not_mixed(tmp_path: Path) -> None:
    talk = write(tmp_path / "a.jsonl", pairs(3, "a"))
    text = write(tmp_path / "b.jsonl", [{"text": "words"}] * 3)
    with pytest.raises(DataError, match=r"cannot be mixed: the rows of one are 'talk'"):
        load_rows(DataConfig(path=[str(talk), str(text)]), 0)


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mix_weights": [1]}, "mix: concat draws none"),
        ({"mix": "interleave-under", "mix_weights": [1, 2]}, "2 numbers for 1 paths"),
        ({"train_on_prompt": True, "mask_history": True}, "exclude each other"),
        ({"mix": "interleave-undr"}, "Did you mean 'interleave-under'"),
        ({"max_broken_share": 2}, "data.max_broken_share"),
    ],
)
def test_settings_that_disagree_are_refused(settings: dict[str, Any], expected: str) -> None:
    config, problems = validate({"data": settings})
    assert config is None
    assert expected in " ".join(problems)


def test_a_json_configuration_loads(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{\n\t"data": {"path": "builtin:skills", "max_length": 1e2}\n}')
    config, problems = validate(read(file))
    assert problems == []
    assert config is not None
    assert config.data.max_length == 100
    file.write_text("{\n oops")
    with pytest.raises(ConfigError, match="line 2, column 2: not valid JSON"):
        read(file)


def test_text_files_are_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\n")
    rows = load_rows(DataConfig(path=str(tmp_path / "a.txt")), 0)
    assert rows.task == "text"
    assert {row.text for row in (*rows.train, *rows.test)} == {"one", "two", "three"}
