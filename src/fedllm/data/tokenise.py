"""Rows to token ids, once for all clients: what is the prompt, and what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from fedllm.data.marks import Rendered
from fedllm.data.overlong import Cuts, Limits, Talk, differing, shorten
from fedllm.data.pieces import as_text, piece, tokenise
from fedllm.data.reasoning import Reasoning, check_answers
from fedllm.data.render import Renderer
from fedllm.data.rows import Message
from fedllm.data.template import Tokenizer
from fedllm.data.tokens import Encoded, TokenRow, pack
from fedllm.data.turns import Tools
from fedllm.errors import DataError

Learned = Literal["answers", "last-answer", "all"]
"""Which part of a conversation is supervised."""


def encode_conversations(
    renderer: Renderer,
    conversations: Sequence[Sequence[Message]],
    wheres: Sequence[str],
    limits: Limits,
    *,
    tools: Sequence[Tools] | None = None,
    learned: Learned = "answers",
    tolerates: bool = False,
    reasoning: Reasoning = "as-template",
) -> Encoded:
    """Tokenise conversations; answers are supervised up to the end of their turns.

    Args:
        renderer: Writes the conversations.
        conversations: Each ends with an answer that a user message precedes.
        wheres: Where each stands, for messages.
        limits: What happens to long ones (see `fedllm.data.overlong`).
        tools: What the assistant of each may call; none unless given.
        learned: Every answer, the last one, or prompts, too.
        tolerates: Leave out what the template refuses, instead of raising.
        reasoning: Which rule the conversations follow; `keep` refuses rows whose last answer's
            thoughts the template leaves out.

    Raises:
        DataError: If the template refuses a row, or a row is too long and that is an error.
    """
    tools = tools or [()] * len(conversations)
    eos = _end_of_text(renderer)
    room = limits.max_length - len(eos)
    written = _written(renderer, conversations, wheres, tools, tolerates, reasoning)
    numbers = list(written)
    rows: list[TokenRow] = []
    for number, talk in zip(numbers, tokenise(renderer, list(written.values())), strict=True):
        if learned == "last-answer":
            talk = Talk(talk.tokens, talk.learned[-1:], talk.answers[-1:])
        fitted: Talk | None = talk
        if not limits.keeps(len(talk.tokens) + len(eos), wheres[number]):
            fitted = None
            if limits.overlong == "truncate":
                row = (conversations[number], tools[number])
                fitted = _shortened(renderer, *row, talk, room, limits.cuts)
        if fitted is not None:
            rows.append(_row(fitted, eos, number, learned == "all", fitted is not talk))
    return pack(rows, [i for i in range(len(conversations)) if i not in written])


def _row(
    talk: Talk, eos: Sequence[int], number: int, learns_all: bool, is_truncated: bool
) -> TokenRow:
    *others, (start, end) = talk.learned
    tokens = [*talk.tokens, *eos]
    spans = [(1, len(tokens))] if learns_all else [*others, (start, end + len(eos))]
    return TokenRow(tokens, spans, start, number, talk.answers[-1], is_truncated)


def _written(
    renderer: Renderer,
    conversations: Sequence[Sequence[Message]],
    wheres: Sequence[str],
    tools: Sequence[Tools],
    tolerates: bool,
    reasoning: Reasoning,
) -> dict[int, Rendered]:
    """Return the rendered conversations by number, without those that are refused."""

    def write(numbers: Sequence[int]) -> list[Rendered]:
        talks = [conversations[i] for i in numbers]
        places = [wheres[i] for i in numbers]
        found = renderer.render(talks, places, [tools[i] for i in numbers])
        if reasoning != "as-template":
            for one, talk, where in zip(found, talks, places, strict=True):
                last = one.turns[-1]
                learned = renderer.unescape(one.text[last.start :])
                check_answers(talk[: last.message + 1], learned, where)
        return found

    everything = range(len(conversations))
    try:
        return dict(zip(everything, write(everything), strict=True))
    except DataError:
        if not tolerates:
            raise
    one_by_one: dict[int, Rendered] = {}
    for i in everything:
        with suppress(DataError):
            (one_by_one[i],) = write([i])
    return one_by_one


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], wheres: Sequence[str], limits: Limits
) -> Encoded:
    """Tokenise plain texts for language modelling: all is supervised, and each ends with eos.

    Raises:
        DataError: If the tokenizer has no eos token, or a row is too long and that is an error.
    """
    eos = _eos(tokenizer)
    rows: list[TokenRow] = []
    for number, ids in enumerate(as_text(tokenizer, texts)):
        tokens = ids if ids and ids[-1] == eos else [*ids, eos]
        is_long = not limits.keeps(len(tokens), wheres[number])
        if is_long:
            if limits.overlong == "drop":
                continue
            tokens = [*tokens[: limits.max_length - 1], eos]
        if len(tokens) > 1:  # the first token has nothing to be predicted from
            spans = [(1, len(tokens))]
            rows.append(TokenRow(tokens, spans, 0, number, is_truncated=is_long))
    return pack(rows)


def encode_for_classes(
    tokenizer: Tokenizer, texts: Sequence[str], wheres: Sequence[str], limits: Limits
) -> Encoded:
    """Tokenise texts for a classification head, with the special tokens the tokenizer adds.

    Raises:
        DataError: If a row is too long and that is an error.
    """
    rows: list[TokenRow] = []
    whole = as_text(tokenizer, texts)
    long = [i for i, ids in enumerate(whole) if not limits.keeps(len(ids), wheres[i])]
    if limits.overlong == "truncate" and long:
        settings = {"truncation": True, "max_length": limits.max_length}
        short = as_text(tokenizer, [texts[i] for i in long], **settings)
        for i, ids in zip(long, short, strict=True):
            whole[i] = ids
    dropped = set(long) if limits.overlong == "drop" else set()
    cut = set(long) - dropped
    for number, ids in enumerate(whole):
        if number not in dropped:
            is_cut = number in cut
            rows.append(TokenRow(ids, [], len(ids), number, is_truncated=is_cut))
    return pack(rows)


def _shortened(
    renderer: Renderer,
    messages: Sequence[Message],
    tools: Tools,
    talk: Talk,
    room: int,
    cuts: Cuts,
) -> Talk | None:
    def user_part(answer: int) -> tuple[int, int]:
        before = list(messages[: talk.answers[answer]])
        last = max(i for i, m in enumerate(before) if m.role == "user")
        before[last] = Message("user", "")
        without = renderer.write([before], ["a shortened row"], tools=[tools], generation=True)[0]
        prompt = talk.tokens[: talk.learned[answer][0]]
        return differing(prompt, piece(renderer, without, is_first=True))

    is_ended = renderer.end_of_turn is not None
    if is_ended and not renderer.ends_every_turn and len(talk.learned) > 1:
        return None  # an answer that was not the last one has no end-of-turn token
    return shorten(talk, room, is_ended=is_ended, user_part=user_part, cuts=cuts)


def _end_of_text(renderer: Renderer) -> list[int]:
    """Return what must be appended because the template ends turns without a token."""
    return [] if renderer.end_of_turn else [_eos(renderer.tokenizer)]


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The tokenizer has no eos token, so a model would never learn to stop. Set eos_token "
            "in the tokenizer's configuration, or a model.chat_template that ends turns"
        )
    return int(tokenizer.eos_token_id)
