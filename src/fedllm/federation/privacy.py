"""Differential privacy of clients: clipped changes, Gaussian noise, and what may be claimed for it.

**Adjacency.** Two populations are adjacent if one client's whole data is replaced by another's.

**Sensitivity.** Each change is clipped to norm C, and the denominator is the planned cohort, never
the number of updates that came. Replacing a client moves the sum of changes by at most 2 C, from
one end of a ball of radius C to the other; a client that is missing or rejected counts as zero,
which lies in that ball. Noise on the sum has a standard deviation of z C, so the ratio of noise to
sensitivity is z / 2. That ratio is what `dp_accounting` (0.6.0) computes with under `REPLACE_ONE`:
its formula for sampling without replacement asks for "the ratio of the standard deviation of the
Gaussian noise to the l2-sensitivity of the function", and a `GaussianDpEvent` costs
alpha / (2 multiplier^2) under every adjacency. (The docstring of `GaussianDpEvent` says "s / C";
that holds only where a client is added or removed. Known upstream as google/differential-privacy
issue 378; should a later version halve the multiplier itself, halving it here too would claim too
large an epsilon, never too small a one, and a test would say so.)

**What is covered.** The global adapters, seen by somebody who knows neither who was in which cohort
nor `seed`: the noise is drawn from it, so that a run can be repeated. Not covered: losses, ledgers
and events of a run, clients' private tensors, rounding in floating point (Mironov, CCS 2012), and
rules that compare clients with one another before the noise (median, Krum).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from fedllm.adapters import Adapter
from fedllm.adapters.lazy import LazyModule
from fedllm.errors import ConfigError, MissingExtraError
from fedllm.federation.messages import Job, Part, Update
from fedllm.federation.validation import change, downloads, norm
from fedllm.seeding import rng

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

ADJACENCY = "one client's data replaced"


@dataclass(frozen=True)
class ClientPrivacy:
    """Replaces a cohort's updates by the mean of their clipped changes, with noise.

    Raises:
        ConfigError: If a setting is out of range.
    """

    clip: float
    """C: largest norm of a client's change, all shared tensors as one vector."""
    noise_multiplier: float
    """z: the noise on the sum of changes has standard deviation z C on every coordinate."""
    delta: float
    """Probability with which the guarantee may fail; keep it well below 1 / clients."""
    seed: int
    """Root of the noise."""

    def __post_init__(self) -> None:
        wrong = []
        if not 0 < self.clip < math.inf:
            wrong.append(f"privacy.clip: give a number above 0 (got {self.clip!r})")
        if not 0 <= self.noise_multiplier < math.inf:
            wrong.append(
                f"privacy.noise_multiplier: give a number of at least 0 (got"
                f" {self.noise_multiplier!r})"
            )
        if not 0 < self.delta < 1:
            wrong.append(f"privacy.delta: give a number between 0 and 1 (got {self.delta!r})")
        if wrong:
            raise ConfigError(wrong)

    def parts(
        self, parts: Sequence[Part], jobs: Sequence[Job], version: int, cohort_size: int
    ) -> list[Part]:
        """Return one part: the common download, plus the noisy mean change.

        Weights are ignored: all clients count alike. A change that is not finite counts as zero.
        What the part says besides its tensors follows from `cohort_size` alone.

        Args:
            parts: The updates that came and were accepted, in any order; not modified.
            jobs: The jobs they come from, and possibly more.
            version: The server version that the cohort started from; names the noise.
            cohort_size: How many clients were meant to take part.

        Raises:
            ValueError: If no update came, a client sent two, more came than planned, or clients
                did not download and send the same tensors.
        """
        ordered = sorted(parts, key=lambda part: part.update.cid)
        _check_cohort(ordered, version, cohort_size)
        starts = downloads(ordered, jobs)
        _check_common([part.update.adapter for part in ordered], starts)
        first, start = ordered[0].update, starts[0]
        total: dict[str, Tensor] = {}
        for part in ordered:
            for name, clipped in self._clipped(part.update, start).items():
                total[name] = total[name] + clipped if name in total else clipped
        tensors = {}
        for name, summed in total.items():
            moved = (summed + self._noise(name, summed, version)) / cohort_size
            tensors[name] = (start[name].to(moved) + moved).to(start[name].dtype)
        update = Update(
            cid=first.cid,
            version=version,
            adapter=start.select(tensors.__contains__).overlaid(tensors),
            num_samples=cohort_size,
            num_steps=1,
            stage=first.stage,
        )
        return [Part(1.0, update)]

    def _clipped(self, update: Update, download: Adapter) -> dict[str, Tensor]:
        changes = change(update.adapter, download)
        size = norm(changes)
        if not math.isfinite(size):
            # infinity times zero is not zero
            return {name: torch.zeros_like(tensor) for name, tensor in changes.items()}
        factor = min(1.0, self.clip / size) if size else 1.0
        return {name: tensor * factor for name, tensor in changes.items()}

    def _noise(self, name: str, like: Tensor, version: int) -> Tensor:
        """Draw the noise on the sum; each tensor has a stream of its own."""
        drawn = rng(self.seed, "privacy", version, name).standard_normal(tuple(like.shape))
        scale = self.noise_multiplier * self.clip
        return torch.from_numpy(np.asarray(drawn * scale)).to(like.device)


def _check_cohort(parts: Sequence[Part], version: int, cohort_size: int) -> None:
    cids = [part.update.cid for part in parts]
    if not parts:
        raise ValueError("no update came, so there is no saying which tensors to add noise to")
    if len(set(cids)) < len(cids):
        raise ValueError(f"a client sent two updates ({cids}): its share would not be bounded")
    if len(parts) > cohort_size:
        raise ValueError(f"{len(parts)} updates came, {cohort_size} were planned")
    for part in parts:
        if part.update.version != version:
            raise ValueError(
                f"client {part.update.cid} started from version {part.update.version}, the cohort"
                f" from {version}: clients' privacy needs a common download"
            )


def _check_common(sent: Sequence[Adapter], starts: Sequence[Adapter]) -> None:
    """Check that all clients moved the same tensors from the same place."""
    for own, start in zip(sent, starts, strict=True):
        if set(own) != set(sent[0]):
            raise ValueError("clients sent different tensors: clients' privacy needs the same ones")
        for name, tensor in own.tensors.items():
            common = starts[0].tensors.get(name)
            if common is None or name not in start:
                raise ValueError(f"'{name}' was sent but not downloaded: its change is unknown")
            if not tensor.is_floating_point():
                raise ValueError(
                    f"'{name}' holds whole numbers, which Gaussian noise does not suit"
                )
            if tensor.shape != common.shape or start[name].shape != common.shape:
                raise ValueError(
                    f"'{name}' has not one shape for all: clients' privacy needs equal ranks"
                )
            if start[name] is not common and not torch.equal(start[name], common):
                raise ValueError(f"'{name}' was not the same in all downloads")


@dataclass(frozen=True)
class Epsilon:
    """What may be claimed for a run, or why nothing may."""

    value: float | None
    """Epsilon, infinite without noise; None if no number can be claimed."""
    delta: float
    reason: str
    """What the number holds for, or why there is none; one sentence."""
    adjacency: str = ADJACENCY


_NO_CLAIM = {
    "sequential": "clients take turns in a fixed order, so sampling hides nobody",
    "availability": "who takes part depends on who is there, so the chance of each is unknown",
    "data": "who takes part depends on the clients' data, which sampling then gives away",
}
"""Why a way of sampling allows no claim."""


def epsilon(
    rounds: int,
    population: int,
    cohort_size: int,
    noise_multiplier: float,
    delta: float,
    sampling: str,
) -> Epsilon:
    """Return the epsilon of a run at `delta`, an upper bound by Rényi differential privacy.

    A uniform cohort without replacement costs at most what the same noise costs if all take part
    (its outputs are mixtures, and the divergence is quasi-convex), so the smaller of both bounds
    counts: that of sampling (Wang et al., AISTATS 2019) is the looser one for large cohorts.

    Args:
        rounds: Server updates.
        population: Clients that a cohort is drawn from.
        cohort_size: Planned clients of a cohort; the whole population for full participation.
        noise_multiplier: As in `ClientPrivacy`.
        delta: As in `ClientPrivacy`.
        sampling: `uniform` (a fixed number, without replacement); no other way allows a claim.

    Raises:
        ConfigError: If a number is out of range.
        MissingExtraError: If dp-accounting is not installed.
    """
    _check_numbers(rounds, population, cohort_size, noise_multiplier, delta)
    plain = _plain(rounds, noise_multiplier, delta, sampling)
    if plain is not None:
        return plain
    accounting = _accounting()
    event = accounting.GaussianDpEvent(noise_multiplier / 2)
    value = _spent(accounting, event, rounds, delta)
    who = f"all {population} clients take part"
    if cohort_size < population:
        sampled = accounting.SampledWithoutReplacementDpEvent(population, cohort_size, event)
        value = min(value, _spent(accounting, sampled, rounds, delta))
        who = f"{cohort_size} of {population} clients are drawn uniformly, and kept secret"
    return Epsilon(value, delta, f"Holds if in each of {rounds} rounds {who}.")


def _plain(rounds: int, noise_multiplier: float, delta: float, sampling: str) -> Epsilon | None:
    """Return the answer where nothing need be computed."""
    if sampling != "uniform":
        why = _NO_CLAIM.get(sampling, f"nothing is known of the sampling '{sampling}'")
        return Epsilon(None, delta, f"No epsilon can be claimed: {why}; sample uniformly.")
    if rounds == 0:
        return Epsilon(0.0, delta, "Nothing has been learned from anybody.")
    if noise_multiplier == 0:
        return Epsilon(math.inf, delta, "There is no noise, hence no privacy.")
    return None


def _spent(accounting: ModuleType, event: object, rounds: int, delta: float) -> float:
    relation = accounting.NeighboringRelation.REPLACE_ONE
    accountant = accounting.rdp.RdpAccountant(neighboring_relation=relation)
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(delta))


def _accounting() -> ModuleType:
    try:
        importlib.import_module("dp_accounting.rdp")
        return importlib.import_module("dp_accounting")
    except ModuleNotFoundError as error:
        raise MissingExtraError("dp_accounting", "dp", "the epsilon of clients' privacy") from error


def _check_numbers(
    rounds: int, population: int, cohort_size: int, noise_multiplier: float, delta: float
) -> None:
    wrong = []
    if rounds < 0:
        wrong.append(f"rounds: give a number of at least 0 (got {rounds})")
    if not 1 <= cohort_size <= population:
        wrong.append(f"cohort_size: give a number from 1 to {population} (got {cohort_size})")
    if not 0 <= noise_multiplier < math.inf:
        wrong.append(f"noise_multiplier: give a number of at least 0 (got {noise_multiplier!r})")
    if not 0 < delta < 1:
        wrong.append(f"delta: give a number between 0 and 1 (got {delta!r})")
    if wrong:
        raise ConfigError(wrong)
