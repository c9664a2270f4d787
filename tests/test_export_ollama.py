"""Modelfiles: the Go template writes what the Jinja template writes, or is left out."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tiny_tokenizers import FAMILIES, tiny_tokenizer

from fedllm.data.template import FALLBACKS, FIXED, chat_template
from fedllm.results.export_chat import Speech
from fedllm.results.export_ollama import modelfile, pieces_of

TALKS: list[list[tuple[str, str]]] = [
    [("user", "How many?")],
    [("user", "one"), ("assistant", "two"), ("user", "three")],
    [("system", "Be kind."), ("user", "one"), ("assistant", "two"), ("user", 'say "hi" {{x}}')],
]


def go(template: str, talk: list[tuple[str, str]]) -> str:
    """Carry out the part of Go's template language that Modelfiles are written in."""
    tokens = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)
    system = next((content for role, content in talk if role == "system"), "")

    def run(place: int, message: tuple[str, str] | None, is_live: bool) -> tuple[str, int]:
        """Write tokens up to the `end` or `else` that closes this block."""
        text = ""
        while place < len(tokens):
            token = tokens[place]
            words = token[2:-2].strip() if token.startswith("{{") else None
            if words is None:
                text += token if is_live else ""
            elif words == "end" or words.startswith("else"):
                return text, place
            elif words == ".Content":
                text += message[1] if is_live and message else ""
            elif words.startswith('"'):
                text += words[1:-1].replace("\\n", "\n").replace('\\"', '"') if is_live else ""
            elif words == "range .Messages":
                start = place + 1
                for one in talk:
                    part, place = run(start, one, is_live)
                    text += part
            else:
                part, place = branch(place, words, message, is_live)
                text += part
            place += 1
        return text, place

    def branch(
        place: int, words: str, message: tuple[str, str] | None, is_live: bool
    ) -> tuple[str, int]:
        text, is_done = "", False
        while True:
            if words == "if .System":
                holds = bool(system)
            elif match := re.fullmatch(r'(?:else )?if eq \.Role "(\w+)"', words):
                holds = message is not None and message[0] == match[1]
            else:
                assert words == "else", words
                holds = True
            part, place = run(place + 1, message, is_live and holds and not is_done)
            text, is_done = text + part, is_done or holds
            words = tokens[place][2:-2].strip()
            if words == "end":
                return text, place

    return run(0, None, True)[0]


def templates() -> dict[str, Any]:
    found = {name: tiny_tokenizer(name) for name in FAMILIES if FAMILIES[name][0]}
    for name in FALLBACKS:
        found[f"fallback {name}"] = tiny_tokenizer("llama3")
        found[f"fallback {name}"].chat_template = chat_template(found[f"fallback {name}"], name)
    return found


@pytest.mark.parametrize("name", templates())
def test_go_writes_what_jinja_writes(name: str) -> None:
    tokenizer = templates()[name]
    pieces = pieces_of(tokenizer)
    assert pieces is not None
    for talk in TALKS:
        if talk[0][0] == "system" and "system" not in pieces.around:
            continue
        messages = [{"role": role, "content": content} for role, content in talk]
        jinja = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **FIXED
        )
        assert go(pieces.go(), talk) == jinja.removeprefix(tokenizer.bos_token or "")


def test_a_system_message_is_only_known_where_the_template_takes_it() -> None:
    gemma, llama = pieces_of(tiny_tokenizer("gemma")), pieces_of(tiny_tokenizer("llama3"))
    assert gemma is not None
    assert llama is not None
    assert set(gemma.around) == {"user", "assistant"}
    assert set(llama.around) == {"system", "user", "assistant"}


@pytest.mark.parametrize(
    "template",
    [
        # counts its messages, which no piece around a message can
        "{% for m in messages %}[{{ loop.index }}] {{ m.content }}\n{% endfor %}",
        # writes the system message into the first user message
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ messages[0].content }}|"
        "{{ m.content }}{% else %}<a>{{ m.content }}{% endif %}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_without_an_equal_is_left_out_with_a_note(template: str) -> None:
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template = template
    text, note = modelfile(tokenizer, Speech(template, (1,), ("<x>",), None), ".")
    assert text == 'FROM .\nPARAMETER stop "<x>"\n'
    assert note is not None
    assert "GGUF" in note


def test_stops_and_positions_are_the_models() -> None:
    tokenizer = tiny_tokenizer("qwen2.5")
    speech = Speech(tokenizer.chat_template, (2, 0), ("<|im_end|>", 'a"\n'), 4096)
    text, note = modelfile(tokenizer, speech, "./model.gguf")
    assert note is None
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert text.endswith(
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "a\\"\\n"\nPARAMETER num_ctx 4096\n'
    )
