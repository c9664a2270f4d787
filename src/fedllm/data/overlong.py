"""What happens to rows that are longer than `data.max_length`: dropped, shortened or refused.

How a conversation is shortened (`overlong: truncate`):

1. Whole exchanges at its end go, until what is left fits.
2. Where the first exchange alone is too long, its answer loses its tail: down to half of
   `max_length`, or to what the prompt leaves if that is more. The end-of-turn token stays.
3. If that is not enough, the last user message loses its tail. What the template writes around
   it stays, above all the header that makes the assistant speak.
4. Where that leaves less than one token of the user's, the answer gives way further.
5. A row of which not even one token on either side would be left is dropped and counted.

Two kinds of rows are shortened with more care. The prompt of a test row must not depend on the
answer it is compared with, so there the answer gives way first. And the two sides of a preference
pair share their prompt, so only their answers are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fedllm.data.tokens import Span
from fedllm.errors import DataError

Cuts = Literal["both", "answer-first", "answer"]


@dataclass(frozen=True)
class Limits:
    """The longest row in tokens, and what happens to longer ones."""

    max_length: int
    overlong: Literal["drop", "truncate", "error"]
    cuts: Cuts = "both"
    """What `truncate` may cut of a conversation: as above; the answer first, and the prompt only
    where that is not enough; or the answer alone."""

    def keeps(self, length: int, where: str) -> bool:
        """Tell whether a row of this length stays as it is.

        Raises:
            DataError: If it is too long and `overlong` is `error`.
        """
        if length > self.max_length and self.overlong == "error":
            raise DataError(
                f"{where}: {length} tokens, more than data.max_length {self.max_length}. Raise "
                "max_length, shorten the row, or set data.overlong to drop or truncate"
            )
        return length <= self.max_length


@dataclass(frozen=True, slots=True)
class Talk:
    """A tokenised conversation: where its answers are, and which messages they are."""

    tokens: list[int]
    learned: list[Span]
    answers: list[int]


def shorten(
    talk: Talk,
    room: int,
    *,
    is_ended: bool,
    user_part: Callable[[int], Span],
    cuts: Cuts = "both",
) -> Talk | None:
    """Return the conversation in at most `room` tokens, or None if that cannot be done.

    Args:
        talk: Longer than `room`; not modified.
        room: Most tokens.
        is_ended: Whether the last token of each answer ends the turn, so that it must stay.
        user_part: From the number of an answer to the tokens of the user message before it.
        cuts: What may be cut (see `Limits.cuts`).
    """
    whole = [span for span in talk.learned if span[1] <= room]
    if whole:
        return Talk(talk.tokens[: whole[-1][1]], whole, talk.answers[: len(whole)])
    start, end = talk.learned[0]
    fewest = 1 + is_ended
    first, last = user_part(0) if cuts != "answer" else (start, start)
    least = start - max(last - first - 1, 0)  # a prompt with one token of the user's
    wanted = room // 2 if cuts == "both" else fewest
    length = min(end - start, max(room - start, min(wanted, room - least)))
    if length < fewest:
        return None
    answer = talk.tokens[start : start + length]
    if is_ended:
        answer[-1] = talk.tokens[end - 1]
    excess = max(start + length - room, 0)
    prompt = talk.tokens[: last - excess] + talk.tokens[last:start]
    return Talk(prompt + answer, [(len(prompt), len(prompt) + length)], talk.answers[:1])


def differing(tokens: Sequence[int], without: Sequence[int]) -> Span:
    """Return the part of `tokens` that `without` lacks, both being equal before and after it.

    >>> differing([1, 2, 7, 8, 3], [1, 2, 3])
    (2, 4)
    """
    shorter = min(len(tokens), len(without))
    before = next((i for i in range(shorter) if tokens[i] != without[i]), shorter)
    most = shorter - before
    after = next((i for i in range(most) if tokens[-1 - i] != without[-1 - i]), most)
    return before, len(tokens) - after
