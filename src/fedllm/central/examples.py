"""Token rows as TRL's trainers take them: our masks, nothing rendered or tokenised again."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedllm.central.stages import STAGES
from fedllm.data import TokenSet
from fedllm.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    from fedllm.central.tables import Settled

IGNORED = -100
"""Label of a token that the loss does not count."""


def examples(stage: str, tokens: TokenSet, pack_to: int | None) -> Settled:
    """Return a split as one of TRL's trainers takes it; `rows` names the rows of each example.

    Args:
        stage: The stage.
        tokens: The split's tokens.
        pack_to: Most tokens of a pack of several rows; None keeps each row by itself.

    Raises:
        DataError: If a row has nothing to learn from.
    """
    match STAGES[stage].shape:
        case "answers" | "texts":
            return _sequences(tokens, pack_to)
        case "pairs":
            return _pairs(stage, tokens)
        case "rated":
            return _rated(tokens)
        case "prompts":
            return _prompts(tokens)


def pieces(tokens: TokenSet, longest: int) -> tuple[TokenSet, npt.NDArray[np.int64]]:
    """Cut texts into pieces of at most `longest` tokens.

    Returns:
        The pieces, and the number of the row that each is from. No token is lost; the first
        token of a piece is predicted from nothing.
    """
    starts = [
        np.arange(begin, end, longest)
        for begin, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    ]
    owners = np.repeat(np.arange(len(tokens)), [len(own) for own in starts])
    offsets = np.concatenate([*starts, tokens.offsets[-1:]]).astype(np.int64)
    supervised = np.ones(len(tokens.tokens), np.bool_)
    supervised[offsets[:-1]] = False
    cut = replace(
        tokens,
        supervised=supervised,
        offsets=offsets,
        prompt_lengths=np.zeros(len(owners), np.int32),
        references=("",) * len(owners),
        groups=None,
    )
    return cut, owners


def bins(lengths: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Put rows into as few packs as best fit by falling length finds.

    Args:
        lengths: Tokens of each row, shape (rows,).
        capacity: Most tokens of a pack; a longer row has one of its own.

    Returns:
        The rows of each pack; the packs in the order of their first rows.

    >>> bins(np.array([3, 5, 2, 4]), 7)
    [[0, 3], [1, 2]]
    """
    packs: list[list[int]] = []
    space: list[tuple[int, int]] = []  # what is left in a pack, and its number, in order
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        place = bisect_left(space, (length, -1))
        if place < len(space):
            left, number = space.pop(place)
        else:
            left, number = max(capacity, length), len(packs)
            packs.append([])
        packs[number].append(row)
        rest = (left - length, number)
        space.insert(bisect_left(space, rest), rest)
    return sorted(sorted(pack) for pack in packs)


def _sequences(tokens: TokenSet, pack_to: int | None) -> Settled:
    """Return `input_ids` and `labels` of rows, or of packs with their `seq_lengths`."""
    from fedllm.central.tables import flat

    labels = np.where(tokens.supervised, tokens.tokens, IGNORED)
    if pack_to is None:
        numbers = np.arange(len(tokens) + 1, dtype=np.int64)
        return flat(
            input_ids=(tokens.tokens, tokens.offsets),
            labels=(labels, tokens.offsets),
            rows=(numbers[:-1], numbers),
        )
    packs = bins(tokens.lengths, pack_to)
    order = np.concatenate([np.asarray(pack, np.int64) for pack in packs])
    lengths = tokens.lengths[order]
    take = places_of(tokens.offsets[order], lengths)
    of_packs = np.cumsum([0, *(len(pack) for pack in packs)])
    ends = np.concatenate([[0], np.cumsum(lengths)])[of_packs]
    return flat(
        input_ids=(tokens.tokens[take], ends),
        labels=(labels[take], ends),
        seq_lengths=(lengths, of_packs),
        rows=(order, of_packs),
    )


def _pairs(stage: str, tokens: TokenSet) -> Settled:
    """Return the better and the worse answer of each row, by the names its trainer uses."""
    from fedllm.central.tables import listed

    worse = tokens.rejected
    if worse is None:
        raise DataError(f"stage {stage} needs pairs of answers, but the rows have one each")
    whole = [_split(own, i) for own in (tokens, worse) for i in range(len(tokens))]
    better, other = whole[: len(tokens)], whole[len(tokens) :]
    rows = [[i] for i in range(len(tokens))]
    if stage == "rm":
        columns = {
            "chosen_ids": [prompt + answer for prompt, answer in better],
            "rejected_ids": [prompt + answer for prompt, answer in other],
        }
    elif stage == "dpo":
        columns = {
            "prompt_ids": [prompt for prompt, _ in better],
            "chosen_ids": [answer for _, answer in better],
            "rejected_ids": [answer for _, answer in other],
        }
    else:
        columns = {"prompt_input_ids": [prompt for prompt, _ in better]}
        columns["prompt_attention_mask"] = [[1] * len(prompt) for prompt, _ in better]
        for name, own in (("chosen", better), ("rejected", other)):
            columns[f"{name}_input_ids"] = [prompt + answer for prompt, answer in own]
            columns[f"{name}_attention_mask"] = [[1] * len(p + a) for p, a in own]
            columns[f"{name}_labels"] = [[IGNORED] * len(p) + a for p, a in own]
    return listed({**columns, "rows": rows})


def _rated(tokens: TokenSet) -> Settled:
    """Return prompts, answers and whether they are wanted."""
    from fedllm.central.tables import listed

    if tokens.desirable is None:
        raise DataError("stage kto needs answers that are wanted or not, but no row says so")
    parts = [_split(tokens, i) for i in range(len(tokens))]
    return listed(
        {
            "prompt_ids": [prompt for prompt, _ in parts],
            "completion_ids": [answer for _, answer in parts],
            "label": tokens.desirable.tolist(),
            "rows": [[i] for i in range(len(tokens))],
        }
    )


def _prompts(tokens: TokenSet) -> Settled:
    """Return the prompts, as token ids, with the answers that rewards compare with."""
    from fedllm.central.tables import listed

    prompts = [tokens.row(i)[0][: tokens.prompt_lengths[i]].tolist() for i in range(len(tokens))]
    return listed(
        {
            "prompt": [str(i) for i in range(len(tokens))],
            "prompt_ids": prompts,
            "reference": list(tokens.references),
            "rows": [[i] for i in range(len(tokens))],
        }
    )


def _split(tokens: TokenSet, index: int) -> tuple[list[int], list[int]]:
    """Return the prompt and the answer of a row."""
    ids, length = tokens.row(index)[0].tolist(), int(tokens.prompt_lengths[index])
    return ids[:length], ids[length:]


def places_of(
    begin: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return where the tokens of rows stand that begin at these places, one row after another."""
    shift = begin - (np.cumsum(lengths) - lengths)
    found: npt.NDArray[np.int64] = np.repeat(shift, lengths) + np.arange(int(lengths.sum()))
    return found
