"""A federation of four clients in exact arithmetic: a fake engine and a plain loop over rounds.

Modules are not square (a transposition hides on square ones), clients have unequal shards, the
scaling is not 1, and everything is float64 unless a test says otherwise.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm.adapters import (
    Adapter,
    BaseDelta,
    initial,
    layer_of,
    name_a,
    name_b,
    name_core,
    name_gain,
    name_index,
    name_router,
    name_values,
)
from fedllm.algorithms import make
from fedllm.federation import (
    BaseClient,
    ClientId,
    FitRequest,
    FitResult,
    HeadPolicy,
    Job,
    MemoryStore,
    Part,
    Payload,
    Progress,
    Update,
)
from fedllm.seeding import derive, rng
from fedllm.system import RankRule

SHAPES = {
    "layers.0.q_proj": (20, 14),
    "layers.0.v_proj": (14, 20),
    "h.0.c_attn": (18, 30),  # a Conv1D in the model: (out, in) all the same in an adapter
}
HEAD = "score.weight"
HEAD_SHAPE = (3, 14)
NUM_SAMPLES = {0: 40, 1: 30, 2: 20, 3: 10}
CLIENTS = tuple(NUM_SAMPLES)
SCALING = 2.5
RANK = 4
MIXED_RANKS = (2, 4, 8, 16)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def noise(shape: Sequence[int], *names: str | int) -> Tensor:
    """Return float64 standard normal numbers that follow from the names."""
    return torch.from_numpy(rng(0, *names).standard_normal(tuple(shape)))


def mixed_ranks() -> RankRule:
    """Return a rule under which the four clients have the four ranks 2, 4, 8 and 16."""
    rules = (RankRule(MIXED_RANKS, seed) for seed in itertools.count())
    return next(r for r in rules if {r.of(cid) for cid in CLIENTS} == set(MIXED_RANKS))


def start_adapter(rank: int, dtype: torch.dtype) -> Adapter:
    """Return the common start, with a head that is not zero."""
    adapter = initial(SHAPES, rank, SCALING, seed=7, heads={HEAD: noise(HEAD_SHAPE, "head")})
    return replace(adapter, tensors={n: t.to(dtype) for n, t in adapter.tensors.items()})


def path_product(adapter: Adapter, path: str) -> Tensor:
    """Return gain * scaling * B @ core @ A of a path, written out."""
    b = adapter[name_b(path)]
    if name_core(path) in adapter:
        b = b @ adapter[name_core(path)]
    if name_gain(path) in adapter:
        b = b * adapter[name_gain(path)]
    return adapter.scaling[path] * (b @ adapter[name_a(path)])


def effective(adapter: Adapter, base: BaseDelta) -> dict[str, Tensor]:
    """Return W_eff - W of every layer as a dense matrix, and the heads as they are.

    The paths of a layer add up, unless a router weighs them: then each stands for itself.
    """
    dtype = next(iter(adapter.tensors.values())).dtype
    total = {name: adapter[name] for name in adapter.heads}
    total |= {layer: torch.zeros(SHAPES[layer], dtype=dtype) for layer in SHAPES}
    for path in adapter.modules:
        layer = layer_of(path)
        if name_router(layer) in adapter:
            total[path] = path_product(adapter, path)
            total[name_router(layer)] = adapter[name_router(layer)]
        else:
            total[layer] = total[layer] + path_product(adapter, path)
    routed = {layer for layer in SHAPES if name_router(layer) in adapter}
    total = {n: t for n, t in total.items() if n not in routed or n in adapter.modules}
    for layer, shape in SHAPES.items():
        if name_values(layer) in adapter:
            flat = torch.zeros(shape[0] * shape[1], dtype=dtype)
            flat[adapter[name_index(layer)].long()] = adapter[name_values(layer)]
            total[layer] = total[layer] + flat.view(shape)
    for module, product in base.products.items():
        total[module] = total[module] + product.b @ product.a
    for module, matrix in base.dense.items():
        total[module] = total[module] + matrix
    return total


def assert_same(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-9
) -> None:
    """Compare tensor by tensor in the Frobenius norm, relative where the norm exceeds 1."""
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        error = float(torch.linalg.norm(got[name] - tensor))
        scale = max(1.0, float(torch.linalg.norm(tensor)))
        assert error <= tolerance * scale, f"{name}: error {error:.3g}, norm {scale:.3g}"


@dataclass
class FakeEngine:
    """Gradient descent on a loss that is known in closed form, on the trainable tensors only.

    `perturb`: every tensor x gets the gradient n + x / 10, with n drawn from (job seed, client,
    name, step), so that every trainable tensor moves whatever the others are.
    `quadratic`: || W_eff - target_cid ||^2 / 2 for each module, the true gradient through B A.
    """

    mode: Literal["perturb", "quadratic"] = "perturb"
    trained: dict[ClientId, Adapter] = field(default_factory=dict)
    """What each client held when training ended, all passes of a round laid over each other."""
    fits: list[tuple[FitRequest, FitResult]] = field(default_factory=list)
    """What was asked for in this round, and what came of it."""

    def fit(self, job: Job, start: Adapter, client: BaseClient, *, tag: str = "") -> FitRequest:
        return FitRequest(job, start, client, tag)

    def gradient(
        self, job: Job, start: Adapter, client: BaseClient, *, tag: str = ""
    ) -> FitRequest:
        return FitRequest(job, start, client, tag, is_gradient=True)

    def train(
        self, requests: Sequence[FitRequest], progress: Progress | None = None
    ) -> list[FitResult]:
        return [self._gradient(r) if r.is_gradient else self._one(r) for r in requests]

    def _gradient(self, request: FitRequest) -> FitResult:
        job, start, client = request.job, request.start, request.client
        live = {
            n: start[n].detach().clone().requires_grad_() for n in start if client.trainable(n, job)
        }
        slopes = torch.autograd.grad(
            self._loss(request, live, 0),
            list(live.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        return FitResult(start.overlaid(dict(zip(live, slopes, strict=True))), 0, {})

    def _one(self, request: FitRequest) -> FitResult:
        job, start, client = request.job, request.start, request.client
        live = {n: start[n] for n in start if client.trainable(n, job)}
        for step in range(job.steps):
            live = {n: t.detach().clone().requires_grad_() for n, t in live.items()}
            loss = self._loss(request, live, step)
            penalty = client.penalty(live, job)
            loss = loss if penalty is None else loss + penalty
            slopes = torch.autograd.grad(
                loss, list(live.values()), allow_unused=True, materialize_grads=True
            )
            grads: Mapping[str, Tensor] = dict(zip(live, slopes, strict=True))
            corrected = client.correct(grads, job)
            grads = grads if corrected is None else corrected
            live = {n: t.detach() - job.learning_rate * grads[n] for n, t in live.items()}
        trained = start.overlaid(live)
        self._hold(job, trained)
        metrics = {
            "loss": 1.0,
            "tokens": float(job.num_samples),
            "rate_sum": job.learning_rate * job.steps,
        }
        result = FitResult(trained, job.steps, metrics)
        self.fits.append((request, result))
        return result

    def _hold(self, job: Job, trained: Adapter) -> None:
        """Record what is held; the weights that a pass gave its paths are not part of that."""
        own = {p: s for p, s in job.payload.adapter.scaling.items() if p in trained.scaling}
        held = replace(trained, scaling={**trained.scaling, **own})
        self.trained[job.cid] = self.trained.get(job.cid, held).joined(held)

    def _loss(self, request: FitRequest, live: Mapping[str, Tensor], step: int) -> Tensor:
        job = request.job
        if self.mode == "quadratic":
            now = effective(request.start.overlaid(live), job.payload.base)
            gaps = [now[n] - noise(now[n].shape, "target", job.cid, n).to(now[n]) for n in now]
            return torch.stack([0.5 * gap.square().sum() for gap in gaps]).sum()
        terms = [
            (noise(t.shape, "fit", job.seed, job.cid, request.tag, n, step).to(t) * t).sum()
            + 0.05 * t.square().sum()
            for n, t in live.items()
        ]
        return torch.stack(terms).sum()


def run_jobs(jobs: Sequence[Job], client: BaseClient, engine: FakeEngine) -> list[Update]:
    """Drive the coroutines of all jobs together, as an executor does."""
    running: dict[int, Coroutine[Any, Any, Update]] = {
        i: client.run(job, engine) for i, job in enumerate(jobs)
    }
    answers: dict[int, FitResult | None] = dict.fromkeys(running)
    done: dict[int, Update] = {}
    while running:
        asked: dict[int, FitRequest] = {}
        for i, coroutine in list(running.items()):
            try:
                asked[i] = coroutine.send(answers[i])
            except StopIteration as stop:
                done[i] = stop.value
                del running[i]
        answers = dict(zip(asked, engine.train(list(asked.values())), strict=True))
    return [done[i] for i in range(len(jobs))]


@dataclass(frozen=True)
class Round:
    """One round as it happened."""

    before: Payload
    """The global view when the cohort was sent out."""
    jobs: list[Job]
    updates: list[Update]
    trained: dict[ClientId, Adapter]
    """What each client held when its training ended, what it does not send included."""
    fits: list[tuple[FitRequest, FitResult]] = field(default_factory=list)
    """What clients asked the engine for, and what came of it."""

    def ends(self, cid: ClientId) -> list[Adapter]:
        """Return what each of a client's passes ended with."""
        return [result.adapter for request, result in self.fits if request.job.cid == cid]

    @property
    def shares(self) -> dict[ClientId, float]:
        """The weight p_k of each client, from the sizes of the shards."""
        total = sum(job.num_samples for job in self.jobs)
        return {job.cid: job.num_samples / total for job in self.jobs}

    def client_products(self) -> dict[ClientId, dict[str, Tensor]]:
        """Return what each client's adapter adds to every layer, as dense matrices."""
        return {
            cid: {m: effective(adapter, BaseDelta())[m] for m in SHAPES}
            for cid, adapter in self.trained.items()
        }

    def ideal(self) -> dict[str, Tensor]:
        """Return the base the clients trained against plus sum_k p_k s_k B_k A_k."""
        base = {m: torch.zeros(SHAPES[m], dtype=self.dtype) for m in SHAPES}
        for module, product in self.before.base.as_products().items():
            base[module] = base[module] + product.dense()
        products = self.client_products()
        return {
            m: base[m] + sum(p * products[cid][m] for cid, p in self.shares.items()) for m in SHAPES
        }

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.before.adapter.tensors.values())).dtype


@dataclass
class Federation:
    """An algorithm with four clients, and the plain loop that every executor must equal."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    head: HeadPolicy = "shared"
    ranks: RankRule = field(default_factory=lambda: RankRule((RANK,)))
    dtype: torch.dtype = torch.float64
    engine: FakeEngine = field(default_factory=FakeEngine)
    seed: int = 11
    steps: int = 2
    learning_rate: float = 0.3
    total_rounds: int = 6
    """What the server is told of the run's length."""
    device: str = "cpu"
    rounds: list[Round] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server, self.client = make(self.name, self.settings, self.head)
        self.store = MemoryStore()
        start = start_adapter(self.ranks.largest, self.dtype)
        self.server.start(
            replace(start, tensors={n: t.to(self.device) for n, t in start.tensors.items()}),
            self.ranks,
            self.head,
            num_clients=len(CLIENTS),
            rounds=self.total_rounds,
            seed=self.seed,
            weight_of=lambda layer: noise(SHAPES[layer], "weight", layer).to(
                self.device, self.dtype
            ),
        )

    def _weight(self, layer: str) -> Tensor:
        return noise(SHAPES[layer], "weight", layer).to(self.device, self.dtype)

    def jobs(self, cohort: Sequence[ClientId]) -> list[Job]:
        """Return the jobs of a cohort, complete, and record the contact."""
        version = self.server.version
        jobs = [
            replace(
                job,
                seed=derive(self.seed, "job", job.cid, version),
                steps=self.steps,
                learning_rate=self.learning_rate,
                num_samples=NUM_SAMPLES[job.cid],
                state=self.store.get(job.cid),
            )
            for job in self.server.local_run(cohort)
        ]
        self.server.contacts |= dict.fromkeys((job.cid for job in jobs), version)
        return jobs

    def sampled(self, count: int) -> Sequence[ClientId]:
        """Return the cohort of this round."""
        return self.server.sample(CLIENTS, count, rng(self.seed, "cohort", self.server.version))

    def train(self, cohort: Sequence[ClientId]) -> Round:
        """Run a cohort's jobs, and change nothing but the record of contacts."""
        before = self.server.view()
        jobs = self.jobs(cohort)
        self.engine.trained, self.engine.fits = {}, []
        updates = run_jobs(jobs, self.client, self.engine)
        trained = {cid: self.engine.trained[cid] for cid in cohort}
        return Round(before, jobs, updates, trained, self.engine.fits)

    def finish(self, done: Round) -> Round:
        """Keep the private states and aggregate."""
        for update in done.updates:
            self.store.put(update.cid, update.state)
        self.server.apply([Part(self.server.weight(u), u) for u in done.updates])
        self.rounds.append(done)
        return done

    def round(self, cohort: Sequence[ClientId] = CLIENTS) -> Round:
        """Do one whole round."""
        return self.finish(self.train(cohort))

    def run(self, rounds: int = 3, cohort_size: int = len(CLIENTS)) -> Federation:
        """Do several rounds with sampled cohorts."""
        for _ in range(rounds):
            self.round(self.sampled(cohort_size))
        return self

    def global_view(self) -> dict[str, Tensor]:
        """Return the effective weights of the global view."""
        view = self.server.view()
        return effective(view.adapter, view.base)

    def client_view(self, cid: ClientId) -> dict[str, Tensor]:
        """Return the effective weights that are evaluated for a client."""
        view = self.server.view(cid, self.store.get(cid))
        return effective(view.adapter, view.base)

    def views(self) -> dict[str, Tensor]:
        """Return the global view and every client's, under one name each."""
        views = {f"global {n}": t for n, t in self.global_view().items()}
        for cid in CLIENTS:
            views |= {f"client {cid} {n}": t for n, t in self.client_view(cid).items()}
        return views

    def fork(self) -> Federation:
        """Return a federation that goes on from here on its own."""
        return copy.deepcopy(self)
