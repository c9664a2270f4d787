"""The built-in data set and model: reproducible, honest about their split, small, and usable."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from fedllm.data.builtin import (
    BUILTIN_DATASETS,
    DEFAULT_ROWS,
    preferences,
    ratings,
    skills,
    texts,
)
from fedllm.data.skills import CATEGORIES
from fedllm.data.skills.knowledge import RELATIONS, TOWNS, world
from fedllm.errors import ConfigError

TINY = Path(__file__).parents[1] / "src/fedllm/models/builtin/tiny"
GOLDEN = {"train": "88cf17e50ac511eb", "test": "5d1183a821fc45a2"}


def _digest(rows: list[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_default_rows_never_change(split: str) -> None:
    assert _digest(skills(split)) == GOLDEN[split]


def test_seeds_give_different_rows() -> None:
    assert skills("train", rows=50, seed=1) != skills("train", rows=50, seed=2)


@pytest.mark.parametrize("split", ["train", "test"])
def test_categories_are_balanced_and_prompts_unique(split: str) -> None:
    rows = skills(split)
    counts = Counter(row["category"] for row in rows)
    assert len(rows) == DEFAULT_ROWS[split]
    assert len(counts) == len(CATEGORIES) >= 8
    assert set(counts.values()) == {DEFAULT_ROWS[split] // len(CATEGORIES)}
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(set(row) == {"prompt", "completion", "category"} for row in rows)


def test_an_uneven_number_of_rows_is_spread_evenly() -> None:
    counts = Counter(row["category"] for row in skills("test", rows=23))
    assert sum(counts.values()) == 23
    assert max(counts.values()) - min(counts.values()) == 1


def test_no_seed_and_no_size_leaks_test_prompts_into_training() -> None:
    test = {row["prompt"] for seed in (0, 1) for row in skills("test", rows=400, seed=seed)}
    train = {row["prompt"] for seed in (0, 2) for row in skills("train", rows=3000, seed=seed)}
    assert not test & train


def test_arithmetic_answers_are_right() -> None:
    rows = [row for row in skills() if row["category"] == "arithmetic"]
    for row in rows:
        sum_, total = row["completion"].split("\n#### ")
        left, sign, right, equals, shown = sum_.split()
        one, two = int(left), int(right)
        assert {"+": one + two, "-": one - two, "x": one * two}[sign] == int(total) == int(shown)
        assert equals == "="
        assert left in row["prompt"]
        assert right in row["prompt"]


def test_the_invented_world_has_one_value_for_every_town_and_relation() -> None:
    facts = world()
    assert len(facts) == len(TOWNS) * len(RELATIONS)
    for (relation, _), value in facts.items():
        assert value in RELATIONS[relation]


def test_unknown_splits_and_negative_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Unknown split 'dev'.*test, train"):
        skills("dev")
    with pytest.raises(ConfigError, match="not -1"):
        skills("test", rows=-1)


def test_the_table_of_built_in_data_sets_is_one_line_each() -> None:
    assert set(BUILTIN_DATASETS) == {"skills", "preferences", "ratings", "texts"}
    assert all("\n" not in line for line in BUILTIN_DATASETS.values())


def test_other_shapes_hold_the_rows_of_skills_with_right_and_wrong_answers() -> None:
    whole = skills("test", rows=40)
    pairs, rated = preferences("test", rows=40), ratings("test", rows=40)
    assert [row["chosen"] for row in pairs] == [row["completion"] for row in whole]
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    right = [
        rate["completion"] == row["completion"] for rate, row in zip(rated, whole, strict=True)
    ]
    assert right == [row["label"] for row in rated]
    assert sum(right) == 20
    assert [row["text"] for row in texts("test", rows=40)] == [
        f"{row['prompt']} {row['completion']}" for row in whole
    ]


def test_the_model_folder_is_small_and_has_a_card() -> None:
    files = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert sum(files.values()) <= 8e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    card = (TINY / "README.md").read_text(encoding="utf-8")
    assert "scripts/pretrain_tiny.py" in card
    assert "license: apache-2.0" in card


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


@pytest.mark.parametrize(
    "text",
    [
        "Mia has 12 apples.",
        "naïve 日本語 🙂\t\n\n  two  spaces ",
        "#### 7",
        "x" * 300,
        "\x00\x7f\r\n",
    ],
)
def test_the_tokenizer_gives_any_text_back(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_separate_tokens(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert len(tokenizer("12345").input_ids) == 5


def test_pad_and_end_of_turn_are_different_tokens(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer("<|end|>").input_ids == [tokenizer.eos_token_id]


def test_the_prompt_of_a_chat_is_a_prefix_of_the_whole(tokenizer) -> None:  # type: ignore[no-untyped-def]
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello! What can I do for you?"},
        {"role": "user", "content": "Which river flows through Velmar?"},
        {"role": "assistant", "content": "Asha"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    for end in (2, 4):
        prompt = tokenizer.apply_chat_template(
            messages[:end], tokenize=False, add_generation_prompt=True
        )
        answer = messages[end]["content"] + "<|end|>"
        assert whole.startswith(prompt + answer)
        ids = tokenizer(prompt).input_ids + tokenizer(answer).input_ids
        assert tokenizer(whole).input_ids[: len(ids)] == ids
    assert whole.endswith("Asha<|end|>")


@pytest.mark.slow
def test_the_model_speaks_the_language_of_the_tasks_but_does_not_know_the_answers(
    tokenizer,  # type: ignore[no-untyped-def]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    assert 1_000_000 <= model.num_parameters() <= 4_000_000
    assert model.config.model_type == "llama"
    rows = skills("test", rows=100)
    right = finished = 0
    for row in rows:
        turn = [{"role": "user", "content": row["prompt"]}]
        inputs = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        finished += int(output[-1] == tokenizer.eos_token_id)
        right += tokenizer.decode(output, skip_special_tokens=True) == row["completion"]
    assert finished >= 0.95 * len(rows)
    assert right <= 0.2 * len(rows)
