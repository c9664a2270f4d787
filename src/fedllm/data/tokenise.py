"""Rows to token ids, once for all clients: what is the prompt, and what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedllm.data.overlong import Limits, Talk, differing, shorten
from fedllm.data.render import Rendered, Renderer, Tokenizer
from fedllm.data.rows import Message
from fedllm.data.tokens import Encoded, TokenRow, pack
from fedllm.errors import DataError


def encode_conversations(
    renderer: Renderer,
    conversations: Sequence[Sequence[Message]],
    wheres: Sequence[str],
    limits: Limits,
) -> Encoded:
    """Tokenise conversations; every answer is supervised up to the end of its turn.

    Args:
        renderer: Writes the conversations.
        conversations: Each ends with an answer that a user message precedes.
        wheres: Where each stands, for messages.
        limits: What happens to long ones (see `fedllm.data.overlong`).

    Raises:
        DataError: If the template refuses a row, or a row is too long and that is an error.
    """
    eos = _end_of_text(renderer)
    room = limits.max_length - len(eos)
    rows: list[TokenRow] = []
    truncated = 0
    talks = _tokenise(renderer, renderer.render(conversations, wheres))
    for number, talk in enumerate(talks):
        fitted: Talk | None = talk
        if not limits.keeps(len(talk.tokens) + len(eos), wheres[number]):
            fitted = None
            if limits.overlong == "truncate":
                fitted = _shortened(renderer, conversations[number], talk, room)
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
    for number, ids in enumerate(_as_text(tokenizer, texts)):
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
    whole = _as_text(tokenizer, texts)
    long = [i for i, ids in enumerate(whole) if not limits.keeps(len(ids), wheres[i])]
    if limits.overlong == "truncate" and long:
        settings = {"truncation": True, "max_length": limits.max_length}
        short = _as_text(tokenizer, [texts[i] for i in long], **settings)
        for i, ids in zip(long, short, strict=True):
            whole[i] = ids
    dropped = set(long) if limits.overlong == "drop" else set()
    for number, ids in enumerate(whole):
        if number not in dropped:
            rows.append(TokenRow(ids, [], len(ids), number))
    return pack(rows, truncated=len(long) - len(dropped))


def _tokenise(renderer: Renderer, rendered: Sequence[Rendered]) -> list[Talk]:
    """Tokenise rendered conversations, all in one call where nothing special is in them."""
    simple = [r for r in rendered if not r.is_escaped]
    prompts = [r.text[: turn.start] for r in simple for turn in r.turns]
    ids = iter(_batch(renderer.tokenizer, [*(r.text for r in simple), *prompts]))
    wholes = iter([next(ids) for _ in simple])
    talks = []
    for one in rendered:
        talk = None
        if not one.is_escaped:
            whole = next(wholes)
            talk = _by_prefix(renderer, one, whole, [next(ids) for _ in one.turns])
        talks.append(talk or _by_pieces(renderer, one))
    return talks


def _by_prefix(
    renderer: Renderer, one: Rendered, whole: list[int], prompts: Sequence[list[int]]
) -> Talk | None:
    """Find the answers in the tokens of the whole; None where tokens reach over a boundary."""
    end = renderer.end_of_turn
    end_id = _token_id(renderer, end) if end else -1
    learned = []
    for turn, prompt in zip(one.turns, prompts, strict=True):
        start = len(prompt)
        if whole[:start] != prompt:
            return None
        if end and one.text.endswith(end, turn.start, turn.end):
            learned.append((start, whole.index(end_id, start) + 1))
        elif turn is one.turns[-1]:
            learned.append((start, len(whole)))
        else:
            return None
    return Talk(whole, learned, [turn.message for turn in one.turns])


def _by_pieces(renderer: Renderer, one: Rendered) -> Talk:
    """Tokenise prompts and answers apart and join them.

    So no token reaches over the boundary between them, and control tokens of the data stay text.
    """
    tokens: list[int] = []
    learned = []
    done = 0
    for turn in one.turns:
        tokens += _piece(renderer, one.text[done : turn.start], is_first=done == 0)
        start = len(tokens)
        tokens += _piece(renderer, one.text[turn.start : turn.end], is_first=False)
        learned.append((start, len(tokens)))
        done = turn.end
    return Talk(tokens, learned, [turn.message for turn in one.turns])


def _piece(renderer: Renderer, text: str, *, is_first: bool) -> list[int]:
    """Tokenise a part of a rendered text: control tokens as such, what is between as text."""
    tokens: list[int] = []
    done, strips = 0, False
    kinds = {str(t): t for t in renderer.tokenizer.added_tokens_decoder.values()}
    for match in renderer.control_pattern.finditer(text):
        between, kind = text[done : match.start()], kinds[match[0]]
        between = between.lstrip() if strips else between
        between = between.rstrip() if kind.lstrip else between
        tokens += _between(renderer, between, is_first=is_first and done == 0)
        tokens.append(_token_id(renderer, match[0]))
        done, strips = match.end(), kind.rstrip
    rest = text[done:].lstrip() if strips else text[done:]
    return tokens + _between(renderer, rest, is_first=is_first and done == 0)


def _between(renderer: Renderer, text: str, *, is_first: bool) -> list[int]:
    """Tokenise text that stands in the middle of a longer one.

    Some tokenizers put a space before the first word they see; behind a line break they do not.
    """
    tokenizer, plain = renderer.tokenizer, renderer.unescape(text)
    if not plain:
        return []
    settings = {"add_special_tokens": False}
    if not is_first:
        anchor, both = _as_text(tokenizer, ["\n", "\n" + plain], **settings)
        if both[: len(anchor)] == anchor:
            return both[len(anchor) :]
    return _as_text(tokenizer, [plain], **settings)[0]


def _shortened(
    renderer: Renderer, messages: Sequence[Message], talk: Talk, room: int
) -> Talk | None:
    def user_part(answer: int) -> tuple[int, int]:
        before = [Message(m.role, renderer.escape(m.content)) for m in messages]
        before = before[: talk.answers[answer]]
        last = max(i for i, m in enumerate(before) if m.role == "user")
        before[last] = Message("user", "")
        without = renderer.write([before], ["a shortened row"], generation=True)[0]
        prompt = talk.tokens[: talk.learned[answer][0]]
        return differing(prompt, _piece(renderer, without, is_first=True))

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


def _token_id(renderer: Renderer, token: str) -> int:
    return int(renderer.tokenizer.convert_tokens_to_ids(token))


def _batch(tokenizer: Tokenizer, texts: Sequence[str], **settings: Any) -> list[list[int]]:
    """Tokenise rendered texts, in which control tokens are control tokens."""
    if not texts:
        return []
    settings = {
        "add_special_tokens": False,
        "split_special_tokens": False,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "verbose": False,
        **settings,
    }
    return list(tokenizer(list(texts), **settings)["input_ids"])


def _as_text(tokenizer: Tokenizer, texts: Sequence[str], **settings: Any) -> list[list[int]]:
    """Tokenise texts of the data, in which control tokens are only text."""
    settings = {"add_special_tokens": True, "split_special_tokens": True, **settings}
    try:
        return _batch(tokenizer, texts, **settings)
    finally:
        tokenizer("")  # these settings stick to the backend until the next call
