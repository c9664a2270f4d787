"""From logits to the next token of each sequence; what one draws no other changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that have this much probability together."""
    top_k: int = 0
    """Draw among this many of the likeliest tokens; 0 means all."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token that the answer holds (OpenAI)."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token for each time that the answer holds it (OpenAI)."""
    repetition_penalty: float = 1.0
    """Divides positive logits, multiplies negative ones, of tokens of prompt and answer."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens are reported with the chosen one; None reports nothing."""

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        return (
            self.temperature == 0.0
            and not (self.presence_penalty or self.frequency_penalty or self.logit_bias)
            and self.repetition_penalty == 1.0
            and self.top_logprobs is None
        )


class Choice(NamedTuple):
    """A chosen token."""

    token: int
    logprob: float | None = None
    """Natural logarithm of its probability under the model, before any setting."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and theirs."""


class Chooser(Protocol):
    """What is known of a sequence when its next token is chosen."""

    sampling: Sampling
    random: np.random.Generator
    prompt: Sequence[int]
    tokens: list[int]


def choose(logits: Tensor, rows: Sequence[Chooser]) -> list[Choice | None]:
    """Choose the next token of each row.

    Args:
        logits: (rows, vocabulary), of any dtype; not modified.
        rows: The sequences.

    Returns:
        A choice a row; None where the model's output is not finite.
    """
    likeliest = logits.argmax(dim=-1).tolist()
    finite = torch.isfinite(logits.amax(dim=-1)).tolist()
    found: list[Choice | None] = []
    for i, row in enumerate(rows):
        if not finite[i]:
            found.append(None)
        elif row.sampling.is_plain:
            found.append(Choice(likeliest[i]))
        else:
            found.append(_one(logits[i].float(), row))
    return found


def _one(logits: Tensor, row: Chooser) -> Choice:
    own = row.sampling
    scores = _penalised(logits, row)
    if own.temperature == 0.0:
        token = int(scores.argmax())
    else:
        token = _draw(scores / own.temperature, own, row.random)
    if own.top_logprobs is None:
        return Choice(token)
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = logprobs.topk(min(own.top_logprobs, len(logprobs)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Choice(token, float(logprobs[token]), top)


def _penalised(logits: Tensor, row: Chooser) -> Tensor:
    own = row.sampling
    scores = logits.clone()
    if own.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt, *row.tokens}), device=scores.device)
        values = scores[seen]
        penalty = own.repetition_penalty
        scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if (own.presence_penalty or own.frequency_penalty) and row.tokens:
        ids, counts = np.unique(np.asarray(row.tokens), return_counts=True)
        taken = counts * own.frequency_penalty + own.presence_penalty
        index = torch.from_numpy(ids).to(scores.device)
        scores[index] -= torch.from_numpy(taken).to(scores)
    for token, bias in own.logit_bias.items():
        scores[token] += bias
    return scores


def _draw(scores: Tensor, own: Sampling, random: np.random.Generator) -> int:
    """Invert the distribution function at one uniform number."""
    ids: Tensor | None = None
    if 0 < own.top_k < len(scores):
        scores, ids = scores.topk(own.top_k)
    elif own.top_p < 1.0:
        scores, ids = scores.sort(descending=True)
    probabilities = torch.softmax(scores.double(), dim=-1)
    total = probabilities.cumsum(dim=-1)
    if own.top_p < 1.0:
        # the first token is always kept, and each one before which there is less than top_p
        total = total[: 1 + int((total[:-1] < own.top_p).sum())]
    point = float(random.random()) * float(total[-1])
    place = min(int(torch.searchsorted(total, point, right=True)), len(total) - 1)
    return place if ids is None else int(ids[place])
