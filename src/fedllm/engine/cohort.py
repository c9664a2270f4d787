"""Local training of many clients at once, in common passes over one resident model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedllm.adapters import is_head
from fedllm.engine.assembly import Sources, assembled
from fedllm.engine.buffers import Buffer, base_delta, head_tensors
from fedllm.engine.lora import Active
from fedllm.engine.losses import losses_of
from fedllm.engine.optimizer import FlatOptimizer, clip_rows
from fedllm.engine.packing import Sequences, segments, split
from fedllm.engine.references import References, answer_logps
from fedllm.engine.shards import Shards, collect
from fedllm.federation import BaseClient, FitRequest, FitResult, Plan, Progress
from fedllm.seeding import derive, rng


class Cohort:
    """Clients that train together: same trainable tensors, same base, any ranks and lengths.

    Memory besides the base: 4 buffers (parameters, gradients, two moments) of fp32 K x P, and the
    activations of `tokens_per_pass` tokens. Results do not depend on who trains together.

    Args:
        references: The base's log-probabilities of the clients' answers, and the model.
        requests: What to train.
        shards: The clients' data.
        plan: Batches and learning rates.
    """

    def __init__(
        self, references: References, requests: Sequence[FitRequest], shards: Shards, plan: Plan
    ) -> None:
        # rows that still have steps to do must come first: the optimiser works on a prefix
        self.order = sorted(range(len(requests)), key=lambda i: -requests[i].job.steps)
        self.requests = [requests[i] for i in self.order]
        resident = references.resident
        self.resident, self.shards, self.plan = resident, shards, plan
        self.objective = losses_of(references, plan.training)
        if references.examples.objective != "sft":
            for request in requests:
                references.learn(shards.rows(request.job.cid))
        adapters = [request.start for request in self.requests]
        first = self.requests[0]
        device = resident.device
        self.trained = Buffer(adapters, lambda n: first.client.trainable(n, first.job), device)
        self.frozen = Buffer(adapters, lambda n: n not in self.trained, device)
        self.grads = torch.zeros_like(self.trained.data)
        self.live = self._cast(self.trained)
        self.optimizer = FlatOptimizer(self.trained.data, plan.training)
        buffers = [(self.trained, self.live), (self.frozen, self._cast(self.frozen))]
        layers = assembled(Sources(adapters, buffers, (self.trained, self.grads)), resident.shapes)
        self.composites = layers.composites
        self.active = Active(
            modules=layers.low_ranks,
            sparse=layers.sparse,
            delta=base_delta(first.job.payload.base, resident.dtype, device),
            dropout=resident.dropout,
            is_wide=resident.is_wide and len(requests) > 1,
            anchor=torch.zeros((), device=device, requires_grad=True),
        )
        self.losses = torch.zeros(first.job.steps, len(requests), device=device)
        self.tokens = np.zeros(len(requests), dtype=np.int64)

    def train(self, progress: Progress | None = None) -> list[FitResult]:
        """Do all steps; return results in the order of the requests.

        A client whose loss or tensors stop being finite is returned as it is, for the server to
        reject; nobody else's result depends on it.
        """
        batches = [self._batches(request) for request in self.requests]
        for step in range(self.requests[0].job.steps):
            rows = [
                next(b) for b, r in zip(batches, self.requests, strict=True) if self._on(r, step)
            ]
            self._step(step, rows)
            if progress is not None:
                for request in self.requests[: len(rows)]:
                    progress(request.job.cid, step + 1, request.job.steps)
        return self._in_order([self._result(row) for row in range(len(self.requests))])

    def gradients(self) -> list[FitResult]:
        """Return each client's gradient of the mean loss over its whole shard, without dropout."""
        self.active.dropout = 0.0
        self.losses = self.losses.new_zeros(1, len(self.requests))
        self._accumulate(0, [self.shards.rows(r.job.cid) for r in self.requests])
        return self._in_order([self._result(row, self.grads) for row in range(len(self.requests))])

    def _in_order(self, results: Sequence[FitResult]) -> list[FitResult]:
        return [results[self.order.index(i)] for i in range(len(results))]

    def _on(self, request: FitRequest, step: int) -> bool:
        return step < request.job.steps

    def _cast(self, buffer: Buffer) -> Tensor:
        if self.resident.dtype == torch.float32:
            return buffer.data
        return buffer.data.to(self.resident.dtype)

    def _batches(self, request: FitRequest) -> Iterator[np.ndarray]:
        """Yield the rows of each step: epoch after epoch, each in an order of its own."""
        job = request.job
        own, size, epoch = self.shards.rows(job.cid), self.plan.rows_per_step, 0
        while True:
            order = rng(job.seed, "order", request.tag, epoch).permutation(own)
            for start in range(0, len(order), size):
                yield order[start : start + size]
            epoch += 1

    def _step(self, step: int, batches: Sequence[np.ndarray]) -> None:
        """Accumulate the gradients of all passes of a step, then move the parameters."""
        count = len(batches)
        self._accumulate(step, batches)
        self._shape_gradients(count)
        clip_rows(self.grads[:count], self.plan.training.max_grad_norm)
        rates = [self._rate(r, step) for r in self.requests[:count]]
        self.optimizer.step(
            self.grads[:count], torch.tensor(rates, device=self.grads.device)[:, None]
        )

    def _rate(self, request: FitRequest, step: int) -> float:
        job = request.job
        return job.learning_rate * self.plan.step_factor(step, job.planned_steps or job.steps)

    def _accumulate(self, step: int, batches: Sequence[np.ndarray]) -> None:
        """Add up the gradients of all passes over these rows of each client."""
        count = len(batches)
        self.grads[:count].zero_()
        if self.live is not self.trained.data:
            self.live.copy_(self.trained.data)
        for composite in self.composites:
            composite.assemble()
        heads = self._head_leaves()
        rows = np.concatenate(batches)
        owners = np.repeat(np.arange(count), [len(b) for b in batches])
        place = np.concatenate([np.arange(len(b)) for b in batches])
        self.objective.prepare(rows, owners, self._logps)
        weights = self._weights(rows, owners, count)
        examples, is_padded = self.shards.examples, not self.resident.is_packed
        sizes = examples.pass_sizes(rows, is_padded=is_padded)
        for part in split(sizes, owners, self.resident.tokens_per_pass, is_padded=is_padded):
            self._pass(step, rows[part], owners[part], place[part], weights)
        for name, leaf in heads.items():
            if leaf.grad is not None:
                self.trained.layout.view(self.grads, name).add_(leaf.grad)
        for composite in self.composites:
            composite.disassemble()
        np.add.at(self.tokens, owners, examples.lengths[rows])

    def _weights(self, rows: np.ndarray, owners: np.ndarray, count: int) -> Tensor:
        """Return 1 / (entries in the loss) of each client's step, fp32 (K,)."""
        entries = np.bincount(owners, self.shards.entries[rows], count)
        weights = np.divide(1.0, entries, out=np.zeros(count), where=entries > 0)
        return torch.tensor(weights, dtype=torch.float32, device=self.grads.device)

    def _pass(
        self, step: int, rows: np.ndarray, owners: np.ndarray, place: np.ndarray, weights: Tensor
    ) -> None:
        """Run one pass forward and backward."""
        laid = self.shards.examples.lay(rows, owners)
        sequences = collect(self.shards.examples.tokens, laid.chosen, laid.owners)
        self._lay_out(sequences)
        if self.active.dropout:
            lengths = sequences.lengths.tolist()
            self.active.sequence_lengths = lengths if self.resident.is_packed else ()
            # the worse answers of pairs are numbered from -1 down
            numbers = np.where(laid.sides == 0, place[laid.examples], -1 - place[laid.examples])
            self.active.sequence_seeds = [
                derive(self.requests[o].job.seed, "dropout", self.requests[o].tag, step, int(p))
                for o, p in zip(laid.owners, numbers, strict=True)
            ]
        with self.resident.using(self.active):
            out = self.resident.forward.run(sequences)
            if not len(out.losses):
                return
            losses, clients = self.objective.of(out, laid, rows, owners)
            share = losses * weights[clients]
            self.losses[step].index_add_(0, clients, share.detach())
            share.sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch

    def _lay_out(self, sequences: Sequences) -> None:
        """Tell the layers whose rows a pass holds."""
        owners, lengths = sequences.rows, sequences.lengths
        self.active.by_sequence = segments(owners, np.ones_like(lengths))
        self.active.by_token = segments(owners, lengths) if self.resident.is_packed else ()

    def _logps(self, sequences: Sequences, part: np.ndarray) -> Tensor:
        """Return each answer's log-probability under its client's model, without dropout."""
        self._lay_out(sequences)
        dropout, self.active.dropout = self.active.dropout, 0.0
        with torch.no_grad(), self.resident.using(self.active):
            out = self.resident.forward.run(sequences)
        self.active.dropout = dropout
        return answer_logps(out, len(sequences.lengths))

    def _head_leaves(self) -> dict[str, Tensor]:
        """Make this step's heads: trained ones are leaves over the buffer's own memory."""
        leaves = {
            name: self.trained.layout.view(self.trained.data, name).detach().requires_grad_()
            for name in self.trained.layout.offsets
            if is_head(name)
        }
        heads = self.resident.heads
        own = head_tensors(heads, [(self.frozen, self.frozen.data)])
        for name, leaf in leaves.items():
            head = next(h for h in heads if name.startswith(h + "."))
            own.setdefault(head, {})[name.removeprefix(head + ".")] = leaf
        self.active.heads = own
        return leaves

    def _shape_gradients(self, count: int) -> None:
        """Add the penalties' gradients and let clients correct the sum."""
        for row, request in enumerate(self.requests[:count]):
            kind = type(request.client)
            if kind.penalty is not BaseClient.penalty:
                live = {
                    n: self._own(self.trained.data, n, row).detach().requires_grad_()
                    for n in self.trained.layout.offsets
                }
                penalty = request.client.penalty(live, request.job)
                if penalty is not None:
                    found = torch.autograd.grad(penalty, list(live.values()), allow_unused=True)
                    for name, grad in zip(live, found, strict=True):
                        if grad is not None:
                            self._own(self.grads, name, row).add_(grad)
            if kind.correct is not BaseClient.correct:
                grads = {n: self._own(self.grads, n, row) for n in self.trained.layout.offsets}
                changed = request.client.correct(grads, request.job)
                for name, grad in (changed or {}).items():
                    grads[name].copy_(grad)

    def _own(self, buffer: Tensor, name: str, row: int) -> Tensor:
        """View a client's own tensor, without padding."""
        return self.trained.place(buffer, name, row, self.requests[row].start[name].shape)

    def _result(self, row: int, source: Tensor | None = None) -> FitResult:
        request = self.requests[row]
        data = self.trained.data if source is None else source
        tensors = {
            name: self._own(data, name, row).to("cpu", copy=True)
            for name in self.trained.layout.offsets
        }
        steps = request.job.steps
        losses = self.losses[:steps, row]
        metrics = {
            "loss": float(losses.mean()) if len(losses) else float("nan"),
            "tokens": float(self.tokens[row]),
            "rate_sum": sum(self._rate(request, step) for step in range(steps)),
        }
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            metrics["diverged_at"] = float(bad[0] + 1)
        adapter = replace(request.start, tensors={**request.start.tensors, **tensors})
        return FitResult(adapter, steps, metrics)
