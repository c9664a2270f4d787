from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedllm.config import DataConfig, PartitionConfig
from fedllm.data import Message, Row, load_rows
from fedllm.data.formats import read_file
from fedllm.errors import DataError

PAIR = {"prompt": "how many", "completion": "42"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> tuple[Row, ...]:
    """Read rows as the training split, tested on themselves."""
    path = write(tmp_path / "rows.jsonl", rows)
    return load_rows(DataConfig(path=str(path), test_path=str(path), **settings), seed=0).train


def fault(path: Path | str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(DataConfig(path=str(path), **settings), seed=0)
    return str(caught.value)


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, [("user", "how many"), ("assistant", "42")]),
        ({"prompt": "q", "completion": 7}, [("user", "q"), ("assistant", "7")]),
        (
            {"system": "be brief", "prompt": "q", "response": "a"},
            [("system", "be brief"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {"instruction": "add", "input": "1 2", "output": "3"},
            [("user", "add\n1 2"), ("assistant", "3")],
        ),
        ({"instruction": "hi", "input": "", "output": "yo"}, [("user", "hi"), ("assistant", "yo")]),
        ({"question": "q", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            [("user", "q"), ("assistant", "a")],
        ),
        (
            {
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "a"},
                    {"from": "human", "value": "thanks"},
                ],
            },
            [
                ("system", "s"),
                ("user", "q"),
                ("assistant", ""),
                ("tool", "1"),
                ("assistant", "a"),
            ],
        ),
    ],
)
def test_conversations_are_recognised_from_their_columns(
    tmp_path: Path, row: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    (found,) = rows_of(tmp_path, [row])
    assert [(m.role, m.content) for m in found.messages] == expected
    assert found.where == "rows.jsonl:1"
    assert found.text is None


@pytest.mark.parametrize("name", ["text", "sentence"])
def test_labelled_texts_are_recognised(tmp_path: Path, name: str) -> None:
    rows = rows_of(tmp_path, [{name: "good", "label": 1}, {name: "bad", "label": 0}])
    assert [(r.text, r.label, r.group, r.messages) for r in rows] == [
        ("good", "1", "1", ()),
        ("bad", "0", "0", ()),
    ]


def test_columns_told_are_added_to_those_recognised(tmp_path: Path) -> None:
    (row,) = rows_of(
        tmp_path,
        [{"ask": "q", "completion": "a", "text": "ignored", "kind": "sums"}],
        columns={"prompt": "ask", "category": "kind"},
    )
    assert row.messages == (Message("user", "q"), Message("assistant", "a"))
    assert row.group == "sums"


def test_told_columns_win_over_a_shape_that_fits_as_well(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c", "question": "q", "answer": "a"}
    (found,) = rows_of(tmp_path, [row], columns={"question": "question"})
    assert found.messages[0].content == "q"


def test_the_column_that_a_partition_goes_by_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**PAIR, "lang": "de", "user": 7, "category": "c"}])
    config = DataConfig(path=str(path), test_path=str(path))
    by_lang = load_rows(config, 0, partition=PartitionConfig(name="dirichlet", by="lang"))
    by_user = load_rows(config, 0, partition=PartitionConfig(name="column", by="user"))
    assert by_lang.train[0].group == "de"
    assert (by_user.train[0].client, by_user.train[0].group) == ("7", "c")
    with pytest.raises(DataError, match=r"partition\.by is 'usr'.*Did you mean 'user'"):
        load_rows(config, 0, partition=PartitionConfig(name="column", by="usr"))


# --- tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"question": "q", "answer": "1 + 1 = 2\n#### 2"}, "math"),
        (PAIR, "qa"),
        ({**PAIR, "completion": "long " * 50, "category": "c"}, "qa"),
        ({"instruction": "i", "output": "long " * 50}, "chat"),
        ({"text": "just text"}, "text"),
        (
            {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant") * 2]},
            "chat",
        ),
    ],
)
def test_the_task_is_recognised(tmp_path: Path, row: dict[str, Any], task: str) -> None:
    path = str(write(tmp_path / "a.jsonl", [row]))
    assert load_rows(DataConfig(path=path, test_path=path), 0).task == task


def test_a_told_task_chooses_among_the_shapes(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", [{"text": "good", "label": "pos"}]))
    rows = load_rows(DataConfig(path=path, test_path=path, task="text"), 0)
    assert (rows.task, rows.train[0].label) == ("text", None)
    assert "does not fit data.task 'math'" in fault(path, task="math")


def test_numeric_labels_are_ordered_by_value(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", [{"text": "t", "label": n} for n in (10, 9, 2)]))
    assert load_rows(DataConfig(path=path, test_path=path), 0).label_names == ("2", "9", "10")


# --- splits ---------------------------------------------------------------------------------------


def named(count: int, prefix: str) -> list[dict[str, str]]:
    return [{"prompt": f"{prefix}{i}", "completion": "a"} for i in range(count)]


def prompts(rows: tuple[Row, ...]) -> list[str]:
    return [row.messages[0].content for row in rows]


@pytest.mark.parametrize("test_name", ["test", "validation", "dev"])
def test_official_splits_of_a_folder_stay_apart(tmp_path: Path, test_name: str) -> None:
    write(tmp_path / "train.jsonl", named(5, "train"))
    write(tmp_path / f"{test_name}.jsonl", named(3, "test"))
    rows = load_rows(DataConfig(path=str(tmp_path)), seed=0)
    assert prompts(rows.train) == [f"train{i}" for i in range(5)]
    assert prompts(rows.test) == [f"test{i}" for i in range(3)]


def test_test_wins_over_validation_unless_told(tmp_path: Path) -> None:
    for name in ("train", "test", "validation"):
        write(tmp_path / f"{name}.jsonl", named(2, name))
    auto = load_rows(DataConfig(path=str(tmp_path)), 0)
    told = load_rows(DataConfig(path=str(tmp_path), test_split="validation"), 0)
    assert prompts(auto.test) == ["test0", "test1"]
    assert prompts(told.test) == ["validation0", "validation1"]
    assert "Did you mean 'validation'" in fault(tmp_path, test_split="validatoin")
    assert "Did you mean 'train'" in fault(tmp_path, train_split="trayn")
    assert "both 'train'" in fault(tmp_path, test_split="train")


def test_parts_of_a_split_are_joined_and_doubles_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.jsonl", named(2, "a"))
    write(tmp_path / "train-00001-of-00002.jsonl", named(2, "b"))
    rows = load_rows(DataConfig(path=str(tmp_path), holdout=0.25), 0)
    assert sorted(prompts(rows.train) + prompts(rows.test)) == ["a0", "a1", "b0", "b1"]
    write(tmp_path / "train.jsonl", named(2, "c"))
    assert "several files" in fault(tmp_path)


def test_the_hold_out_follows_the_seed_and_loses_no_row(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", named(50, "r")))
    config = DataConfig(path=path, holdout=0.2)
    one, same, other = (load_rows(config, seed) for seed in (1, 1, 2))
    assert one == same
    assert prompts(one.test) != prompts(other.test)
    assert len(one.test) == 10
    assert sorted(prompts(one.train) + prompts(one.test)) == sorted(f"r{i}" for i in range(50))


def test_a_hold_out_never_takes_the_last_row_of_a_label(tmp_path: Path) -> None:
    labels = ["common"] * 20 + ["rare", "pair", "pair"]
    path = str(write(tmp_path / "a.jsonl", [{"text": "t", "label": name} for name in labels]))
    for seed in range(20):
        rows = load_rows(DataConfig(path=path, holdout=0.9), seed)
        assert {row.label for row in rows.train} == set(labels)


def test_limits_choose_by_the_seed_and_keep_the_order(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", named(50, ""))
    write(tmp_path / "test.jsonl", named(50, ""))
    config = DataConfig(path=str(tmp_path), max_train_rows=10, max_test_rows=5)
    one, same, other = (load_rows(config, seed) for seed in (1, 1, 2))
    assert one == same
    assert prompts(one.train) != prompts(other.train)
    assert (len(one.train), len(one.test)) == (10, 5)
    numbers = [int(text) for text in prompts(one.train)]
    assert numbers == sorted(set(numbers))


def test_builtin_skills_are_read_with_categories() -> None:
    rows = load_rows(DataConfig(path="builtin:skills", max_train_rows=20), 0)
    assert rows.task == "qa"
    assert len({row.group for row in rows.train}) > 1
    assert "Did you mean 'skills'" in fault("builtin:skils")


# --- files ----------------------------------------------------------------------------------------

CELLS = [{"text": 'he said "no"', "label": "a"}, {"text": "comma, line\nbreak", "label": "b"}]


def save(path: Path, rows: list[dict[str, str]]) -> None:
    import csv

    import pyarrow as arrow
    import pyarrow.parquet as parquet

    match path.suffix:
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".jsonl":
            write(path, rows)
        case ".parquet":
            parquet.write_table(arrow.Table.from_pylist(rows), path)
        case suffix:
            with path.open("w", newline="") as file:
                separator = "\t" if suffix == ".tsv" else ","
                table = csv.DictWriter(file, list(rows[0]), delimiter=separator)
                table.writeheader()
                table.writerows(rows)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    save(path, CELLS)
    assert [dict(record) for _, record in read_file(path)] == CELLS


def test_json_variants_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in (
        json.dumps({"data": [PAIR]}),
        json.dumps(PAIR) + "\n\n",
        "\ufeff[" + json.dumps(PAIR) + "]",
    ):
        path.write_text(text, encoding="utf-8")
        assert [record for _, record in read_file(path)] == [PAIR]
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR), encoding="utf-8")
    assert [where for where, _ in read_file(path)] == ["a.json:1", "a.json:2"]


def test_lone_quotes_in_a_tsv_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('sentence\tlabel\n"good\t1\nan "ok" film\t0\n"all ""quoted"""\t1\n')
    texts = [record["sentence"] for _, record in read_file(path)]
    assert texts == ['"good', 'an "ok" film', 'all "quoted"']


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", "", "has no rows"),
        ("a.json", "  \n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "prompt,completion\n", "has no rows"),
        ("a.jsonl", '{"prompt": "a"}\n{oops\n', r"a.jsonl:2: not JSON"),
        ("a.json", '[\n{"prompt": "a"},\n{oops}]', r"a.json:3: not JSON"),
        ("a.json", '"text"', "top level must be a list"),
        ("a.jsonl", "[1]\n", "must be an object with named columns"),
        ("a.csv", "prompt,completion\na,b,c\n", "a.csv:2: 3 fields where the header has 2"),
        ("a.csv", 'prompt,completion\na,"b\n', "quotes do not match"),
        ("a.parquet", "not parquet", "not Parquet"),
        ("a.xlsx", "x", "cannot read a '.xlsx' file"),
        ("a.jsonl", '{"foo": 1, "bar": 2}\n', "not recognised. Columns: foo, bar"),
        ("a.jsonl", '{"promppt": 1, "completion": 2}\n', "Is 'promppt' meant as 'prompt'?"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n' * 2, "at least 2 different labels"),
        ("a.jsonl", '{"prompt": "p", "completion": "c"}\n', "too few to hold one out"),
    ],
)
def test_unusable_files_get_one_clear_message(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    (tmp_path / name).write_text(text)
    message = fault(tmp_path / name)
    assert expected in message
    assert name in message or "label" in message


def test_files_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    assert "not UTF-8" in fault(tmp_path / "a.jsonl")


def test_missing_files_get_a_suggestion(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [PAIR])
    assert "Did you mean 'train.jsonl'" in fault(tmp_path / "trayn.jsonl")
    assert "no such file" in fault(tmp_path / "train.jsonl", test_path=str(tmp_path / "no.jsonl"))
    assert "one file without splits" in fault(tmp_path / "train.jsonl", test_split="test")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    assert "no data files" in fault(tmp_path)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p"}, "'completion' is missing or empty"),
        ({"prompt": "p", "completion": " "}, "'completion' is missing or empty"),
        ({"prompt": None, "completion": "c"}, "'prompt' is missing or empty"),
    ],
)
def test_rows_without_an_answer_are_named_and_counted(
    tmp_path: Path, row: dict[str, Any], expected: str
) -> None:
    path = write(tmp_path / "a.jsonl", [PAIR, row, PAIR, row, row, row])
    message = fault(path)
    assert f"a.jsonl:2: {expected}" in message
    assert "4 rows cannot be used" in message
    assert "and 1 more" in message


def turn(role: str, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([turn("user")], "no message of the assistant"),
        ([turn("assistant")], "no message of a user"),
        ([turn("user"), turn("assisstantt")], "Did you mean 'assistant'"),
        ([turn("user"), turn("assistant", "")], "message 2 (assistant) is empty"),
        ([turn("user", None), turn("assistant")], "message 1 (user) needs text"),
        (["hello"], "message 1 must be an object"),
        ("hello", "must be a list of messages"),
        (
            [turn("user"), {**turn("assistant", None), "tool_calls": [{}]}],
            "a tool call without a name",
        ),
    ],
)
def test_faulty_conversations_are_named(tmp_path: Path, messages: Any, expected: str) -> None:
    message = fault(write(tmp_path / "a.jsonl", [{"messages": messages}]))
    assert "a.jsonl:1" in message
    assert expected in message


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"promppt": "prompt"}, "unknown name 'promppt'. Did you mean 'prompt'?"),
        ({"prompt": "pormpt"}, "Did you mean 'prompt'? Its columns: prompt, completion"),
    ],
)
def test_wrong_columns_get_a_suggestion(
    tmp_path: Path, columns: dict[str, str], expected: str
) -> None:
    assert expected in fault(write(tmp_path / "a.jsonl", [PAIR, PAIR]), columns=columns)


def test_a_label_that_only_test_has_is_refused_where_it_stands(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "t", "label": name} for name in ("pos", "neg")])
    write(tmp_path / "test.jsonl", [{"text": "t", "label": name} for name in ("pos", "ngv", "ngv")])
    message = fault(tmp_path)
    assert "test.jsonl:2: the label 'ngv' (2 of 3 test rows)" in message


def test_splits_of_different_shapes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [PAIR])
    write(tmp_path / "test.jsonl", [{"question": "q", "answer": "a"}])
    assert "Give both the same columns" in fault(tmp_path)


# --- the hub --------------------------------------------------------------------------------------


def test_an_unreachable_hub_gets_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = fault("someone/something")
    assert "'someone/something' is no file or folder here" in message
    assert "Couldn't reach the Hub. Check the name, data.subset and the network" in message


def test_hub_splits_and_class_names_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )

    def split(labels: list[int]) -> Any:
        columns = {"sentence": ["a"] * len(labels), "label": labels}
        return datasets.Dataset.from_dict(columns, features=features)

    found = {"train": split([0, 1]), "validation": split([1]), "test": split([-1])}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: found)
    rows = load_rows(DataConfig(path="glue", subset="sst2", test_split="validation"), 0)
    assert [row.label for row in (*rows.train, *rows.test)] == ["neg", "pos", "pos"]
    assert "hidden labels have -1" in fault("glue")
