from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import tiny_tokenizer

from fedllm.config import DataConfig
from fedllm.data import Dataset, Message, Row, ToolCall, load_dataset, load_rows, read_messages
from fedllm.errors import DataError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}
WORSE = {"role": "assistant", "content": "bad"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> tuple[Row, ...]:
    path = write(tmp_path / "rows.jsonl", list(rows))
    return load_rows(DataConfig(path=path, test_path=path, **settings), seed=0).train


def load(
    tmp_path: Path, rows: list[dict[str, Any]], *, family: str = "qwen2.5-tools", **settings: Any
) -> Dataset:
    path = write(tmp_path / "rows.jsonl", rows)
    config = DataConfig(path=path, **{"test_path": path, "cache": False, **settings})
    return load_dataset(config, tiny_tokenizer(family), kind="causal-lm", seed=0)


def said(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in messages]


def learned(data: Dataset, family: str = "qwen2.5-tools", row: int = 0) -> str:
    tokens, supervised = data.train.row(row)
    return str(tiny_tokenizer(family).decode(tokens[supervised]))


# --- shapes ---------------------------------------------------------------------------------------


def test_alpaca_history_comes_before_the_question(tmp_path: Path) -> None:
    (row,) = rows_of(
        tmp_path,
        {
            "instruction": "and 3?",
            "input": "",
            "output": "9",
            "system": "squares",
            "history": [["2?", "4"]],
        },
    )
    assert said(row.messages) == [
        ("system", "squares"),
        ("user", "2?"),
        ("assistant", "4"),
        ("user", "and 3?"),
        ("assistant", "9"),
    ]


def test_parts_of_content_are_joined_and_images_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = read_messages([{"role": "user", "content": parts}])
    assert message.content == "ab"
    with pytest.raises(DataError, match=r"the request: message 1 .* no text, but 'image_url'"):
        read_messages([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


def test_openai_calls_and_results_are_read() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "developer", "content": "d"},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "c2"}]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        {"role": "tool", "content": "2", "tool_call_id": "c2", "name": "f"},
        ANSWER,
    ]
    messages = read_messages(turns)
    assert messages[0] == Message("system", "d")
    assert messages[2].tool_calls == (ToolCall("f", {"a": 1}, "c1"), ToolCall("f", {"a": 1}, "c2"))
    assert [(m.tool_call_id, m.name) for m in messages[3:5]] == [("c1", None), ("c2", "f")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("{oops", "arguments of 'f' is no JSON"), ("[1]", "are a list, no object")],
)
def test_faulty_arguments_are_named(arguments: str, expected: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(DataError, match=expected):
        read_messages([USER, {"role": "assistant", "content": "", "tool_calls": [call]}])


@pytest.mark.parametrize("form", ["list", "json", "wrapped"])
def test_tools_are_read_as_a_list_or_its_json(tmp_path: Path, form: str) -> None:
    function = {"name": "f", "parameters": {}}
    wrapped = {"type": "function", "function": function}
    tools: Any = {"list": [function], "json": json.dumps([function]), "wrapped": [wrapped]}[form]
    (row,) = rows_of(tmp_path, {"messages": [USER, ANSWER], "tools": tools})
    assert row.tools == (wrapped,)


def test_openai_rows_keep_their_system_prompt_unchanged(tmp_path: Path) -> None:
    own = {"messages": [{"role": "system", "content": " be brief "}, USER, ANSWER]}
    data = load(tmp_path, [own, {"messages": [USER, ANSWER]}])
    texts = [tiny_tokenizer("qwen2.5-tools").decode(data.train.row(i)[0]) for i in range(2)]
    assert "<|im_start|>system\n be brief <|im_end|>" in texts[0]
    assert "thinking" not in "".join(texts)


def test_two_clients_with_different_system_prompts_stay_apart(tmp_path: Path) -> None:
    row = {"messages": [USER, ANSWER]}
    texts = []
    for prompt in ("client A", "client B", None):
        data = load(tmp_path, [row], system_prompt=prompt)
        texts.append(tiny_tokenizer("qwen2.5-tools").decode(data.train.row(0)[0]))
    assert "client A" in texts[0]
    assert "client B" in texts[1]
    assert "client" not in texts[2]


def test_braces_and_control_tokens_of_the_user_survive(tmp_path: Path) -> None:
    question = "Vue prints {{idx}} and <|im_end|>"
    data = load(tmp_path, [{"prompt": question, "completion": "{{name}}"}])
    tokens, supervised = data.train.row(0)
    tokenizer = tiny_tokenizer("qwen2.5-tools")
    assert question in tokenizer.decode(tokens[~supervised])
    assert learned(data) == "{{name}}<|im_end|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (tokens == end).sum() == 3, "one for each turn, and none of the user's"


# --- weights and masks ----------------------------------------------------------------------------


def talk(*weights: Any) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for number, weight in enumerate(weights):
        turns.append({"role": "user", "content": f"q{number}"})
        turns.append({"role": "assistant", "content": f"a{number}", **weight})
    return {"messages": turns}


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
def test_answers_of_weight_0_are_read_and_not_learned(tmp_path: Path, off: Any) -> None:
    data = load(tmp_path, [talk(off, {"weight": 1}, off)])
    assert learned(data) == "a1<|im_end|>"
    text = tiny_tokenizer("qwen2.5-tools").decode(data.train.row(0)[0])
    assert "a0" in text
    assert "a2" not in text
    assert data.train.references == ("a1",)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ({"weight": 0.5}, "has the weight 0.5. Write 0 or 1"),
        ({"weight": True}, "has the weight True"),
        ({"train": 1}, "has train: 1. Write true or false"),
        ({"weight": 1, "train": False}, "disagree"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, weight: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        rows_of(tmp_path, talk(weight))


def test_masks_follow_the_settings(tmp_path: Path) -> None:
    rows = [talk({}, {})]
    assert learned(load(tmp_path, rows)) == "a0<|im_end|>a1<|im_end|>"
    assert learned(load(tmp_path, rows, mask_history=True)) == "a1<|im_end|>"
    everything = load(tmp_path, rows, train_on_prompt=True)
    assert everything.train.supervised.tolist() == [False] + [True] * (
        len(everything.train.tokens) - 1
    )
    assert np.array_equal(
        everything.train.prompt_lengths, load(tmp_path, rows).train.prompt_lengths
    )


# --- preferences and ratings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        {"question": "q", "chosen": ANSWER, "rejected": WORSE},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
        {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
    ],
)
def test_preference_pairs_are_recognised(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", [row])
    found = load_rows(DataConfig(path=path, test_path=path), 0)
    assert found.task == "preference"
    assert said(found.train[0].messages) == [("user", "q"), ("assistant", "good")]
    assert said(found.train[0].rejected) == [("user", "q"), ("assistant", "bad")]


def test_pairs_become_aligned_tokens_with_one_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q " * n, "chosen": "good " * a, "rejected": "bad " * b}
        for n, a, b in ((1, 1, 2), (1, 1, 99), (1, 99, 1), (3, 2, 1))
    ]
    data = load(tmp_path, rows, max_length=150)
    assert data.dropped == {"overlong": 4}, "both splits lose both pairs with a long side"
    assert [row.where for row in data.rows.train] == ["rows.jsonl:1", "rows.jsonl:4"]
    worse = data.train.rejected
    assert worse is not None
    for i in range(2):
        prompt = int(data.train.prompt_lengths[i])
        assert prompt == worse.prompt_lengths[i]
        (better_tokens, better_mask), (tokens, mask) = data.train.row(i), worse.row(i)
        assert better_tokens[:prompt].tolist() == tokens[:prompt].tolist()
        assert not mask[:prompt].any()
        assert mask[prompt:].all()
        assert better_mask[prompt:].all()
    assert [r.strip() for r in worse.references] == ["bad bad", "bad"]


def test_shortened_pairs_keep_one_prompt(tmp_path: Path) -> None:
    row = {"prompt": "q " * 20, "chosen": "good " * 90, "rejected": "bad"}
    data = load(tmp_path, [row], max_length=200, overlong="truncate")
    worse = data.train.rejected
    assert worse is not None
    assert data.truncated == 2
    prompt = int(data.train.prompt_lengths[0])
    assert prompt == worse.prompt_lengths[0]
    assert data.train.tokens[:prompt].tolist() == worse.tokens[:prompt].tolist()
    assert len(data.train.tokens) == 200


def test_pairs_learn_the_last_answer_alone(tmp_path: Path) -> None:
    head = [USER, {"role": "assistant", "content": "before"}, USER]
    data = load(tmp_path, [{"chosen": [*head, ANSWER], "rejected": [*head, WORSE]}])
    assert learned(data) == "good<|im_end|>"


def test_pairs_can_be_learned_as_conversations(tmp_path: Path) -> None:
    data = load(tmp_path, [{"prompt": "q", "chosen": "good", "rejected": "bad"}], task="chat")
    assert (data.task, data.train.rejected) == ("chat", None)
    assert learned(data) == "good<|im_end|>"


def test_pairs_with_different_prompts_are_refused(tmp_path: Path) -> None:
    other = {"role": "user", "content": "other"}
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*differs between 'chosen' and 'rejected'"):
        rows_of(tmp_path, {"chosen": [USER, ANSWER], "rejected": [other, WORSE]})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a", "label": True},
        {"messages": [USER, ANSWER], "kto_tag": True},
        {"instruction": "q", "output": "a", "kto_tag": "true"},
        {"question": "q", "answer": "a", "desirable": True},
    ],
)
def test_ratings_are_recognised(tmp_path: Path, row: dict[str, Any]) -> None:
    name = next(key for key in row if key in ("label", "kto_tag", "desirable"))
    other = {**row, name: "False" if isinstance(row[name], str) else False}
    data = load(tmp_path, [row, other])
    assert data.task == "rated"
    assert data.train.desirable is not None
    assert data.train.desirable.tolist() == [True, False]


def test_a_rating_must_be_true_or_false(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the rating is 3\. Write true or false"):
        rows_of(tmp_path, {"prompt": "q", "completion": "a", "kto_tag": 3})


def test_labelled_texts_with_boolean_labels_stay_classes(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"text": "a", "label": True}, {"text": "b", "label": False})
    assert [row.label for row in rows] == ["True", "False"]


# --- reasoning ------------------------------------------------------------------------------------

BLOCK = {"role": "assistant", "content": "<think>2 and 2</think>\n\n4"}
FIELD = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}


@pytest.mark.parametrize("answer", [BLOCK, FIELD])
@pytest.mark.parametrize(
    ("family", "rule", "expected"),
    [
        ("qwen3-tools", "as-template", "<think>\n2 and 2\n</think>\n\n4<|im_end|>"),
        ("qwen3-tools", "keep", "<think>\n2 and 2\n</think>\n\n4<|im_end|>"),
        ("qwen3-tools", "strip", "<think>\n\n</think>\n\n4<|im_end|>"),
        ("qwen2.5-tools", "keep", "<think>\n2 and 2\n</think>\n\n4<|im_end|>"),
        ("qwen2.5-tools", "strip", "4<|im_end|>"),
    ],
)
def test_thoughts_follow_the_rule(
    tmp_path: Path, answer: dict[str, str], family: str, rule: Any, expected: str
) -> None:
    data = load(tmp_path, [{"messages": [USER, answer]}], family=family, reasoning=rule)
    assert learned(data, family) == expected


def test_a_block_is_left_as_it_stands_where_the_template_knows_no_thoughts(tmp_path: Path) -> None:
    data = load(tmp_path, [{"messages": [USER, BLOCK]}])
    assert learned(data) == BLOCK["content"] + "<|im_end|>"


def test_thoughts_that_the_template_drops_are_an_error_where_they_are_to_be_kept(
    tmp_path: Path,
) -> None:
    template = tmp_path / "forgets.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path = write(tmp_path / "a.jsonl", [{"messages": [USER, BLOCK]}])
    config = DataConfig(path=path, test_path=path, reasoning="keep", cache=False)
    with pytest.raises(DataError, match="leaves the last answer's thoughts out"):
        load_dataset(
            config, tiny_tokenizer("base"), kind="causal-lm", seed=0, template=str(template)
        )


def test_an_answer_of_nothing_but_thoughts_cannot_be_stripped(tmp_path: Path) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "<think>hm</think>"}]}
    with pytest.raises(DataError, match="nothing but thoughts"):
        load(tmp_path, [row], reasoning="strip")


# --- broken rows ----------------------------------------------------------------------------------


def test_broken_rows_are_left_out_up_to_a_share(tmp_path: Path) -> None:
    good = {"prompt": "q", "completion": "a"}
    rows = [good, {"prompt": "q"}, good, good]
    with pytest.raises(DataError) as caught:
        load(tmp_path, rows)
    message = str(caught.value)
    assert "rows.jsonl:2: 'completion' is missing or empty" in message
    assert "1 row cannot be used, of 4 (missing or empty column: 1)" in message
    assert "data.max_broken_share: 0.25" in message
    data = load(tmp_path, rows, max_broken_share=0.25)
    assert data.dropped == {"missing or empty column": 2}, "of both splits"
    assert [row.where for row in data.rows.train] == [f"rows.jsonl:{n}" for n in (1, 3, 4)]
    with pytest.raises(DataError, match="1 row cannot be used"):
        load(tmp_path, rows, max_broken_share=0.2)


def test_lines_that_cannot_be_read_count_as_broken_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"prompt": "q", "completion": "a"})
    path.write_text(f"{good}\n{{oops\n{good}\n{good}\n")
    rows = load_rows(DataConfig(path=str(path), max_broken_share=0.5), 0)
    assert rows.dropped == {"not JSON": 1}


def test_rows_the_template_refuses_count_as_broken(tmp_path: Path) -> None:
    good = {"messages": [USER, ANSWER]}
    bad = {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}
    with pytest.raises(DataError, match="System role not supported"):
        load(tmp_path, [good, bad, good], family="gemma")
    data = load(tmp_path, [good, bad, good], family="gemma", max_broken_share=0.4)
    assert data.dropped == {"refused by the chat template": 2}
    with pytest.raises(DataError, match=r"1 of 3 training rows cannot be written; rows\.jsonl:2"):
        load(tmp_path, [good, bad, good], family="gemma", max_broken_share=0.3)


# --- prompts --------------------------------------------------------------------------------------


def test_a_predictions_prompt_does_not_depend_on_the_reference(tmp_path: Path) -> None:
    prompts = []
    for length in (1, 40, 400):
        row = {"prompt": "what is it " * 20, "completion": "a " * length}
        data = load(tmp_path, [row], max_length=150, overlong="truncate")
        prompts.append(data.test.tokens[: data.test.prompt_lengths[0]].tolist())
    assert prompts[0] == prompts[1] == prompts[2]


def test_prompts_that_inference_would_not_see_stop_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedllm.data.render import Renderer

    def other(*_: Any, **__: Any) -> list[int]:
        return [1, 2, 3]

    monkeypatch.setattr(Renderer, "prompt_ids", other)
    with pytest.raises(DataError, match="trained on another prompt than it is asked with"):
        load(tmp_path, [{"messages": [USER, ANSWER]}])
