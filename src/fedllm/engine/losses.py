"""From the outputs of a pass to the losses of its examples, for each objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedllm.config import TrainingConfig
from fedllm.engine.examples import Laid, mismatched
from fedllm.engine.objectives import PassOutput
from fedllm.engine.objectives_preference import pair_losses, rated_losses
from fedllm.engine.packing import Sequences
from fedllm.engine.references import References, answer_logps, base_logps, in_passes
from fedllm.engine.shards import collect

Policy = Callable[[Sequences, np.ndarray], Tensor]
"""From some sequences, and their places among all, to their log-probabilities (N,) under the
models that are trained or evaluated; no gradient."""


class Losses(Protocol):
    """An objective."""

    def prepare(self, rows: np.ndarray, owners: np.ndarray, policy: Policy) -> None:
        """Work out what the losses of a step take as given, before its passes.

        Args:
            rows: int (n,): all examples of the step.
            owners: int (n,): the client of each, non-decreasing.
            policy: The models as they are.
        """

    def of(
        self, out: PassOutput, laid: Laid, rows: np.ndarray, owners: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Return the terms of the loss in a pass, fp32 (m,), and the client of each, int (m,).

        Args:
            out: What the pass gave.
            laid: How the sequences of the examples lie in it.
            rows: int (n,): its examples.
            owners: int (n,): the client of each.
        """


class TokenLosses:
    """Cross-entropy of each supervised token, or of each class."""

    def prepare(self, rows: np.ndarray, owners: np.ndarray, policy: Policy) -> None:
        """Nothing is taken as given."""

    def of(
        self, out: PassOutput, laid: Laid, rows: np.ndarray, owners: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Return a term for each predicted token."""
        return out.losses, torch.from_numpy(laid.owners).to(out.losses.device)[out.owners]


class PairLosses:
    """DPO: one term a pair, both of whose answers are in the same pass."""

    def __init__(self, references: References, training: TrainingConfig) -> None:
        self.references, self.training = references, training

    def prepare(self, rows: np.ndarray, owners: np.ndarray, policy: Policy) -> None:
        """Pairs are judged one by one."""

    def of(
        self, out: PassOutput, laid: Laid, rows: np.ndarray, owners: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Return a term for each pair."""
        device = out.losses.device
        place = torch.from_numpy(laid.place).to(device)
        logps = answer_logps(out, len(laid.chosen))[place].T
        counts = torch.bincount(out.owners, minlength=len(laid.chosen))[place].T
        base = torch.from_numpy(self.references.of(rows)).to(device)
        losses = pair_losses(logps - base, counts, self.training)
        return losses, torch.from_numpy(owners).to(device)


class RatedLosses:
    """KTO: one term an answer, against how far its client's model has moved."""

    def __init__(self, references: References, training: TrainingConfig) -> None:
        self.references, self.training = references, training
        flags = references.examples.tokens.desirable
        assert flags is not None
        self._is_desirable = flags
        self._drift = torch.zeros(0)

    def prepare(self, rows: np.ndarray, owners: np.ndarray, policy: Policy) -> None:
        """Estimate how far each client's model has moved, on mismatched answers of the step."""
        tokens, resident = self.references.examples.tokens, self.references.resident
        crossed = mismatched(tokens, rows, owners)

        def moved(part: np.ndarray) -> Tensor:
            sequences = collect(crossed, part, owners[part])
            return policy(sequences, part) - base_logps(resident, sequences)

        found = in_passes(resident, crossed.lengths, owners, moved)
        clients = torch.from_numpy(owners).to(found.device)
        sums = found.new_zeros(int(owners.max()) + 1).index_add(0, clients, found)
        counts = torch.bincount(clients).clamp(min=1)
        self._drift = (sums / counts).clamp(min=0.0)

    def of(
        self, out: PassOutput, laid: Laid, rows: np.ndarray, owners: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Return a term for each answer."""
        device = out.losses.device
        place = torch.from_numpy(laid.place[0]).to(device)
        base = torch.from_numpy(self.references.of(rows)[:, 0]).to(device)
        ratios = answer_logps(out, len(laid.chosen))[place] - base
        clients = torch.from_numpy(owners).to(device)
        flags = torch.from_numpy(self._is_desirable[rows]).to(device)
        return rated_losses(ratios, self._drift[clients], flags, self.training), clients


def losses_of(references: References, training: TrainingConfig) -> Losses:
    """Return the objective of these examples."""
    match references.examples.objective:
        case "sft":
            return TokenLosses()
        case "dpo":
            return PairLosses(references, training)
        case "kto":
            return RatedLosses(references, training)
