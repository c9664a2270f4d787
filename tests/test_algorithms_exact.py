"""What the specification says of the methods that lose nothing: FFA-LoRA, FLoRA, RoLoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conformance.sanitiser import digest
from conformance.world import (
    CLIENTS,
    HEAD,
    RANK,
    SHAPES,
    FakeEngine,
    Federation,
    assert_same,
    effective,
    mixed_ranks,
    noise,
    run_jobs,
    start_adapter,
)
from torch import Tensor

from fedllm.adapters import Adapter, is_a, is_b, is_head, name_a, name_b
from fedllm.algorithms import make
from fedllm.federation import Job, Payload
from fedllm.system import RankRule


def matrix_rank(matrix: Tensor) -> int:
    """Return the number of singular values above rounding."""
    return int(np.linalg.matrix_rank(matrix.numpy(), tol=1e-9))


def projector(rows: Tensor) -> Tensor:
    """Return the orthogonal projector onto the row space."""
    inverse: Tensor = torch.linalg.pinv(rows)
    return inverse @ rows


def digests(adapter: Adapter, modules: Any = SHAPES) -> dict[str, str]:
    """Hash A of every module."""
    return {m: digest(adapter[name_a(m)]) for m in modules}


# FFA-LoRA


@pytest.mark.parametrize("ranks", [RankRule((RANK,)), mixed_ranks()], ids=["equal", "mixed"])
def test_ffa_lora_never_moves_a(ranks: RankRule) -> None:
    fed = Federation("ffa-lora", ranks=ranks)
    common = start_adapter(ranks.largest, torch.float64)
    for _ in range(3):
        done = fed.round()
        assert digests(fed.server.adapter) == digests(common)
        for cid, trained in done.trained.items():
            for module in SHAPES:
                leading = common[name_a(module)][: ranks.of(cid)]
                assert torch.equal(trained[name_a(module)], leading)


def test_ffa_lora_sends_no_a() -> None:
    for update in Federation("ffa-lora").round().updates:
        assert set(update.adapter) == {*(name_b(m) for m in SHAPES), HEAD}


def test_ffa_lora_stays_within_the_rows_of_the_first_a() -> None:
    fed = Federation("ffa-lora")
    total = {m: torch.zeros(SHAPES[m], dtype=torch.float64) for m in SHAPES}
    for _ in range(3):
        for products in fed.round().client_products().values():
            total = {m: total[m] + products[m] for m in SHAPES}
    for module, matrix in total.items():
        rows = projector(fed.server.adapter[name_a(module)])
        assert 0 < matrix_rank(matrix) <= RANK
        assert_same({module: matrix @ rows}, {module: matrix})


def test_ffa_lora_averages_a_column_over_the_clients_that_own_it() -> None:
    fed = Federation("ffa-lora", ranks=mixed_ranks())
    done = fed.round()
    for module in SHAPES:
        for column in range(fed.ranks.largest):
            owners = [cid for cid in CLIENTS if fed.ranks.of(cid) > column]
            total = sum(done.shares[cid] for cid in owners)
            wanted = sum(
                done.shares[cid] / total * done.trained[cid][name_b(module)][:, column]
                for cid in owners
            )
            got = fed.server.adapter[name_b(module)][:, column]
            assert_same({module: got}, {module: torch.as_tensor(wanted)})


@pytest.mark.parametrize("c", [0.5, 3.0])
def test_ffa_lora_under_sgd_depends_on_scaling_and_rate_only_through_their_product(
    c: float,
) -> None:
    _, client = make("ffa-lora", {}, "frozen")
    start = start_adapter(RANK, torch.float64)
    start = start.overlaid({name_b(m): noise((SHAPES[m][0], RANK), "b", m) for m in SHAPES})
    other = Adapter(
        {n: t / c if is_b(n) else t for n, t in start.tensors.items()},
        {m: s * c for m, s in start.scaling.items()},
    )
    engine = FakeEngine("quadratic")
    for steps in range(5):
        views = []
        for adapter, rate in ((start, 1e-2), (other, 1e-2 / c**2)):
            job = Job(1, Payload(0, adapter), steps=steps, learning_rate=rate)
            run_jobs([job], client, engine)
            views.append(effective(engine.trained[1], job.payload.base))
        assert_same(views[1], views[0])
        still = effective(start, job.payload.base)
        moved = max(float((views[0][m] - still[m]).norm()) for m in SHAPES)
        assert (moved > 1e-3) == (steps > 0)


# FLoRA


@pytest.mark.parametrize("ranks", [RankRule((RANK,)), mixed_ranks()], ids=["equal", "mixed"])
def test_flora_adds_the_stack_to_the_base(ranks: RankRule) -> None:
    fed = Federation("flora", ranks=ranks)
    for _ in range(3):
        before = fed.global_view()
        done = fed.round(fed.sampled(3))
        after, products = fed.global_view(), done.client_products()
        budget = sum(ranks.of(cid) for cid in products)
        for module in SHAPES:
            step = after[module] - before[module]
            wanted = sum(p * products[cid][module] for cid, p in done.shares.items())
            assert_same({module: step}, {module: torch.as_tensor(wanted)})
            assert 0 < matrix_rank(step) <= budget


def test_flora_clients_start_with_the_base_alone() -> None:
    fed = Federation("flora").run(rounds=2)
    assert not any(fed.server.adapter[name_b(m)].any() for m in SHAPES)
    for job in fed.jobs(CLIENTS):
        start = fed.client.start(job)
        assert not any(start[name_b(m)].any() for m in SHAPES)
        assert_same(effective(start, job.payload.base), fed.global_view())


def test_flora_draws_a_new_a_for_every_client_and_round() -> None:
    fed = Federation("flora")
    seen: list[dict[str, str]] = [digests(fed.server.adapter)]
    for _ in range(3):
        done = fed.round()
        starts = [fed.client.start(job) for job in done.jobs]
        seen += [digests(start) for start in starts]
        for module, (_, columns) in SHAPES.items():
            assert all(float(s[name_a(module)].abs().max()) <= columns**-0.5 for s in starts)
    for module in SHAPES:
        assert len({found[module] for found in seen}) == 1 + 3 * len(CLIENTS)


# RoLoRA


def halves(fed: Federation, rounds: int) -> Iterator[str]:
    """Yield the half that each round uploads, and check that the other one rests."""
    for _ in range(rounds):
        before = fed.server.adapter
        done = fed.round()
        sent = {n for update in done.updates for n in update.adapter if not is_head(n)}
        kinds = {"a" if is_a(n) else "b" for n in sent}
        assert len(kinds) == 1
        assert len(sent) == len(SHAPES)
        (kind,) = kinds
        frozen = is_b if kind == "a" else is_a
        for name in filter(frozen, before):
            holders = [before, fed.server.adapter, *done.trained.values()]
            assert len({digest(adapter[name]) for adapter in holders}) == 1
        moving = [n for n in before if not (frozen(n) or is_head(n))]
        assert all(digest(before[n]) != digest(fed.server.adapter[n]) for n in moving)
        yield kind


def test_rolora_trains_b_first_and_then_in_turn() -> None:
    assert "".join(halves(Federation("rolora"), 6)) == "bababa"


def test_rolora_may_stay_with_a_half_for_several_versions() -> None:
    assert "".join(halves(Federation("rolora", {"flip_every": 2}), 6)) == "bbaabb"


def test_rolora_learns_in_its_first_round() -> None:
    fed = Federation("rolora", engine=FakeEngine("quadratic"), learning_rate=1e-2)
    before = fed.global_view()
    fed.round()
    after = fed.global_view()
    assert all(float((after[m] - before[m]).norm()) > 1e-2 for m in SHAPES)


def test_rolora_would_lose_a_first_round_on_a() -> None:
    _, client = make("rolora", {})
    start, engine = start_adapter(RANK, torch.float64), FakeEngine("quadratic")
    job = Job(0, Payload(0, start), stage="train_a", steps=3, learning_rate=0.1)
    run_jobs([job], client, engine)
    assert digests(engine.trained[0]) == digests(start)


def test_rolora_moves_one_half_each_way_and_both_at_first_contact() -> None:
    fed = Federation("rolora", head="frozen")
    a = 8 * RANK * sum(i for _, i in SHAPES.values())
    b = 8 * RANK * sum(o for o, _ in SHAPES.values())
    up, down = [], []
    for _ in range(4):
        done = fed.round()
        up.append(done.updates[0].nbytes)
        down.append(done.jobs[0].payload.nbytes)
    assert up == [b, a, b, a]
    assert down == [a + b, b, a, b]
