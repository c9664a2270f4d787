"""Rendered text to tokens: in one go where no token reaches over a boundary, else in pieces.

What stands before an answer gets the same tokens here whether the answer is known or not, so the
prompt of training is the prompt of inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedllm.data.marks import Rendered
from fedllm.data.overlong import Talk
from fedllm.data.template import Tokenizer
from fedllm.data.tokens import Span

if TYPE_CHECKING:
    from fedllm.data.render import Renderer


def tokenise(renderer: Renderer, rendered: Sequence[Rendered]) -> list[Talk]:
    """Tokenise rendered conversations, all in one call where nothing special is in them."""
    simple = [one for one in rendered if not renderer.is_escaped(one.text)]
    prompts = [one.text[: turn.start] for one in simple for turn in one.turns]
    ids = iter(batch(renderer.tokenizer, [*(one.text for one in simple), *prompts]))
    wholes = iter([next(ids) for _ in simple])
    talks = []
    for one in rendered:
        found = None
        if not renderer.is_escaped(one.text):
            whole, heads = next(wholes), [next(ids) for _ in one.turns]
            found = _by_prefix(renderer, one, whole, heads)
        tokens, spans = found or _by_pieces(renderer, one)
        learned = [i for i, turn in enumerate(one.turns) if turn.is_learned]
        answers = [one.turns[i].message for i in learned]
        talks.append(Talk(tokens, [spans[i] for i in learned], answers))
    return talks


def prompt_tokens(renderer: Renderer, prompt: Rendered) -> tuple[list[int], list[Span]]:
    """Return the tokens of a text that an answer follows, and where earlier answers are in it.

    Args:
        renderer: Wrote the text.
        prompt: Its turns are the answers before the one that follows.
    """
    text, turns = prompt.text, prompt.turns
    if not renderer.is_escaped(text):
        heads = [text[: turn.start] for turn in turns]
        whole, *ids = batch(renderer.tokenizer, [text, *heads])
        found = _by_prefix(renderer, prompt, whole, ids)
        if found is not None:
            return found
    if not turns:
        return piece(renderer, text, is_first=True), []
    tokens, spans = _by_pieces(renderer, prompt)
    return tokens + piece(renderer, text[turns[-1].end :], is_first=False), spans


def _by_prefix(
    renderer: Renderer, one: Rendered, whole: list[int], heads: Sequence[list[int]]
) -> tuple[list[int], list[Span]] | None:
    """Find the answers in the tokens of the whole; None where tokens reach over a boundary."""
    end = renderer.end_of_turn
    end_id = token_id(renderer, end) if end else -1
    spans = []
    for turn, head in zip(one.turns, heads, strict=True):
        start = len(head)
        if whole[:start] != head:
            return None
        if end and one.text.endswith(end, turn.start, turn.end):
            spans.append((start, whole.index(end_id, start) + 1))
        elif turn.end == len(one.text):
            spans.append((start, len(whole)))
        else:
            return None
    return whole, spans


def _by_pieces(renderer: Renderer, one: Rendered) -> tuple[list[int], list[Span]]:
    """Tokenise up to the last answer as for inference, the answer apart, and join them.

    So no token reaches over the boundary between them, and control tokens of the data stay text.
    """
    *earlier, last = one.turns
    prompt = Rendered(one.text[: last.start], tuple(earlier))
    tokens, spans = prompt_tokens(renderer, prompt)
    start = len(tokens)
    tokens = tokens + piece(renderer, one.text[last.start : last.end], is_first=False)
    return tokens, [*spans, (start, len(tokens))]


def piece(renderer: Renderer, text: str, *, is_first: bool) -> list[int]:
    """Tokenise a part of a rendered text: control tokens as such, what is between as text."""
    tokens: list[int] = []
    done, strips = 0, False
    kinds = {str(t): t for t in renderer.tokenizer.added_tokens_decoder.values()}
    for match in renderer.control_pattern.finditer(text):
        between, kind = text[done : match.start()], kinds[match[0]]
        between = between.lstrip() if strips else between
        between = between.rstrip() if kind.lstrip else between
        tokens += _between(renderer, between, is_first=is_first and done == 0)
        tokens.append(token_id(renderer, match[0]))
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
        anchor, both = as_text(tokenizer, ["\n", "\n" + plain], **settings)
        if both[: len(anchor)] == anchor:
            return both[len(anchor) :]
    return as_text(tokenizer, [plain], **settings)[0]


def token_id(renderer: Renderer, token: str) -> int:
    """Return a control token's id."""
    return int(renderer.tokenizer.convert_tokens_to_ids(token))


def batch(tokenizer: Tokenizer, texts: Sequence[str], **settings: Any) -> list[list[int]]:
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


def as_text(tokenizer: Tokenizer, texts: Sequence[str], **settings: Any) -> list[list[int]]:
    """Tokenise texts of the data, in which control tokens are only text."""
    settings = {"add_special_tokens": True, "split_special_tokens": True, **settings}
    try:
        return batch(tokenizer, texts, **settings)
    finally:
        tokenizer("")  # these settings stick to the backend until the next call
