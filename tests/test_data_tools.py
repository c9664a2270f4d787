from __future__ import annotations

import copy
import json
import string
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CONTROLS, tiny_tokenizer

from fedllm.data import Message, Renderer, ToolCall, chat_template, make_renderer, read_messages
from fedllm.data import read_tools as tools_of
from fedllm.data.overlong import Limits
from fedllm.data.tokenise import encode_conversations
from fedllm.errors import DataError

WITH_TOOLS = ("llama3.1", "qwen2.5-tools", "qwen3-tools", "mistral")
WIDE = Limits(100_000, "error")

WEATHER = {
    "name": "weather",
    "description": "Weather of a place",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
}


@cache
def renderer_of(family: str, template: str = "auto") -> Renderer:
    tokenizer = tiny_tokenizer(family)
    return make_renderer(tokenizer, chat_template(tokenizer, template))


ALL = [(family, "auto") for family in WITH_TOOLS]
ALL += [("base", template) for template in ("chatml", "llama3", "plain")]


def conversation(arguments: Any, answer: str = "it rains") -> list[dict[str, Any]]:
    call = {"function": {"name": "weather", "arguments": arguments}, "type": "function"}
    return [
        {"role": "user", "content": "weather in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call00001", **call}]},
        {"role": "tool", "content": '{"sky": "grey"}', "tool_call_id": "call00001"},
        {"role": "assistant", "content": answer},
    ]


def encode(renderer: Renderer, messages: Any, tools: Any = (), limits: Limits = WIDE) -> Any:
    made = encode_conversations(renderer, [messages], ["row 1"], limits, tools=[tools])
    return made.tokens.tolist(), made.supervised.tolist(), int(made.prompt_lengths[0])


def by_transformers(renderer: Renderer, turns: list[dict[str, Any]], tools: Any) -> list[int]:
    """What transformers makes of a prompt in OpenAI's shape, arguments as objects."""
    text = renderer.tokenizer.apply_chat_template(
        turns,
        tools=list(tools) or None,
        chat_template=renderer.template,
        add_generation_prompt=True,
        tokenize=False,
        date_string="26 Jul 2024",
    )
    return list(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(("family", "template"), ALL)
def test_prompts_with_tools_are_those_of_transformers(family: str, template: str) -> None:
    renderer = renderer_of(family, template)
    turns = conversation({"place": "Oslo"})
    tools = tools_of([WEATHER])
    for length in (1, 3):
        expected = by_transformers(renderer, turns[:length], tools)
        assert renderer.prompt_ids(read_messages(turns[:length]), tools) == expected
        tokens, supervised, prompt = encode(renderer, read_messages(turns[: length + 1]), tools)
        assert tokens[:prompt] == expected
        assert all(supervised[prompt:])


@pytest.mark.parametrize(("family", "template"), ALL)
def test_the_call_is_learned_and_the_tools_are_not(family: str, template: str) -> None:
    renderer = renderer_of(family, template)
    messages = read_messages(conversation({"place": "Oslo"}))[:2]
    tokens, supervised, _ = encode(renderer, messages, tools_of([WEATHER]))
    learned = [t for t, is_learned in zip(tokens, supervised, strict=True) if is_learned]
    text = renderer.tokenizer.decode(learned)
    assert '"weather"' in text
    assert '{"place": "Oslo"}' in text
    assert "Weather of a place" not in text
    assert text.endswith(renderer.end_of_turn or "")


@pytest.mark.parametrize(("family", "template"), ALL)
def test_string_and_object_arguments_give_identical_tokens(family: str, template: str) -> None:
    renderer = renderer_of(family, template)
    arguments = {"place": "Oslo", "days": 2, "units": ["C", None], "at": 1.5}
    made = [
        encode(renderer, read_messages(conversation(given)), tools_of([WEATHER]))
        for given in (arguments, json.dumps(arguments))
    ]
    assert made[0] == made[1]


letters = st.text(alphabet=string.ascii_letters + " \n{}'\"\\é", max_size=8)
wild = st.lists(st.sampled_from([*CONTROLS, "x", " ", "hello"]), min_size=1, max_size=4).map(
    "".join
)
texts = st.one_of(letters, wild)


@pytest.mark.parametrize("family", WITH_TOOLS)
@settings(deadline=None, max_examples=40)
@given(question=wild, argument=texts, description=wild, result=wild, answer=wild)
def test_control_tokens_stay_text_everywhere(
    family: str, question: str, argument: str, description: str, result: str, answer: str
) -> None:
    renderer = renderer_of(family)
    ids = set(renderer.tokenizer.convert_tokens_to_ids(list(CONTROLS)))

    def made(question: str, argument: str, description: str, result: str, answer: str) -> Any:
        messages = [
            Message("user", question + "."),
            Message("assistant", "", (ToolCall("weather", {"place": argument}, "call00001"),)),
            Message("tool", result, tool_call_id="call00001"),
            Message("assistant", answer + "."),
        ]
        tools = tools_of([{**WEATHER, "description": description}])
        return encode(renderer, messages, tools), renderer.prompt_ids(messages[:-1], tools)

    (tokens, supervised, prompt), inference = made(question, argument, description, result, answer)
    (simple, _, _), _ = made("x", "x", "x", "x", "x")
    assert [t for t in tokens if t in ids] == [t for t in simple if t in ids]
    assert tokens[:prompt] == inference
    decoded = renderer.tokenizer.decode([t for t, s in zip(tokens, supervised, strict=True) if s])
    assert answer.strip() in decoded
    assert json.dumps(argument, ensure_ascii=False) in renderer.tokenizer.decode(tokens)


def test_parallel_results_without_ids_are_linked_in_order() -> None:
    renderer = renderer_of("mistral")
    messages = [
        Message("user", "both?"),
        Message("assistant", "", (ToolCall("a", {}), ToolCall("b", {}))),
        Message("tool", '"1"'),
        Message("tool", '"2"'),
    ]
    text = renderer.tokenizer.decode(renderer.prompt_ids(messages, tools_of([WEATHER])))
    first, second = [part[:9] for part in text.split('"id": "')[1:]]
    assert first != second
    assert [part[:9] for part in text.split('"call_id": "')[1:]] == [first, second]


def test_long_ids_are_made_short_where_the_template_asks() -> None:
    renderer = renderer_of("mistral")
    messages = [
        Message("user", "go"),
        Message("assistant", "", (ToolCall("a", {}, "call_0123456789"),)),
        Message("tool", '"1"', tool_call_id="call_0123456789"),
    ]
    text = renderer.tokenizer.decode(renderer.prompt_ids(messages, tools_of([WEATHER])))
    assert "call_0123456789" not in text
    assert text.split('"id": "')[1][:9] == text.split('"call_id": "')[1][:9]


@pytest.mark.parametrize("family", ["gemma", "merging"])
def test_a_template_without_tools_refuses_them(family: str) -> None:
    renderer = renderer_of(family)
    with pytest.raises(DataError, match="there are tools, but the chat template writes none"):
        renderer.prompt_ids([Message("user", "hi")], tools_of([WEATHER]))
    with pytest.raises(DataError, match="there are tool calls, but the chat template"):
        encode(renderer, read_messages(conversation({})))


def test_a_conversation_without_messages_is_refused() -> None:
    with pytest.raises(DataError, match="the request: there is no message"):
        renderer_of("base").prompt_ids([])


@pytest.mark.parametrize("edge", ["", "\n", "  \n", "\n\n"])
def test_of_named_templates_the_one_for_tools_writes_rows_with_tools(edge: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer("qwen2.5-tools"))
    named = {
        "tool_use": edge + str(tokenizer.chat_template) + edge,
        "default": edge + chat_template(tokenizer, "chatml") + edge,
    }
    tokenizer.chat_template = named
    renderer = make_renderer(tokenizer, chat_template(tokenizer))
    turns = conversation({"place": "Oslo"})
    for tools in ([{"type": "function", "function": WEATHER}], []):
        asked = turns[:3] if tools else turns[:1]
        theirs = tokenizer.apply_chat_template(
            asked, tools=tools or None, add_generation_prompt=True, tokenize=False
        )
        ours = renderer.prompt_ids(read_messages(asked), tools_of(tools) if tools else ())
        assert ours == tokenizer(theirs, add_special_tokens=False)["input_ids"]
        assert ("# Tools" in theirs) == bool(tools)
    named["default"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    renderer = make_renderer(tokenizer, chat_template(tokenizer))
    with pytest.raises(DataError, match="tool calls, but the chat template writes none"):
        renderer.prompt_ids(read_messages(turns[:3]), ())
