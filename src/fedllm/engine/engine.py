"""The engine: trains cohorts, scores test rows and generates answers on one resident model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedllm.adapters import Adapter, BaseDelta
from fedllm.config import TrainingConfig
from fedllm.engine.assembly import Sources, assembled
from fedllm.engine.buffers import Buffer, base_delta, head_tensors
from fedllm.engine.cohort import Cohort
from fedllm.engine.examples import Examples
from fedllm.engine.generate import Asked, generate
from fedllm.engine.lora import Active
from fedllm.engine.packing import split
from fedllm.engine.references import References
from fedllm.engine.resident import Resident
from fedllm.engine.scoring import lay_out, score
from fedllm.engine.shards import Shards, collect
from fedllm.federation import (
    BaseClient,
    FitRequest,
    FitResult,
    Job,
    Plan,
    Progress,
    Scores,
    View,
    objective_of,
    task_of,
)
from fedllm.seeding import rng

if TYPE_CHECKING:
    from fedllm.data import Partition, TokenSet

_ROW_BYTES_LIMIT = 2**30
"""Most bytes of parameters, gradients and moments of clients that train together."""
_VIEWS_AT_ONCE = 32


@dataclass
class CohortEngine:
    """Implements `federation.Engine` and `federation.Scorer` on one device.

    Cost of training: one forward and backward pass over the clients' useful tokens, no padding.
    Memory: the base once; for clients that train together 16 bytes a trainable parameter; one
    pass's activations.
    """

    resident: Resident
    tokens: TokenSet
    partition: Partition
    plan: Plan

    def __post_init__(self) -> None:
        objective = objective_of(self.plan.training, task_of(self.tokens))
        self._shards = Shards.of(self.tokens, self.partition, self.resident.kind, objective)
        self._references = References(self.resident, self._shards.examples)
        self._tested: dict[int, tuple[TokenSet, References]] = {}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that training on each row goes over, int (rows,): of a pair, both sides."""
        return self._shards.examples.lengths

    def fit(self, job: Job, start: Adapter, client: BaseClient, *, tag: str = "") -> FitRequest:
        """Ask for local training; see `federation.Engine.fit`."""
        return FitRequest(job, start, client, tag)

    def gradient(
        self, job: Job, start: Adapter, client: BaseClient, *, tag: str = ""
    ) -> FitRequest:
        """Ask for the gradient over the whole shard; see `federation.Engine.gradient`."""
        return FitRequest(job, start, client, tag, is_gradient=True)

    def train(
        self, requests: Sequence[FitRequest], progress: Progress | None = None
    ) -> list[FitResult]:
        """Serve fits together where they train the same tensors on the same base."""
        results: dict[int, FitResult] = {}
        for members in self._cohorts(requests):
            chosen = [requests[i] for i in members]
            if chosen[0].job.steps == 0 and not chosen[0].is_gradient:
                results.update({i: _untrained(requests[i]) for i in members})
                continue
            cohort = Cohort(self._references, chosen, self._shards, self.plan)
            found = cohort.gradients() if chosen[0].is_gradient else cohort.train(progress)
            results.update(zip(members, found, strict=True))
        return [results[i] for i in range(len(requests))]

    def score(self, views: Sequence[View], tokens: TokenSet) -> Scores:
        """Return the loss and correctness of each asked-for row under its view, in one sweep.

        Rows with a preference or a rating are compared with the original base as well.
        """
        return score(self._activated(views), self._test_references(tokens), self.plan.training)

    def _test_references(self, tokens: TokenSet) -> References:
        """Return what is known of test rows under the base, whatever is learned in training."""
        if id(tokens) not in self._tested:
            examples = Examples.of(tokens, objective_of(TrainingConfig(), task_of(tokens)))
            # the rows are held too, so that no other set can get their id
            self._tested[id(tokens)] = tokens, References(self.resident, examples)
        return self._tested[id(tokens)][1]

    def similarity(
        self,
        views: Sequence[View],
        cids: Sequence[int],
        tokens: TokenSet,
        *,
        references: int,
        seed: int,
    ) -> list[np.ndarray]:
        """Compare rows with the clients' own training rows; see `federation.Scorer.similarity`."""
        own = []
        for view, cid in zip(views, cids, strict=True):
            rows = self._shards.rows(cid)
            count = min(references, len(rows))
            chosen = rng(seed, "references", cid).choice(rows, count, replace=False)
            own.append(replace(view, rows=np.sort(chosen)))
        asked, known = self._hidden(views, tokens), self._hidden(own, self.tokens)
        return [
            (a @ k.T).mean(axis=1) if len(k) else np.zeros(len(a))
            for a, k in zip(asked, known, strict=True)
        ]

    def _hidden(self, views: Sequence[View], tokens: TokenSet) -> list[np.ndarray]:
        """Return unit vectors (rows, hidden): last hidden states of the views' prompts."""
        states: list[np.ndarray] = []
        padded, limit = not self.resident.is_packed, self.resident.tokens_per_pass * 2
        for asked in self._activated(views):
            lengths = np.maximum(tokens.prompt_lengths[asked.rows], 1)
            found: np.ndarray | None = None
            for part in split(lengths, asked.owners, limit, is_padded=padded):
                here = asked.at(part)
                sequences = collect(tokens, here.rows, here.owners, is_prompt=True)
                lay_out(self.resident, here, sequences.lengths)
                with torch.no_grad(), self.resident.using(here.active):
                    hidden = self.resident.forward.last_hidden(sequences).float()
                unit = torch.nn.functional.normalize(hidden, dim=1).cpu().numpy()
                if found is None:
                    found = np.zeros((len(asked.rows), unit.shape[1]), dtype=unit.dtype)
                found[part] = unit
            assert found is not None
            states += np.split(found, np.flatnonzero(np.diff(asked.owners)) + 1)
        return states

    def generate(
        self,
        views: Sequence[View],
        tokens: TokenSet,
        *,
        max_new_tokens: int,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> dict[int, str]:
        """Return the greedy answer to the prompt of each asked-for row, by row."""
        answers: dict[int, str] = {}
        for asked in self._activated(views):
            batches = generate(self.resident, asked, tokens, max_new_tokens, batch_size)
            for batch in batches:
                answers |= batch
                if progress is not None:
                    progress(len(answers))
        return answers

    def _activated(self, views: Sequence[View]) -> Iterator[Asked]:
        """Yield some views at a time: their adapters, their rows and the owner of each row."""
        alike: dict[object, list[View]] = {}
        for view in views:
            if len(view.rows):
                names = tuple(view.adapter), tuple(view.mix)
                alike.setdefault(names, []).append(view)
        for group in alike.values():
            for start in range(0, len(group), _VIEWS_AT_ONCE):
                chunk = group[start : start + _VIEWS_AT_ONCE]
                yield Asked(
                    active=self.activate([view.adapter for view in chunk], chunk[0].base),
                    rows=np.concatenate([view.rows for view in chunk]),
                    owners=np.repeat(np.arange(len(chunk)), [len(view.rows) for view in chunk]),
                    mix={s: np.concatenate([v.mix[s] for v in chunk]) for s in chunk[0].mix},
                )

    def activate(self, adapters: Sequence[Adapter], base: BaseDelta) -> Active:
        """Return the adapters, one a row, ready to be applied without training."""
        device, dtype = self.resident.device, self.resident.dtype
        buffer = Buffer(adapters, lambda name: True, device)
        layers = assembled(
            Sources(adapters, [(buffer, buffer.data.to(dtype))]), self.resident.shapes
        )
        return Active(
            modules=layers.low_ranks,
            sparse=layers.sparse,
            delta=base_delta(base, dtype, device),
            is_wide=self.resident.is_wide and len(adapters) > 1,
            heads=head_tensors(self.resident.heads, [(buffer, buffer.data)]),
        )

    def _cohorts(self, requests: Sequence[FitRequest]) -> list[list[int]]:
        """Divide requests into cohorts that may share passes and fit into memory."""
        alike: dict[object, list[int]] = {}
        for i, request in enumerate(requests):
            names = tuple(n for n in request.start if request.client.trainable(n, request.job))
            key = (
                names,
                tuple(request.start),
                request.job.payload.base.sizes,
                request.job.steps > 0,
                request.is_gradient,
                None if request.start.routing is None else request.start.routing.top,
            )
            alike.setdefault(key, []).append(i)
        groups = []
        for members in alike.values():
            size = self._clients_at_once([requests[i] for i in members])
            groups += [members[i : i + size] for i in range(0, len(members), size)]
        return groups

    def _clients_at_once(self, requests: Sequence[FitRequest]) -> int:
        """Return how many clients fill a pass, within the memory limit."""
        rows = np.concatenate([self._shards.rows(r.job.cid) for r in requests])
        mean_tokens = float(self._shards.examples.lengths[rows].mean()) if len(rows) else 1.0
        per_step = mean_tokens * self.plan.rows_per_step
        trained = max(sum(t.numel() for t in r.start.tensors.values()) for r in requests)
        return clients_at_once(self.resident.tokens_per_pass, per_step, trained)


def clients_at_once(tokens_per_pass: int, step_tokens: float, trained: int) -> int:
    """Return how many clients train together: as fill a pass, within 1 GiB of their own.

    Args:
        tokens_per_pass: Tokens that a pass holds.
        step_tokens: Mean tokens of a client's step.
        trained: Adapter parameters of a client.
    """
    fitting = _ROW_BYTES_LIMIT // max(16 * trained, 1)
    return int(max(1, min(round(tokens_per_pass / max(step_tokens, 1.0)), fitting)))


def _untrained(request: FitRequest) -> FitResult:
    return FitResult(request.start, 0, {"tokens": 0.0})
