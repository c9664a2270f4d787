"""An Ollama Modelfile, with the chat template written in Go and checked against the Jinja one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.data.template import FIXED
from fedllm.results.export_chat import Speech

Talk = Sequence[tuple[str, str]]
"""Role and content of each message."""

_SAMPLES: tuple[Talk, ...] = (
    (("user", "What is 2 + 2?"),),
    (("system", "Be brief."), ("user", "Hello")),
    (("user", "a"), ("assistant", "b"), ("user", "c")),
    (
        ("system", "Answer in one word."),
        ("user", 'Vue prints {{idx}}, "why"?'),
        ("assistant", "line one\nline two"),
        ("user", "naïve café, 東京"),
        ("assistant", "yes"),
        ("user", "{% raw %}"),
    ),
)
# Noncharacters, so that no template holds them
_S, _U, _A, _V = "\ufdd4", "\ufdd5", "\ufdd6", "\ufdd7"


@dataclass(frozen=True)
class Pieces:
    """What a template writes around the messages of a conversation that awaits an answer."""

    begin: str
    """Before all else, where there is a system message."""
    begin_without: str
    """Before all else, where there is none; holds a default system message, if any."""
    around: Mapping[str, tuple[str, str]]
    """Role to what comes before and after its content; lacks `system` if it is refused."""
    generation: str
    """After the last user message: what makes the assistant speak."""

    def write(self, talk: Talk) -> str:
        """Write a conversation as the Go template does."""
        text = self.begin if talk[0][0] == "system" else self.begin_without
        for role, content in talk:
            before, after = self.around[role]
            text += before + content + after
        return text + self.generation

    def go(self) -> str:
        """Return the template in the syntax of Ollama, from the same pieces."""
        branches = [
            f'{{{{ {"else " if place else ""}if eq .Role "{role}" }}}}'
            f"{_literal(before)}{{{{ .Content }}}}{_literal(after)}"
            for place, (role, (before, after)) in enumerate(self.around.items())
        ]
        begin = _literal(self.begin_without)
        if "system" in self.around and self.begin != self.begin_without:
            begin = (
                f"{{{{ if .System }}}}{_literal(self.begin)}{{{{ else }}}}"
                f"{_literal(self.begin_without)}{{{{ end }}}}"
            )
        turns = "".join(branches)
        last = _literal(self.generation)
        return f"{begin}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{last}"


def modelfile(tokenizer: Any, speech: Speech, source: str) -> tuple[str, str | None]:
    """Write a Modelfile.

    Args:
        tokenizer: Its chat template is that of `speech`; not modified.
        speech: The facts that every format is written from.
        source: What stands behind FROM.

    Returns:
        The text, and a note where the template could not be written in Go.
    """
    lines, note = [f"FROM {source}"], None
    pieces = pieces_of(tokenizer) if speech.template is not None else None
    if pieces is not None and '"""' not in pieces.go():
        lines.append(f'TEMPLATE """{pieces.go()}"""')
    elif speech.template is not None:
        note = (
            "the chat template has no equal in Ollama's syntax, so the Modelfile has no TEMPLATE;"
            " Ollama then reads the template from GGUF metadata (--format gguf)"
        )
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in speech.stops]
    if speech.positions is not None:
        lines.append(f"PARAMETER num_ctx {speech.positions}")
    return "\n".join(lines) + "\n", note


def pieces_of(tokenizer: Any) -> Pieces | None:
    """Take a chat template apart; None where its parts do not put sample conversations together.

    The beginning-of-text token is left out: Ollama's runner writes it.
    """

    def jinja(talk: Talk) -> str:
        messages = [{"role": role, "content": content} for role, content in talk]
        text = str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                **FIXED,
            )
        )
        return text.removeprefix(tokenizer.bos_token or "")

    try:
        pieces = _derive(jinja)
        samples = [t for t in _SAMPLES if "system" in pieces.around or t[0][0] != "system"]
        return pieces if all(pieces.write(talk) == jinja(talk) for talk in samples) else None
    except Exception:  # a template may raise anything; then it has no simple equal
        return None


def _derive(jinja: Callable[[Talk], str]) -> Pieces:
    talk = (("user", _U), ("assistant", _A), ("user", _V))
    first, middle, between, end = _split(jinja(talk), _U, _A, _V)
    user = _common_end(first, between)
    around: dict[str, tuple[str, str]] = {}
    begin, begin_without = "", first.removesuffix(user)
    try:
        begin, after_system, *_ = _split(jinja((("system", _S), *talk)), _S, _U, _A, _V)
        shorter = _common_end(user, after_system)
        begin_without += user.removesuffix(shorter)
        between_rest, user = user.removesuffix(shorter), shorter
        around["system"] = ("", after_system.removesuffix(user))
    except Exception:  # the template knows no system role
        between_rest = ""
    after_user = _common_start(middle, end)
    around["user"] = (user, after_user)
    behind = between.removesuffix(between_rest + user) + between_rest
    around["assistant"] = (middle.removeprefix(after_user), behind)
    return Pieces(begin, begin_without, around, end.removeprefix(after_user))


def _split(text: str, *marks: str) -> list[str]:
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            raise ValueError("a message is missing from what the template wrote")
        parts.append(part)
    return [*parts, text]


def _common_end(a: str, b: str) -> str:
    return _common_start(a[::-1], b[::-1])[::-1]


def _common_start(a: str, b: str) -> str:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return a[: min(len(a), len(b)) if length is None else length]


def _literal(text: str) -> str:
    """Return text as it stands in a Go template: braces would begin an action."""
    return f"{{{{ {_go_quoted(text)} }}}}" if "{{" in text else text


def _go_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _quoted(stop: str) -> str:
    return '"' + stop.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
