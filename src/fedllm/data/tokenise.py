"""Rows to token ids, once for all clients: what is the prompt, and what is learned."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.data.overlong import Limits, Talk, differing, shorten
from fedllm.data.pieces import as_text, piece, tokenise
from fedllm.data.render import Renderer
from fedllm.data.rows import Message
from fedllm.data.template import Tokenizer
from fedllm.data.tokens import Encoded, TokenRow, pack
from fedllm.data.turns import Tools
from fedllm.errors import DataError


def encode_conversations(
    renderer: Renderer,
    conversations: Sequence[Sequence[Message]],
    wheres: Sequence[str],
    limits: Limits,
    *,
    tools: Sequence[Tools] | None = None,
) -> Encoded:
    """Tokenise conversations; every answer is supervised up to the end of its turn.

    Args:
        renderer: Writes the conversations.
        conversations: Each ends with an answer that a user message precedes.
        wheres: Where each stands, for messages.
        limits: What happens to long ones (see `fedllm.data.overlong`).
        tools: What the assistant of each may call; none unless given.

    Raises:
        DataError: If the template refuses a row, or a row is too long and that is an error.
    """
    eos = _end_of_text(renderer)
    room = limits.max_length - len(eos)
    rows: list[TokenRow] = []
    truncated = 0
    talks = tokenise(renderer, renderer.render(conversations, wheres, tools))
    for number, talk in enumerate(talks):
        fitted: Talk | None = talk
        if not limits.keeps(len(talk.tokens) + len(eos), wheres[number]):
            fitted = None
            if limits.overlong == "truncate":
                fitted = _shortened(
                    renderer, conversations[number], tools[number] if tools else (), talk, room
                )
                truncated += fitted is not None
        if fitted is not None:
            *others, (start, end) = fitted.learned
            learned = [*others, (start, end + len(eos))]
            tokens = [*fitted.tokens, *eos]
            rows.append(TokenRow(tokens, learned, start, number, fitted.answers[-1]))
    return pack(rows, truncated=truncated)


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], wheres: Sequence[str], limits: Limits
) -> Encoded:
    """Tokenise plain texts for language modelling: all is supervised, and each ends with eos.

    Raises:
        DataError: If the tokenizer has no eos token, or a row is too long and that is an error.
    """
    eos = _eos(tokenizer)
    rows: list[TokenRow] = []
    truncated = 0
    for number, ids in enumerate(as_text(tokenizer, texts)):
        tokens = ids if ids and ids[-1] == eos else [*ids, eos]
        if not limits.keeps(len(tokens), wheres[number]):
            if limits.overlong == "drop":
                continue
            tokens = [*tokens[: limits.max_length - 1], eos]
            truncated += 1
        if len(tokens) > 1:  # the first token has nothing to be predicted from
            rows.append(TokenRow(tokens, [(1, len(tokens))], 0, number))
    return pack(rows, truncated=truncated)


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
    for number, ids in enumerate(whole):
        if number not in dropped:
            rows.append(TokenRow(ids, [], len(ids), number))
    return pack(rows, truncated=len(long) - len(dropped))


def _shortened(
    renderer: Renderer, messages: Sequence[Message], tools: Tools, talk: Talk, room: int
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
    return shorten(talk, room, is_ended=is_ended, user_part=user_part)


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
