"""Log-probabilities of answers: under the model as it is, and once under the original base."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedllm.engine.examples import Examples
from fedllm.engine.objectives import PassOutput
from fedllm.engine.packing import Sequences, split
from fedllm.engine.resident import Resident
from fedllm.engine.shards import collect

_BLOCK = 64
"""Rows of a test set that are scored together."""


def answer_logps(out: PassOutput, sequences: int) -> Tensor:
    """Return the summed log-probability of each sequence's supervised tokens, fp32 (N,)."""
    sums = torch.zeros(sequences, device=out.losses.device)
    return sums.index_add(0, out.owners, -out.losses)


class References:
    """What the original base says of every answer: a float for each sequence, computed once.

    The reference policy of a whole run is the base as it was loaded, without adapters and without
    what algorithms have merged into it. A row is always computed in the same company, so what is
    found does not depend on the order of a run or on whether it was resumed.

    Memory: 5 bytes a sequence.
    """

    def __init__(self, resident: Resident, examples: Examples) -> None:
        self.resident, self.examples = resident, examples
        shape = (examples.rows, examples.sides)
        self._known = np.zeros(examples.rows, dtype=bool)
        self._logps = np.zeros(shape, dtype=np.float32)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the log-probabilities under the base, fp32 (n, sides); rows must be known."""
        assert self._known[rows].all()
        return np.asarray(self._logps[rows])

    def learn(self, rows: np.ndarray) -> None:
        """Compute what is missing of these rows, which always come together (a client's)."""
        if not len(rows) or self._known[rows].all():
            return
        owners = np.zeros_like(rows)
        laid = self.examples.lay(rows, owners)
        lengths = self.examples.tokens.lengths[laid.chosen]
        logps = in_passes(
            self.resident,
            lengths,
            laid.owners,
            lambda part: base_logps(
                self.resident, collect(self.examples.tokens, laid.chosen[part], laid.owners[part])
            ),
        )
        self._logps[rows] = logps.cpu().numpy()[laid.place].T
        self._known[rows] = True

    def learn_blocks(self, rows: np.ndarray) -> None:
        """Compute what is missing of these rows, in blocks of consecutive ones."""
        for block in np.unique(rows // _BLOCK).tolist():
            end = min((block + 1) * _BLOCK, self.examples.rows)
            self.learn(np.arange(block * _BLOCK, end))


def base_logps(resident: Resident, sequences: Sequences) -> Tensor:
    """Return the log-probability of each answer under the original base, fp32 (N,)."""
    with torch.no_grad():  # outside of `resident.using` no adapter is active
        return answer_logps(resident.forward.run(sequences), len(sequences.lengths))


def in_passes(
    resident: Resident,
    lengths: np.ndarray,
    owners: np.ndarray,
    score: Callable[[np.ndarray], Tensor],
) -> Tensor:
    """Return a number for each sequence, fp32 (N,), computed pass by pass.

    Args:
        resident: Says how much a pass without gradients holds.
        lengths: int (N,): tokens of each sequence.
        owners: int (N,): the client of each.
        score: From the places of some sequences to their numbers.
    """
    found = torch.zeros(len(lengths), device=resident.device)
    limit = resident.tokens_per_pass * 2
    for part in split(lengths, owners, limit, is_padded=not resident.is_packed):
        found[torch.from_numpy(part).to(found.device)] = score(part)
    return found
