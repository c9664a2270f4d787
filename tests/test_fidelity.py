"""The aggregation error, against dense matrices, the tail of an SVD, and its price in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conformance.cases import CASES, Case
from conformance.setups import SETUPS, Setup, each_dtype
from conformance.world import CLIENTS, RANK, SHAPES, Federation, Round, effective, noise
from loop_worlds import loop_of
from torch.utils._python_dispatch import TorchDispatchMode

from fedllm.adapters import Adapter, BaseDelta, initial, name_a, name_b, wire
from fedllm.federation import BaseServer, Job, Part, Payload, Update
from fedllm.federation.fidelity import aggregation_error
from fedllm.system import RankRule

COHORTS = (CLIENTS, (0, 2), (1, 2, 3), (3,))


def error_of(fed: Federation, cohort: Sequence[int] = CLIENTS) -> tuple[float | None, Round]:
    """Do a round; return how far its aggregate is from the ideal, and what happened."""
    done = fed.train(cohort)
    fed.finish(done)
    parts = [Part(fed.server.weight(u), u) for u in done.updates]
    return aggregation_error(fed.server, parts, {job.cid: job for job in done.jobs}), done


def dense_error(fed: Federation, done: Round) -> float:
    """Return the distance of the global view from the ideal, from whole matrices."""
    view, ideal = fed.global_view(), done.ideal()
    return math.sqrt(sum(float((view[m] - ideal[m]).square().sum()) for m in SHAPES))


GLOBAL = [
    s
    for s in SETUPS
    if s.start().server.has_mean and not s.case.personal and not s.case.own_weights
]


@pytest.mark.parametrize("setup", GLOBAL, ids=str)
def test_the_error_is_the_distance_between_whole_matrices(setup: Setup) -> None:
    fed = setup.build()
    for cohort in COHORTS:
        found, done = error_of(fed, cohort)
        assert found == pytest.approx(dense_error(fed, done), rel=1e-6, abs=1e-9)


PERSONAL = [s for s in SETUPS if s.start().server.has_mean and s.case.personal]


@pytest.mark.parametrize("setup", PERSONAL, ids=str)
def test_a_personal_methods_error_is_the_mean_of_the_clients_own_distances(setup: Setup) -> None:
    # what a client has after the round is the download of the next, with its own tensors over it
    fed = setup.build()
    for cohort in COHORTS:
        found, done = error_of(fed, cohort)
        gaps = {m: torch.zeros(shape).double() for m, shape in SHAPES.items()}
        for job, update in zip(done.jobs, done.updates, strict=True):
            names = job.payload.adapter.tensors
            after = fed.server.download(job.cid).adapter.select(names.__contains__)
            own = {n: t for n, t in fed.store.get(job.cid).items() if n in after}
            trained = {n: t for n, t in {**update.adapter.tensors, **own}.items() if n in names}
            ends = effective(after.overlaid(own), BaseDelta())
            began = effective(job.payload.adapter.overlaid(trained), BaseDelta())
            for m in SHAPES:
                gaps[m] += done.shares[job.cid] * (ends[m] - began[m])
        wanted = math.sqrt(sum(float(gap.square().sum()) for gap in gaps.values()))
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@each_dtype
def test_fedits_error_is_the_product_of_deviations(dtype: torch.dtype) -> None:
    fed = Federation("fedit", dtype=dtype).run(2)
    found, done = error_of(fed)
    squares = 0.0
    for layer in SHAPES:
        a = {k: t[name_a(layer)].double() for k, t in done.trained.items()}
        b = {k: t[name_b(layer)].double() for k, t in done.trained.items()}
        mean_a = sum(p * a[k] for k, p in done.shares.items())
        mean_b = sum(p * b[k] for k, p in done.shares.items())
        gap = sum(p * (b[k] - mean_b) @ (a[k] - mean_a) for k, p in done.shares.items())
        squares += float((fed.server.adapter.scaling[layer] * gap).square().sum())
    assert squares > 1
    assert found == pytest.approx(squares**0.5, rel=1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case.exact], ids=str)
def test_in_single_precision_an_exact_method_shows_its_rounding(case: Case) -> None:
    fed = Federation(case.name, case.settings, dtype=torch.float32)
    for cohort in COHORTS:
        found, _ = error_of(fed, cohort)
        norm = math.sqrt(sum(float(fed.global_view()[m].square().sum()) for m in SHAPES))
        assert found is not None
        assert found <= 1e-5 * max(norm, 1.0)


def test_a_client_alone_is_its_own_mean() -> None:
    for name in ("fedit", "fedsa-lora", "flexlora", "flora", "feddpa-t"):
        found, _ = error_of(Federation(name).run(1), (2,))
        assert found == pytest.approx(0.0, abs=1e-10)


def test_flexloras_error_is_the_energy_behind_the_rank() -> None:
    fed = Federation("flexlora").run(1)
    found, done = error_of(fed)
    tail = 0.0
    for matrix in done.ideal().values():
        tail += float(torch.linalg.svdvals(matrix)[RANK:].square().sum())
    assert found == pytest.approx(math.sqrt(tail), rel=1e-9)
    assert found > 0.1


def test_a_server_with_momentum_moves_past_the_mean() -> None:
    # FFA-LoRA's aggregate is exact; with FedAvgM of the second round it is b (x_1 - x_0) further
    settings = {"optimizer": "fedavgm", "momentum": 0.5}
    fed = Federation("ffa-lora", settings)
    start = fed.global_view()
    first, _ = error_of(fed)
    middle = fed.global_view()
    second, _ = error_of(fed)
    moved = math.sqrt(sum(float((middle[m] - start[m]).square().sum()) for m in SHAPES))
    assert first == pytest.approx(0.0, abs=1e-10)
    assert second == pytest.approx(0.5 * moved, rel=1e-9)


def test_a_packed_base_shows_the_rounding_of_the_link() -> None:
    errors = []
    for codec in ("fp32", "bf16", "nf4"):
        fed = Federation("flora")
        fed.server.downlink = wire.make(codec)
        found, done = error_of(fed)
        assert found == pytest.approx(dense_error(fed, done), rel=1e-9, abs=1e-10)
        errors.append(found)
    exact, fine, coarse = errors
    assert exact < 1e-10 < fine < coarse / 10


def test_uniform_weights_have_the_plain_mean_as_their_ideal() -> None:
    fed = Federation("ffa-lora", {"weights": "uniform"})
    found, _ = error_of(fed)
    assert found == pytest.approx(0.0, abs=1e-10)


def test_the_loop_records_the_error_of_every_round() -> None:
    loop, fed = loop_of(Federation("fedit")), Federation("fedit")
    for made in loop.run(3):
        found, _ = error_of(fed)
        assert made.agg_error == pytest.approx(found, rel=1e-12)
    assert [made.agg_error for made in loop_of(Federation("fedlease")).run(2)] == [None, None]


class Largest(TorchDispatchMode):
    """Remembers the most numbers that any result has held."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.numel())
        return found


def wide_round(rank: int, clients: int) -> tuple[BaseServer, list[Part], dict[int, Job]]:
    """Return a round of FedIT on one layer of 300 by 200."""
    start = initial({"m": (300, 200)}, rank, 2.0, seed=1)
    server = BaseServer()
    server.start(start, RankRule((rank,)))
    jobs = {cid: Job(cid=cid, payload=Payload(0, start)) for cid in range(clients)}
    parts = []
    for cid in jobs:
        trained = {n: noise(tuple(t.shape), cid, n) for n, t in start.tensors.items()}
        update = Update(cid, 0, Adapter(trained, start.scaling), num_samples=1, num_steps=1)
        parts.append(Part(1.0, update))
    server.apply(parts)
    return server, parts, jobs


@pytest.mark.parametrize(("rank", "clients", "is_small"), [(4, 5, True), (64, 5, False)])
def test_no_whole_matrix_is_formed_where_the_factors_are_smaller(
    rank: int, clients: int, is_small: bool
) -> None:
    server, parts, jobs = wide_round(rank, clients)
    with Largest() as watching:
        found = aggregation_error(server, parts, jobs)
    assert found is not None
    assert found > 0
    assert (watching.most < 300 * 200) == is_small
    stacked = 300 * rank * (clients + 1)
    assert watching.most <= max(stacked, 300 * 200)


def test_of_shapes_alone_there_is_a_number_and_no_arithmetic() -> None:
    fed = Federation("fedsa-lora", device="meta")
    found, _ = error_of(fed)
    assert found is not None
    assert math.isfinite(found)
    assert fed.server.base == BaseDelta()


def test_nothing_sent_has_no_error() -> None:
    assert aggregation_error(Federation("fedit").server, [], {}) is None
