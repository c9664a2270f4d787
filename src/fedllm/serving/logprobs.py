"""Log-probabilities of tokens in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedllm.serving.replies import TextLogprobs, TokenLogprob, TopLogprob
from fedllm.serving.sampling import Choice

Spell = Callable[[int], str]
"""A token's text."""


def of_message(choices: Sequence[Choice], spell: Spell, top: int) -> list[TokenLogprob]:
    """Return the tokens of a message with the likeliest others."""
    return [
        TokenLogprob(
            token=spell(choice.token),
            logprob=choice.logprob or 0.0,
            bytes=_bytes(spell(choice.token)),
            top_logprobs=[
                TopLogprob(token=spell(token), logprob=value, bytes=_bytes(spell(token)))
                for token, value in choice.top[:top]
            ],
        )
        for choice in choices
    ]


def of_text(choices: Sequence[Choice], spell: Spell, start: int, top: int) -> TextLogprobs:
    """Return the tokens of a text, in the older shape.

    Args:
        choices: The tokens.
        spell: Their text.
        start: Characters before the first of them.
        top: How many of the likeliest are named.
    """
    tokens = [spell(choice.token) for choice in choices]
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(token)
    return TextLogprobs(
        tokens=tokens,
        token_logprobs=[choice.logprob or 0.0 for choice in choices],
        top_logprobs=[
            {spell(token): value for token, value in choice.top[:top]} for choice in choices
        ],
        text_offset=offsets,
    )


def _bytes(text: str) -> list[int]:
    return list(text.encode("utf-8", errors="replace"))
