"""Every real row, for every family of templates, against what transformers alone makes of it."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import CONTROLS, FAMILIES, tiny_tokenizer

from fedllm.config import DataConfig
from fedllm.data import Dataset, TokenSet, load_dataset

pytestmark = [pytest.mark.realdata, pytest.mark.slow]

OWN = ("llama3.1", "qwen2.5-tools", "qwen3-tools", "gemma", "mistral")
ENDS = {
    "llama3.1": "<|eot_id|>",
    "qwen2.5-tools": "<|im_end|>",
    "qwen3-tools": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
}
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
Talk = list[dict[str, Any]]


@cache
def tokenizer_of(family: str) -> Any:
    assert family in FAMILIES
    return tiny_tokenizer(family)


def file_of(name: str) -> Path:
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("FEDLLM_REAL_DATA", root.parent / "shared" / "data"))
    file = folder / "instruct" / f"{name}.json"
    if not file.exists():
        pytest.skip(f"{file} is not here; set FEDLLM_REAL_DATA to the folder that has instruct/")
    return file


def turns_of(record: dict[str, Any], family: str) -> tuple[Talk, list[Any]]:
    """Rewrite a raw row in OpenAI's shape, without any code of ours."""
    if "instruction" in record:
        asked = "\n".join(part for part in (record["instruction"], record["input"]) if part)
        pair = [("user", asked), ("assistant", record["output"])]
        return [{"role": role, "content": text} for role, text in pair], []
    if "messages" in record:
        return [dict(turn) for turn in record["messages"]], []
    talk: Talk = []
    for turn in record["conversations"]:
        if turn["from"] == "function_call":
            call = {"type": "function", "function": json.loads(turn["value"])}
            talk.append({"role": "assistant", "content": "", "tool_calls": [call]})
        else:
            role = ROLES.get(turn["from"], turn["from"])
            talk.append({"role": role, "content": turn["value"]})
    tools = json.loads(record.get("tools") or "[]")
    return talk, [{"type": "function", "function": tool} for tool in tools]


def written(family: str, talk: Talk, tools: list[Any], *, generation: bool) -> str:
    return str(
        tokenizer_of(family).apply_chat_template(
            talk,
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=generation,
            date_string="26 Jul 2024",
        )
    )


def ids(family: str, text: str) -> list[int]:
    return list(tokenizer_of(family)(text, add_special_tokens=False)["input_ids"])


def compare(
    family: str, tokens: TokenSet, row: int, talk: Talk, tools: list[Any], *, only_last: bool
) -> bool:
    """Assert one row's prompt, tokens and mask; return whether the whole could be compared."""
    found, mask = tokens.row(row)
    length = int(tokens.prompt_lengths[row])
    assert mask[length:].all()
    if any(control in str(talk) for control in CONTROLS):  # some rows do hold "</s>"
        ours = [token for token in found.tolist() if token in control_ids(family)]
        assert len(ours) == frame_tokens(family, talk, tools)
        return False
    prompt = written(family, talk[:-1], tools, generation=True)
    assert found[:length].tolist() == ids(family, prompt)
    full = written(family, talk, tools, generation=False)
    if not full.startswith(prompt):  # the template rewrites the past once there is an answer
        return False
    end = ENDS[family]
    expected = ids(family, full[: full.index(end, len(prompt)) + len(end)])
    if expected[:length] != found[:length].tolist():  # a token would reach over the boundary
        return False
    assert found.tolist() == expected
    expected_mask = np.zeros(len(expected), bool)
    for i, turn in enumerate(talk):
        if turn["role"] == "assistant" and (i == len(talk) - 1 or not only_last):
            before = written(family, talk[:i], tools, generation=True)
            if full.startswith(before):
                stop = full.index(end, len(before)) + len(end)
                expected_mask[len(ids(family, before)) : len(ids(family, full[:stop]))] = True
    assert mask.tolist() == expected_mask.tolist()
    return True


@cache
def control_ids(family: str) -> set[int]:
    return set(tokenizer_of(family).convert_tokens_to_ids(list(CONTROLS)))


def frame_tokens(family: str, talk: Talk, tools: list[Any]) -> int:
    """Count the control tokens that the template itself writes around the same roles."""
    empty = [{**turn, "content": "x"} for turn in talk]
    prompt = written(family, empty[:-1], tools, generation=True)
    answer = written(family, empty, tools, generation=False)
    answer = answer[len(prompt) :] if answer.startswith(prompt) else ENDS[family]
    answer = answer[: answer.index(ENDS[family]) + len(ENDS[family])]
    found = ids(family, prompt) + ids(family, answer)
    return sum(token in control_ids(family) for token in found)


def load(name: str, family: str) -> tuple[Dataset, dict[str, dict[str, Any]]]:
    file = file_of(name)
    config = DataConfig(
        path=str(file), max_length=100_000, cache=False, max_broken_share=0.9, holdout=0.1
    )
    data = load_dataset(config, tokenizer_of(family), kind="causal-lm", seed=0)
    records = json.loads(file.read_text(encoding="utf-8"))
    return data, {f"{file.name}: row {n}": r for n, r in enumerate(records, start=1)}


def with_short_ids(family: str, talk: Talk, ours: Any) -> Talk:
    """Mistral's templates need ids, which ShareGPT has not: take those of the renderer."""
    from fedllm.data.render import make_renderer

    renderer = make_renderer(tokenizer_of(family), tokenizer_of(family).chat_template)
    return renderer._turns(ours) if family == "mistral" else talk


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("name", ["alpaca_en_demo", "identity", "kto_en_demo"])
def test_conversations_are_those_of_transformers(name: str, family: str) -> None:
    data, records = load(name, family)
    assert not data.dropped
    whole = total = 0
    for tokens, rows in ((data.train, data.rows.train), (data.test, data.rows.test)):
        for i, row in enumerate(rows):
            talk, tools = turns_of(records[row.where], family)
            whole += compare(family, tokens, i, talk, tools, only_last=data.task == "rated")
            total += 1
            if data.task == "rated":
                assert tokens.desirable is not None
                assert tokens.desirable[i] == records[row.where]["label"]
    assert total == len(records)
    assert whole / total > 0.95


@pytest.mark.parametrize("family", OWN)
def test_tool_calls_are_those_of_transformers(family: str) -> None:
    if family == "gemma":
        pytest.skip("Gemma's template writes no tools")
    data, records = load("glaive_toolcall_en_demo", family)
    whole = total = 0
    for tokens, rows in ((data.train, data.rows.train), (data.test, data.rows.test)):
        for i, row in enumerate(rows):
            talk, tools = turns_of(records[row.where], family)
            talk = talk[: len(row.messages)]
            talk = with_short_ids(family, talk, row.messages)
            whole += compare(family, tokens, i, talk, tools, only_last=False)
            total += 1
    assert total == len(records) - sum(data.dropped.values())
    assert total > 0.9 * len(records)
    if family != "mistral":  # which moves the tools to the last question
        assert whole / total > 0.95


@pytest.mark.parametrize("family", OWN)
def test_pairs_are_those_of_transformers(family: str) -> None:
    data, records = load("dpo_en_demo", family)
    worse = data.train.rejected
    assert worse is not None
    whole = 0
    for i, row in enumerate(data.rows.train):
        record = records[row.where]
        asked, tools = turns_of(record, family)
        for tokens, side in ((data.train, "chosen"), (worse, "rejected")):
            answer = {"role": "assistant", "content": record[side]["value"]}
            whole += compare(family, tokens, i, [*asked, answer], tools, only_last=True)
    assert len(data.train) + len(data.test) + sum(data.dropped.values()) == len(records)
    if family != "mistral":
        assert whole / (2 * len(data.train)) > 0.98
