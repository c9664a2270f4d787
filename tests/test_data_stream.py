from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import tiny_tokenizer

from fedllm.config import DataConfig
from fedllm.data import StreamedRow, load_dataset, stream_rows
from fedllm.errors import DataError


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"how many {i}", "completion": f"{i} apples"} for i in range(count)]


def stream(path: str, epoch: int = 0, **settings: Any) -> Iterator[StreamedRow]:
    config = DataConfig(path=path, streaming=True, **settings)
    return stream_rows(config, tiny_tokenizer(), seed=0, epoch=epoch)


def test_a_local_file_streams_the_tokens_that_loading_gives(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(150))
    config = DataConfig(path=path, test_path=path, cache=False)
    whole = load_dataset(config, tiny_tokenizer(), kind="causal-lm", seed=0)
    streamed = {row.row.where: row for row in stream(path)}
    assert len(streamed) == 150
    for i, row in enumerate(whole.rows.train):
        tokens, supervised = whole.train.row(i)
        found = streamed[row.where]
        assert found.tokens.tolist() == tokens.tolist()
        assert found.supervised.tolist() == supervised.tolist()
        assert found.prompt_length == whole.train.prompt_lengths[i]


def test_the_order_follows_from_seed_and_epoch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(50))
    one, same, other = ([r.row.where for r in stream(path, e)] for e in (0, 0, 1))
    assert one == same
    assert one != other
    assert sorted(one) == sorted(other)


def test_a_long_file_is_read_no_further_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedllm.data import sources
    from fedllm.data.formats import iter_file

    path = write(tmp_path / "a.jsonl", pairs(5000))
    read: list[str] = []

    def counted(file: Path) -> Any:
        for record in iter_file(file):
            read.append(record[0])
            yield record

    monkeypatch.setattr(sources, "iter_file", counted)
    assert len(list(islice(stream(path), 64))) == 64
    assert len(read) < 1400, "a buffer of a thousand, a chunk, and the rows looked at"


def test_pairs_are_streamed_with_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "good", "rejected": "bad bad"}] * 3
    for row in stream(write(tmp_path / "a.jsonl", rows)):
        assert row.rejected is not None
        prompt = row.tokens[: row.prompt_length].tolist()
        assert row.rejected.tokens[: row.rejected.prompt_length].tolist() == prompt


def test_broken_rows_are_left_out_up_to_a_share(tmp_path: Path) -> None:
    rows = [*pairs(150), {"prompt": "no answer"}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"a\.jsonl:151: 'completion' is missing"):
        list(stream(path))
    assert len(list(stream(path, max_broken_share=0.05))) == 150


def test_limits_end_the_stream(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(50))
    assert len(list(stream(path, max_train_rows=7))) == 7
    assert len(list(stream(path, max_rows_per_source=9))) == 9
    with pytest.raises(DataError, match="no training row is within"):
        list(stream(path, max_length=3))


def test_folders_and_builtin_data_stream(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.jsonl", pairs(3))
    write(tmp_path / "train-00001-of-00002.jsonl", pairs(4))
    assert len(list(stream(str(tmp_path)))) == 7
    assert len(list(islice(stream("builtin:skills"), 5))) == 5


def test_hub_data_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def answer(*words: Any, **named: Any) -> Any:
        asked.append((words, named))
        return datasets.Dataset.from_list(pairs(4)).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert len(list(stream("some/where"))) == 4
    assert asked[0] == (("some/where", None), {"split": "train", "streaming": True})


def test_a_federation_cannot_stream(tmp_path: Path) -> None:
    config = DataConfig(path=write(tmp_path / "a.jsonl", pairs(5)), streaming=True)
    with pytest.raises(DataError, match=r"data\.streaming: .* cannot be streamed"):
        load_dataset(config, tiny_tokenizer(), kind="causal-lm", seed=0)
