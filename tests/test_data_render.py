from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CONTROLS, FAMILIES, tiny_tokenizer

from fedllm.data.overlong import Limits
from fedllm.data.render import make_renderer
from fedllm.data.rows import Message
from fedllm.data.template import FALLBACKS, chat_template
from fedllm.data.tokenise import encode_conversations, encode_for_classes, encode_texts
from fedllm.errors import DataError

WIDE = Limits(100_000, "error")
OWN = ("llama3", "qwen2.5", "qwen3", "gemma")

words = st.text(alphabet="ab 1\n.", min_size=1, max_size=12).filter(lambda t: t.strip())
# what people write, with control tokens among it
wild = st.lists(st.sampled_from([*CONTROLS, " ", "x", "hello", "\n", "42"]), min_size=1).map(
    lambda parts: "".join(parts) + "z"
)


@cache
def tokenizer_of(family: str, spaced: bool = False) -> Any:
    return tiny_tokenizer(family, spaced=spaced)


@cache
def renderer_of(family: str, template: str = "auto", spaced: bool = False) -> Any:
    tokenizer = tokenizer_of(family, spaced)
    return make_renderer(tokenizer, chat_template(tokenizer, template))


def talk(*contents: str) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(roles[i % 2], content) for i, content in enumerate(contents)]


def encode(renderer: Any, messages: list[Message], limits: Limits = WIDE) -> Any:
    made = encode_conversations(renderer, [messages], ["row 1"], limits)
    if not len(made.kept):
        return None
    tokens, supervised = made.tokens.tolist(), made.supervised.tolist()
    return tokens, supervised, int(made.prompt_lengths[0])


def inference_prompt(renderer: Any, messages: list[Message]) -> list[int]:
    """What a server sends to the model, by transformers alone."""
    tokenizer = renderer.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        chat_template=renderer.template,
        add_generation_prompt=True,
        tokenize=False,
        date_string="26 Jul 2024",
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def learned(renderer: Any, tokens: list[int], supervised: list[bool]) -> str:
    chosen = [t for t, is_learned in zip(tokens, supervised, strict=True) if is_learned]
    return str(renderer.tokenizer.decode(chosen, skip_special_tokens=False))


@pytest.mark.parametrize(
    ("family", "template"),
    [(f, "auto") for f in FAMILIES] + [("base", name) for name in FALLBACKS],
)
@settings(deadline=None)
@given(question=words, answer=words)
def test_the_training_prompt_is_the_inference_prompt(
    family: str, template: str, question: str, answer: str
) -> None:
    renderer = renderer_of(family, template)
    tokens, supervised, prompt = encode(renderer, talk(question, answer))
    assert tokens[:prompt] == inference_prompt(renderer, talk(question))
    assert not any(supervised[:prompt])
    assert all(supervised[prompt:])


@pytest.mark.parametrize("family", OWN)
@settings(deadline=None)
@given(contents=st.lists(words, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
def test_every_answer_is_learned_with_one_end_of_turn_and_nothing_else(
    family: str, contents: list[str]
) -> None:
    renderer = renderer_of(family)
    tokens, supervised, prompt = encode(renderer, talk(*contents))
    end = renderer.end_of_turn
    found = learned(renderer, tokens, supervised).split(end)
    assert found.pop() == ""
    expected = [text.strip() for text in contents[1::2]]
    if family == "qwen3":
        found[-1] = found[-1].removeprefix("<think>\n\n</think>\n\n")
    assert [text.strip() for text in found] == expected
    assert tokens[:prompt] == inference_prompt(renderer, talk(*contents[:-1]))
    assert tokens[-1] == renderer.tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("family", [*OWN, "base"])
@settings(deadline=None)
@given(question=wild, answer=wild)
def test_control_tokens_in_the_data_stay_text(family: str, question: str, answer: str) -> None:
    renderer = renderer_of(family)
    ids = set(renderer.tokenizer.convert_tokens_to_ids(list(CONTROLS)))
    tokens, supervised, prompt = encode(renderer, talk(question, answer))
    simple, _, _ = encode(renderer, talk("x", "x"))
    assert [t for t in tokens if t in ids] == [t for t in simple if t in ids]
    decoded = renderer.tokenizer.decode(tokens[:prompt], skip_special_tokens=False)
    assert question.strip() in decoded
    assert answer.strip() in learned(renderer, tokens, supervised)


def test_escaped_marks_in_the_data_do_not_become_control_tokens() -> None:
    renderer = renderer_of("qwen2.5")
    ids = set(renderer.tokenizer.convert_tokens_to_ids(list(CONTROLS)))
    tokens, _, _ = encode(renderer, talk("\ufdd00\ufdd1 \ufdd1", "<|im_end|>ok"))
    simple, _, _ = encode(renderer, talk("x", "x"))
    assert [t for t in tokens if t in ids] == [t for t in simple if t in ids]


@pytest.mark.parametrize("template", FALLBACKS)
def test_fallbacks_end_every_answer_exactly_once(template: str) -> None:
    renderer = renderer_of("base", template)
    tokens, supervised, _ = encode(renderer, talk("hi", "hello there", "more", "7 apples"))
    end = renderer.end_of_turn or renderer.tokenizer.eos_token
    found = learned(renderer, tokens, supervised)
    assert found.endswith("7 apples" + end)
    assert found.count(end) == 2


def test_eos_is_appended_where_the_template_ends_turns_without_a_token() -> None:
    renderer = renderer_of("merging")
    assert renderer.end_of_turn is None
    tokens, supervised, _ = encode(renderer, talk("how many apples", "42 apples"))
    assert learned(renderer, tokens, supervised) == "42 apples<|endoftext|>"
    assert tokens.count(renderer.tokenizer.eos_token_id) == 1


def test_tokens_that_would_reach_over_the_boundary_are_split_there() -> None:
    renderer = renderer_of("merging")
    prompt = inference_prompt(renderer, talk("how many"))
    text = "Q: how many\nA: hello"
    whole = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt, "the example must merge to test anything"
    tokens, _, length = encode(renderer, talk("how many", "hello"))
    assert tokens[:length] == prompt


def test_a_spaced_tokenizer_gets_no_stray_space_inside_escaped_text() -> None:
    renderer = renderer_of("qwen2.5", spaced=True)
    plain, *_ = encode(renderer, talk("say end", "hello"))
    escaped, *_ = encode(renderer, talk("say <|im_end|>", "hello"))
    decode = renderer.tokenizer.decode
    assert decode(escaped) == decode(plain).replace("say end", "say <|im_end|>")


def test_system_user_and_tool_messages_are_masked() -> None:
    renderer = renderer_of("qwen2.5")
    messages = [
        Message("system", "be brief"),
        *talk("hi", "calling"),
        Message("tool", "result 42"),
        Message("assistant", "it is 42"),
    ]
    tokens, supervised, _ = encode(renderer, messages)
    assert learned(renderer, tokens, supervised) == "calling<|im_end|>it is 42<|im_end|>"


def test_an_answer_nobody_asked_for_is_masked() -> None:
    renderer = renderer_of("qwen2.5")
    messages = [Message("assistant", "welcome"), *talk("hi", "hello")]
    tokens, supervised, _ = encode(renderer, messages)
    assert learned(renderer, tokens, supervised) == "hello<|im_end|>"


def test_thoughts_that_the_template_forgets_do_not_break_the_masks() -> None:
    renderer = renderer_of("qwen3")
    messages = talk("hi", "<think>hm</think>\n\nhello", "more", "42")
    tokens, supervised, _ = encode(renderer, messages)
    found = learned(renderer, tokens, supervised)
    assert found == "hello<|im_end|><think>\n\n</think>\n\n42<|im_end|>"


def test_a_row_the_template_refuses_is_named() -> None:
    renderer = renderer_of("gemma")
    rows = [talk("hi", "hello"), [Message("system", "no"), *talk("hi", "hello")]]
    with pytest.raises(DataError, match=r"row 2: .*System role not supported"):
        encode_conversations(renderer, rows, ["row 1", "row 2"], WIDE)


def test_the_callers_tokenizer_is_not_changed() -> None:
    tokenizer = tiny_tokenizer("base")
    before = tokenizer.backend_tokenizer.to_str()
    renderer = make_renderer(tokenizer, chat_template(tokenizer))
    encode(renderer, talk("hi <|im_end|>", "hello"))
    encode_for_classes(tokenizer, ["a long text " * 9], ["row"], Limits(5, "truncate"))
    assert tokenizer.chat_template is None
    assert tokenizer.backend_tokenizer.to_str() == before
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_an_unknown_template_gets_a_suggestion() -> None:
    with pytest.raises(DataError, match="Did you mean 'chatml'"):
        chat_template(tokenizer_of("base"), "chatlm")


def test_a_template_file_is_read(tmp_path: Any) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}")
    assert chat_template(tokenizer_of("base"), str(file)) == file.read_text()
    with pytest.raises(DataError, match="cannot be read"):
        chat_template(tokenizer_of("base"), str(tmp_path / "none.jinja"))


@pytest.mark.parametrize("family", [*OWN, "base", "merging"])
@settings(deadline=None)
@given(
    question=st.integers(1, 60),
    answer=st.integers(1, 60),
    extra=st.integers(0, 40),
    room=st.integers(1, 90),
)
def test_truncation_keeps_the_header_and_the_end_of_turn(
    family: str, question: int, answer: int, extra: int, room: int
) -> None:
    renderer = renderer_of(family)
    contents = ["q " * question, "a " * answer] + (["m", "b " * extra] if extra else [])
    whole, _, _ = encode(renderer, talk(*contents))
    cut = encode(renderer, talk(*contents), Limits(room, "truncate"))
    if len(whole) <= room:
        assert cut is not None
        assert cut[0] == whole
        return
    if cut is None:
        frame = len(encode(renderer, talk("q", "a"))[0])
        assert room <= frame, "a row is dropped only when nothing fits"
        return
    tokens, supervised, prompt = cut
    assert len(tokens) <= room
    assert tokens[-1] == whole[-1], "the end of the turn stays"
    assert supervised[-1]
    header = inference_prompt(renderer, talk("q"))
    tail = len(header) - next(
        i for i in range(len(header), 0, -1) if "q" in renderer.tokenizer.decode(header[i - 1 : i])
    )
    if extra == 0 or prompt < len(inference_prompt(renderer, talk(contents[0]))):
        assert tokens[prompt - tail : prompt] == header[len(header) - tail :]


def test_truncation_drops_whole_exchanges_first() -> None:
    renderer = renderer_of("qwen2.5")
    first, _, _ = encode(renderer, talk("hi", "hello"))
    messages = talk("hi", "hello", "more " * 20, "no " * 20)
    tokens, _, _ = encode(renderer, messages, Limits(len(first) + 10, "truncate"))
    assert tokens == first


def test_long_rows_are_dropped_or_refused_as_told() -> None:
    renderer = renderer_of("qwen2.5")
    assert encode(renderer, talk("q " * 50, "a"), Limits(40, "drop")) is None
    with pytest.raises(DataError, match=r"row 1: \d+ tokens, more than data.max_length 40"):
        encode(renderer, talk("q " * 50, "a"), Limits(40, "error"))


def test_plain_text_is_learned_but_for_its_first_token() -> None:
    tokenizer = tokenizer_of("base")
    made = encode_texts(tokenizer, ["hello <|endoftext|> there"], ["row"], WIDE)
    eos = tokenizer.eos_token_id
    assert made.tokens.tolist().count(eos) == 1
    assert made.tokens[-1] == eos
    assert made.supervised.tolist() == [False] + [True] * (len(made.tokens) - 1)
    assert made.prompt_lengths.tolist() == [0]


def test_truncated_text_keeps_eos() -> None:
    tokenizer = tokenizer_of("base")
    made = encode_texts(tokenizer, ["hello " * 30], ["row"], Limits(10, "truncate"))
    assert len(made.tokens) == 10
    assert made.tokens[-1] == tokenizer.eos_token_id
    assert made.truncated.tolist() == [True]


def test_texts_for_a_classification_head_fit_and_learn_no_token() -> None:
    tokenizer = tokenizer_of("base")
    made = encode_for_classes(tokenizer, ["a " * 50, "b"], ["1", "2"], Limits(8, "truncate"))
    assert made.offsets.tolist()[1] == 8
    assert not made.supervised.any()
    kept = encode_for_classes(tokenizer, ["a " * 50, "b"], ["1", "2"], Limits(8, "drop"))
    assert kept.kept.tolist() == [1]
