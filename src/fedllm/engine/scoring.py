"""Teacher-forced scores of test rows: tokens and classes, and what a model prefers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedllm.config import TrainingConfig
from fedllm.engine.examples import Laid
from fedllm.engine.generate import Asked
from fedllm.engine.losses import Losses, losses_of
from fedllm.engine.objectives import PassOutput
from fedllm.engine.packing import Sequences, segments, split
from fedllm.engine.references import References, answer_logps
from fedllm.engine.resident import Resident
from fedllm.engine.shards import collect
from fedllm.federation import AnswerScores, Scores


def score(groups: Iterable[Asked], references: References, training: TrainingConfig) -> Scores:
    """Return what each asked-for row gets under its view, in one sweep.

    Args:
        groups: Rows and the models they are asked under.
        references: The rows, and what the base says of their answers.
        training: Constants of the preference loss.
    """
    examples, resident = references.examples, references.resident
    scores = Scores.empty(examples.rows)
    losses = None
    if examples.objective != "sft":
        found = AnswerScores.empty(examples.rows, examples.sides)
        scores, losses = replace(scores, preferences=found), losses_of(references, training)
    padded, limit = not resident.is_packed, resident.tokens_per_pass * 2
    for asked in groups:
        if losses is not None:
            references.learn_blocks(asked.rows)
            losses.prepare(asked.rows, asked.owners, _Policy(resident, asked))
        sizes = examples.pass_sizes(asked.rows, is_padded=padded)
        for part in split(sizes, asked.owners, limit, is_padded=padded):
            _score_pass(asked.at(part), references, losses, training.beta, scores)
    return scores


def lay_out(resident: Resident, asked: Asked, lengths: np.ndarray) -> None:
    """Tell the layers whose sequences a pass holds: one for each of the rows."""
    active, packed = asked.active, resident.is_packed
    active.by_sequence = segments(asked.owners, np.ones_like(asked.rows))
    active.by_token = segments(asked.owners, lengths) if packed else ()
    active.sequence_lengths = lengths.tolist() if packed else ()
    asked.weigh(resident.device)


def _run(resident: Resident, asked: Asked, sequences: Sequences) -> PassOutput:
    lay_out(resident, asked, sequences.lengths)
    with torch.no_grad(), resident.using(asked.active):
        return resident.forward.run(sequences)


class _Policy:
    """The log-probabilities of sequences under the views that some rows are asked under."""

    def __init__(self, resident: Resident, asked: Asked) -> None:
        self.resident, self.asked = resident, asked

    def __call__(self, sequences: Sequences, part: np.ndarray) -> Tensor:
        """Return the log-probability of each sequence."""
        out = _run(self.resident, self.asked.at(part), sequences)
        return answer_logps(out, len(sequences.lengths))


def _score_pass(
    asked: Asked, references: References, losses: Losses | None, beta: float, scores: Scores
) -> None:
    """Run one pass and put down what it says of its rows."""
    examples = references.examples
    laid = examples.lay(asked.rows, asked.owners)
    sequences = collect(examples.tokens, laid.chosen, laid.owners)
    out = _run(references.resident, asked.at(laid.examples), sequences)
    owners = out.owners.cpu().numpy()
    first = laid.sides[owners] == 0  # the worse answers of pairs count nowhere else
    place = asked.rows[laid.examples[owners]][first]
    np.add.at(scores.loss_sum, place, out.losses.double().cpu().numpy()[first])
    np.add.at(scores.count, place, 1)
    assert out.correct is not None
    np.add.at(scores.correct, place, out.correct.cpu().numpy()[first])
    if out.choices is not None:
        scores.choice[place] = out.choices.cpu().numpy()
    if losses is not None:
        terms, _ = losses.of(out, laid, asked.rows, asked.owners)
        _compare(references, asked.rows, laid, (out, terms), beta, scores)


def _compare(
    references: References,
    rows: np.ndarray,
    laid: Laid,
    found: tuple[PassOutput, Tensor],
    beta: float,
    scores: Scores,
) -> None:
    """Put down log-probabilities, margins of implicit rewards, and losses of answers."""
    out, terms = found
    kept = scores.preferences
    assert kept is not None
    logps = answer_logps(out, len(laid.chosen)).double().cpu().numpy()[laid.place].T
    rewards = beta * (logps - references.of(rows))
    flags = references.examples.tokens.desirable
    if references.examples.sides == 2 or flags is None:
        margins = rewards[:, 0] - rewards[:, 1]
    else:
        margins = np.where(flags[rows], rewards[:, 0], -rewards[:, 0])
    kept.logps[rows] = logps
    kept.margins[rows] = margins
    kept.losses[rows] = terms.double().cpu().numpy()
