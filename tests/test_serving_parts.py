"""Sampling, writing, tool calls, keys and the memory of a batch, each alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import tiny_tokenizer

from fedllm.errors import ConfigError
from fedllm.serving.keys import Keys, read_keys
from fedllm.serving.refusals import Refusal
from fedllm.serving.sampling import Sampling, choose
from fedllm.serving.server import Address
from fedllm.serving.tool_calls import CallReader, FoundCall, Offered, family_of
from fedllm.serving.writing import Writer


@dataclass
class Row:
    """A sequence as sampling sees it."""

    sampling: Sampling
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    prompt: list[int] = field(default_factory=lambda: [1])
    tokens: list[int] = field(default_factory=list)


def share(sampling: Sampling, logits: torch.Tensor, draws: int = 2500) -> torch.Tensor:
    """Return how often each token is drawn."""
    row = Row(sampling)
    found = [choose(logits[None], [row])[0] for _ in range(draws)]
    counts = torch.zeros(len(logits))
    for choice in found:
        assert choice is not None
        counts[choice.token] += 1
    return counts / draws


# sampling


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({}, []),
        ({"top_p": 0.7}, ["TopPLogitsWarper"]),
        ({"top_k": 3}, ["TopKLogitsWarper"]),
        ({"top_k": 4, "top_p": 0.8}, ["TopKLogitsWarper", "TopPLogitsWarper"]),
    ],
)
def test_tokens_are_drawn_as_transformers_draws_them(
    settings: dict[str, Any], warpers: list[str]
) -> None:
    import transformers

    logits = torch.tensor([2.0, 1.5, 1.0, 0.2, -1.0, -3.0])
    wanted = logits[None] / 0.8
    for name in warpers:
        argument = settings["top_k" if "TopK" in name else "top_p"]
        wanted = getattr(transformers, name)(argument)(None, wanted)
    found = share(Sampling(temperature=0.8, **settings), logits)
    assert found.numpy() == pytest.approx(wanted.softmax(-1)[0].numpy(), abs=0.04)
    assert ((found > 0) <= (wanted[0] > -torch.inf)).all()


def test_penalties_are_openais() -> None:
    logits = torch.zeros(1, 5)
    row = Row(
        Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: 0.1}, top_logprobs=5),
        tokens=[0, 0, 1],
    )
    (choice,) = choose(logits, [row])
    assert choice is not None
    assert choice.token == 4
    assert dict(choice.top) == pytest.approx(dict.fromkeys(range(5), -np.log(5)))
    # 0: -0.5 - 2 * 0.25, 1: -0.5 - 0.25
    bias = {0: 0.9, 1: 0.76, 2: -1.0, 3: -1.0, 4: -1.0}
    row.sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=bias)
    (choice,) = choose(logits, [row])
    assert choice is not None
    assert choice.token == 1
    assert logits.abs().max() == 0


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.tensor([[2.0, -1.0, 1.9, 0.5]])
    seen = torch.tensor([[0, 1]])
    wanted = int(RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone()).argmax())  # type: ignore[arg-type]
    row = Row(Sampling(repetition_penalty=1.3), prompt=[0], tokens=[1])
    (choice,) = choose(logits, [row])
    assert choice is not None
    assert choice.token == wanted == 2


def test_a_row_that_is_not_finite_gets_no_token() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [3.0, 1.0]])
    found = choose(logits, [Row(Sampling()) for _ in range(3)])
    assert [None if c is None else c.token for c in found] == [1, None, 0]


# writing


TOKENIZER = tiny_tokenizer("qwen2.5")


@given(
    text=st.text(st.sampled_from("ab c\né中🙂"), max_size=30),
    stop=st.lists(st.text(st.sampled_from("ab c\né"), min_size=1, max_size=4), max_size=3),
)
def test_text_is_written_once_and_up_to_the_stop_string_that_is_complete_first(
    text: str, stop: list[str]
) -> None:
    writer = Writer(TOKENIZER, stop)
    parts = []
    for token in TOKENIZER(text)["input_ids"]:
        parts.append(writer.add(token))
        if writer.is_stopped:
            break
    parts.append(writer.finish())
    ends = [(text.index(one) + len(one), text.index(one)) for one in stop if one in text]
    assert "".join(parts) == (text[: min(ends)[1]] if ends else text)
    assert writer.is_stopped == bool(ends)


def test_a_tokenizer_without_a_fast_backend_writes_the_same() -> None:
    tokenizer = tiny_tokenizer("qwen2.5")

    class Slow:
        """A tokenizer that can only decode."""

        is_fast = False

        def decode(self, ids: list[int], **words: Any) -> str:
            return str(tokenizer.decode(ids, **words))

    text = "né 中🙂 the fox"
    writer = Writer(Slow(), ["fox"])
    parts = [writer.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(parts) == "né 中🙂 the "
    assert "\ufffd" not in "".join(parts)


# tools

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
GOOD = {"name": "f", "arguments": {"x": 1}}
LLAMA = {"name": "f", "parameters": {"x": 1}}
SHAPES = [
    ("qwen", f"Hm. <tool_call>\n{json.dumps(GOOD)}\n</tool_call>", "Hm. ", 1),
    ("qwen", f"<tool_call>{json.dumps(GOOD)}</tool_call>\n" * 2, "", 2),
    ("qwen", f"<tool_call>\n{json.dumps(GOOD)}", "", 1),  # the end of turn comes before the mark
    ("mistral", "[TOOL_CALLS] " + json.dumps([GOOD, GOOD]), "", 2),
    ("mistral", 'Hm.[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]f[ARGS]{"x": 2}', "Hm.", 2),
    ("llama3", json.dumps(LLAMA), "", 1),
    ("llama3", "<|python_tag|>" + json.dumps(LLAMA) + "; " + json.dumps(LLAMA), "", 2),
    ("llama3", "the set {1, 2} is small", "the set {1, 2} is small", 0),
    ("llama3", '{"name": "g", "parameters": {}}', '{"name": "g", "parameters": {}}', 0),
    ("qwen", "1 < 2 and <b>", "1 < 2 and <b>", 0),
    ("qwen", '<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f"}</tool_call>', 0),
    ("mistral", "[TOOL_CALLS] nonsense", "[TOOL_CALLS] nonsense", 0),
]


def read(reader: CallReader, parts: list[str]) -> tuple[str, list[FoundCall]]:
    """Feed an answer in parts."""
    text, calls = "", []
    for part in parts:
        more, found = reader.feed(part)
        text, calls = text + more, [*calls, *found]
    more, found = reader.finish()
    return text + more, [*calls, *found]


@pytest.mark.parametrize(("family", "answer", "text", "count"), SHAPES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_found_however_the_answer_comes(
    family: Any, answer: str, text: str, count: int, size: int
) -> None:
    reader = CallReader(family, Offered({"f": SCHEMA}), ["<|im_end|>"])
    parts = [answer[i : i + size] for i in range(0, len(answer), size)]
    said, calls = read(reader, parts)
    assert said == text
    assert [call.name for call in calls] == ["f"] * count
    assert all("x" in json.loads(call.arguments) for call in calls)


def test_families_are_told_by_their_templates() -> None:
    found = {f: family_of(tiny_tokenizer(f).chat_template or "") for f in
             ("qwen2.5-tools", "qwen3-tools", "mistral", "llama3.1", "gemma")}  # fmt: skip
    assert found == {
        "qwen2.5-tools": "qwen",
        "qwen3-tools": "qwen",
        "mistral": "mistral",
        "llama3.1": "llama3",
        "gemma": None,
    }


def test_a_schema_reads_nothing_from_outside_and_no_pattern_of_it_runs(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    outside = Offered({"f": {"properties": {"x": {"$ref": other.as_uri()}}}})
    assert outside.call(GOOD) is None
    circle = Offered({"f": {"$ref": "#"}})
    assert circle.call(GOOD) is None
    slow = {"properties": {"x": {"type": "string", "pattern": "^(a+)+$"}}}
    call = Offered({"f": slow}).call({"name": "f", "arguments": {"x": "a" * 40 + "!"}})
    assert call is not None
    with pytest.raises(Refusal, match="no JSON Schema"):
        Offered({"f": {"type": "text"}})


def test_arguments_may_be_text_that_is_json() -> None:
    call = Offered({"f": SCHEMA}).call({"name": "f", "arguments": '{"x": 3}'})
    assert call is not None
    assert json.loads(call.arguments) == {"x": 3}


# keys


def test_keys_are_read_from_lines_of_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nann:" + "a" * 16 + "\n\nbob:" + "b:b" * 8 + "\n")
    for keys in (read_keys(file), read_keys(None, f"ann:{'a' * 16},bob:{'b:b' * 8}")):
        assert keys.holder("a" * 16) == "ann"
        assert keys.holder("b:b" * 8) == "bob"
        assert keys.holder("a" * 15) is None
        assert keys.holder("") is None
        assert keys.holder("é") is None
    assert not read_keys(None, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no key"),
        ("ann:short", "16 characters or more (it has 5)"),
        ("ann:" + "a" * 16 + " ", "without blanks"),
        ("ann:" + "a" * 8 + " " + "a" * 8, "without blanks"),
        ("ann:" + "é" * 16, "printable ASCII"),
        ("a" * 20, "name:key"),
        (" ann:" + "a" * 16, "name:key"),
        (f"ann:{'a' * 16}\nann:{'b' * 16}", "there twice"),
        (f"ann:{'a' * 16}\nbob:{'a' * 16}", "somebody else"),
    ],
)
def test_a_bad_key_is_refused_at_the_start_and_never_shown(
    text: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(file)
    assert words in str(caught.value)
    assert "aaaaaa" not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_a_public_address_needs_keys_or_a_plain_word(host: str) -> None:
    with pytest.raises(ConfigError, match="--api-key-file"):
        Address(host).check()
    Address(host, keys=Keys({"ann": "a" * 16})).check()
    Address(host, is_open=True).check()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_machines_own_address_needs_none(host: str) -> None:
    Address(host).check()
