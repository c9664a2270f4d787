"""Single aggregation methods where ranks differ, clients are absent, or nothing is to be done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conformance.world import (
    CLIENTS,
    HEAD,
    NUM_SAMPLES,
    RANK,
    SCALING,
    SHAPES,
    FakeEngine,
    Federation,
    assert_same,
    effective,
    mixed_ranks,
    noise,
    path_product,
    run_jobs,
    start_adapter,
)
from torch import Tensor

from fedllm.adapters import (
    Adapter,
    BaseDelta,
    bases,
    in_slot,
    is_a,
    is_core,
    is_on_path,
    is_values,
    name_a,
    name_b,
    name_core,
    name_values,
    note,
)
from fedllm.algorithms import make
from fedllm.federation import BaseClient, Job, Part, Payload, Update


def ideal(fed: Federation, done: Any) -> dict[str, Tensor]:
    """Return the base before the round plus sum_k p_k s_k B_k A_k, for any ranks."""
    view = effective(done.before.adapter.select(lambda n: not is_on_path(n)), done.before.base)
    products = done.client_products()
    return {
        m: view[m] + sum(p * products[cid][m] for cid, p in done.shares.items()) for m in SHAPES
    }


def alike(fed: Federation, count: int = 4) -> list[Part]:
    """Return parts of unequal weight that are copies of one client's update."""
    (update,) = fed.train([1]).updates
    return [Part(0.1 + c, replace(update, cid=c)) for c in CLIENTS[:count]]


# FedEx-LoRA


def test_fedex_merges_nothing_where_clients_agree() -> None:
    fed = Federation("fedex-lora").run(rounds=2)
    before, parts = fed.server.base, alike(fed)
    fed.server.apply(parts)
    for added in fed.server.base.since(before).values():
        matrix = added if isinstance(added, Tensor) else added.dense()
        assert float(matrix.norm()) < 1e-12


def test_fedex_with_one_client_merges_nothing_at_all() -> None:
    fed = Federation("fedex-lora").run(rounds=2)
    before = fed.server.base
    fed.round([2])
    assert fed.server.base is before


@pytest.mark.parametrize("cohort_size", [4, 2])
def test_fedex_is_exact_for_unequal_ranks(cohort_size: int) -> None:
    fed = Federation("fedex-lora", ranks=mixed_ranks())
    for _ in range(3):
        done = fed.round(fed.sampled(cohort_size))
        view = fed.global_view()
        assert_same({m: view[m] for m in SHAPES}, ideal(fed, done))


# FedSVD


def test_fedsvd_brings_a_late_b_of_small_rank_to_todays_leading_rows() -> None:
    fed = Federation("fedsvd", ranks=mixed_ranks()).run(rounds=1)
    small = min(CLIENTS, key=fed.ranks.of)
    late = fed.train([small])
    fed.run(rounds=2)
    turned = fed.server.rebase(late.updates[0], late.jobs[0])
    assert turned is not None
    start, now = late.jobs[0].payload.adapter, fed.server.download(small).adapter
    for layer in SHAPES:
        rows = fed.server.adapter[name_a(layer)][: fed.ranks.of(small)]
        changed = path_product(late.trained[small], layer) - path_product(start, layer)
        wanted = path_product(now, layer) + changed @ torch.linalg.pinv(rows) @ rows
        got = SCALING * turned.adapter[name_b(layer)] @ rows
        assert_same({layer: got}, {layer: wanted})


def test_fedsvd_leaves_a_b_alone_whose_a_has_not_changed() -> None:
    fed = Federation("fedsvd", {"period": 3}).run(rounds=1)
    late = fed.train([2])
    before = fed.server.adapter
    fed.round()
    turned = fed.server.rebase(late.updates[0], late.jobs[0])
    assert turned is not None
    for name, tensor in late.updates[0].adapter.tensors.items():
        wanted = fed.server.adapter[name] + tensor - before[name]
        torch.testing.assert_close(turned.adapter[name], wanted)


# RAVAN


def test_ravan_holding_absent_heads_is_exact_for_the_sampled_clients() -> None:
    fed = Federation("ravan", {"heads": 3, "trained_heads": 2, "absent": "hold"})
    for _ in range(3):
        done = fed.round(fed.sampled(3))
        view = fed.global_view()
        assert_same({m: view[m] for m in SHAPES}, done.ideal())


def test_ravan_by_norm_trains_the_largest_cores() -> None:
    fed = Federation("ravan", {"heads": 3, "trained_heads": 2, "choose": "norm"})
    sizes = {"head0": 1.0, "head1": 5.0, "head2": 3.0}
    cores = {
        name_core(in_slot(layer, slot)): torch.eye(RANK, dtype=torch.float64) * size
        for layer in SHAPES
        for slot, size in sizes.items()
    }
    fed.server.adapter = fed.server.adapter.overlaid(cores)
    for update in fed.round().updates:
        paths = {in_slot(layer, slot) for layer in SHAPES for slot in ("head1", "head2")}
        assert {n for n in update.adapter if is_core(n)} == {name_core(path) for path in paths}


def test_gaussian_bases_have_variance_one_over_the_rank() -> None:
    wide = {"q": (400, 300)}
    tensors = {name_a("q"): torch.empty(16, 300), name_b("q"): torch.empty(400, 16)}
    made = bases.with_bases(Adapter(tensors, dict.fromkeys(wide, 2.0)), 2, "gaussian", seed=3)
    for path in made.modules:
        for name in (name_a(path), name_b(path)):
            assert float(made[name].var()) == pytest.approx(1 / 16, rel=0.1)
        assert made.scaling[path] == 1.0


# SLoRA


def test_slora_averages_values_over_the_clients_that_took_part() -> None:
    fed = Federation("slora", {"density": 0.1, "sparse_rounds": 2})
    fed.round((0, 1))
    done = fed.train((1, 3))
    means = {
        name: sum(p * done.trained[cid][name] for cid, p in done.shares.items())
        for name in filter(is_values, done.trained[1])
    }
    assert set(means) == {name_values(layer) for layer in SHAPES}
    whole = replace(done.before.adapter, tensors={**done.before.adapter.tensors, **means})
    fed.finish(done)
    for layer, wanted in effective(whole, BaseDelta()).items():
        if layer in SHAPES:
            u, s, vh = np.linalg.svd(wanted.numpy(), full_matrices=False)
            best = torch.from_numpy((u[:, :RANK] * s[:RANK]) @ vh[:RANK])
            assert_same({layer: path_product(fed.server.adapter, layer)}, {layer: best})
    assert fed.server.adapter[HEAD].any()


# ILoRA


def test_ilora_turns_a_gradient_by_the_servers_control_and_against_the_clients_own() -> None:
    _, client = make("ilora", {})
    start = start_adapter(2, torch.float64)
    grads = {n: noise(t.shape, "g", n) for n, t in start.tensors.items()}
    extra = {n: noise(t.shape, "c", n) for n, t in start.tensors.items()}
    own = {n: noise(t.shape, "ck", n) for n, t in start.tensors.items()}
    job = Job(0, Payload(3, start, extra=extra))
    first = client.correct(grads, job)
    later = client.correct(grads, replace(job, state={note("control", n): own[n] for n in own}))
    assert first is not None
    assert later is not None
    assert_same(first, {n: grads[n] + extra[n] for n in grads})
    assert_same(later, {n: grads[n] + extra[n] - own[n] for n in grads})


def test_ilora_control_of_a_client_is_its_full_gradient_at_the_download() -> None:
    engine = FakeEngine("quadratic")
    fed = Federation("ilora", engine=engine, learning_rate=1e-3).run(rounds=1)
    done = fed.round((0, 2))
    for job in done.jobs:
        plain = BaseClient()
        plain.trainable = fed.client.trainable  # type: ignore[method-assign]
        request = engine.gradient(job, job.payload.adapter, plain)
        (slope,) = engine.train([request])
        kept = fed.store.get(job.cid)
        for name in (n for n in job.payload.adapter if ":" not in n):
            assert_same({name: kept[note("control", name)]}, {name: slope.adapter[name]})


def test_ilora_control_moves_by_the_share_of_the_clients_that_took_part() -> None:
    fed = Federation("ilora", ranks=mixed_ranks()).run(rounds=2, cohort_size=3)
    server: Any = fed.server
    before = dict(server.control)
    done = fed.round((0, 3))
    for name, control in server.control.items():
        change = torch.zeros_like(control)
        for update in done.updates:
            sent = update.extra[name]
            change[tuple(slice(length) for length in sent.shape)] += sent / len(CLIENTS)
        assert_same({name: control}, {name: before[name] + change})


def test_ilora_without_controls_sends_no_more_than_its_factors() -> None:
    fed = Federation("ilora", {"controls": False}, head="frozen").run(rounds=2)
    done = fed.round()
    factors = 8 * RANK * sum(o + i for o, i in SHAPES.values())
    assert {u.nbytes for u in done.updates} == {factors}
    assert {j.payload.nbytes for j in done.jobs} == {factors}


# FedRot-LoRA


def spun(common: Adapter, cid: int) -> Adapter:
    """Return the adapter with its factors turned by a rotation of the client's own."""
    q, r = torch.linalg.qr(noise((RANK, RANK), "turn", cid))
    q = q * r.diagonal().sign()
    q = torch.cat([q[:, :1] * torch.linalg.det(q).sign(), q[:, 1:]], dim=1)
    turned = {n: q.T @ common[n] if is_a(n) else common[n] @ q for n in common if is_on_path(n)}
    return common.overlaid(turned)


class Spins(FakeEngine):
    """Training that does nothing but turn each client's factors."""

    def _one(self, request: Any) -> Any:
        result = super()._one(request)
        return replace(result, adapter=spun(request.start, request.job.cid))


@pytest.mark.parametrize("rounds_before", [1, 2], ids=["align-a", "align-b"])
def test_fedrot_undoes_what_only_turns_and_fedit_does_not(rounds_before: int) -> None:
    lost = {}
    for name, settings in (("fedrot-lora", {"strength": 1.0}), ("fedit", {})):
        fed = Federation(name, settings).run(rounds=rounds_before)
        before = fed.global_view()
        fed.engine = Spins()
        fed.round()
        after = fed.global_view()
        lost[name] = max(float((after[m] - before[m]).norm()) for m in SHAPES)
    assert lost["fedrot-lora"] < 1e-9
    assert lost["fedit"] > 1e-2


def test_fedrot_as_released_may_reflect_whatever_the_strength() -> None:
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    common = start_adapter(RANK, torch.float64)
    common = common.overlaid({name_b(m): noise((SHAPES[m][0], RANK), "b", m) for m in SHAPES})
    trained = common.overlaid(
        {n: flip @ common[n] if is_a(n) else common[n] @ flip for n in common if is_on_path(n)}
    )
    near = {}
    for variant in ("released", "paper"):
        settings = {"variant": variant, "strength": 0.3}
        server, client = make("fedrot-lora", settings)
        job = Job(0, Payload(1, common), settings=vars(server))
        sent = client.finish(trained, job)
        near[variant] = float((sent[name_a("h.0.c_attn")] - common[name_a("h.0.c_attn")]).norm())
        assert_same(effective(sent, BaseDelta()), effective(common, BaseDelta()))
    assert near["released"] < 1e-9
    assert near["paper"] > 1e-2


def test_fedrot_server_takes_no_change_from_a_late_client_that_made_none() -> None:
    fed = Federation("fedrot-lora", {"strength": 1.0}).run(rounds=1)
    done = fed.train([3])
    late, start = done.updates[0], done.jobs[0].payload.adapter
    fed.run(rounds=2)
    turned = fed.server.rebase(late, done.jobs[0])
    assert turned is not None
    assert turned.adapter.digest() != fed.server.adapter.digest()
    unmoved = replace(late, adapter=start.select(late.adapter.__contains__))
    same = fed.server.rebase(unmoved, done.jobs[0])
    assert same is not None
    for name, tensor in same.adapter.tensors.items():
        torch.testing.assert_close(tensor, fed.server.adapter[name])


# FedMomentum


def test_fedmomentum_that_keeps_everything_is_exact_for_unequal_ranks() -> None:
    fed = Federation("fedmomentum", {"energy": 1.0}, ranks=mixed_ranks())
    for _ in range(3):
        done = fed.round(fed.sampled(3))
        view = fed.global_view()
        assert_same({m: view[m] for m in SHAPES}, ideal(fed, done))


def test_fedmomentum_splits_the_energy_between_factors_residual_and_nothing() -> None:
    fed = Federation("fedmomentum", {"energy": 0.97}).run(rounds=2)
    before = fed.server.base
    done = fed.round()
    added, share = fed.server.base.since(before), 0.0
    for layer in SHAPES:
        products = done.client_products()
        mean = torch.as_tensor(sum(p * products[c][layer] for c, p in done.shares.items()))
        factors = path_product(fed.server.adapter, layer)
        merged: Any = added.get(layer, torch.zeros_like(mean))
        rest = merged if isinstance(merged, Tensor) else merged.dense()
        energies = [float(m.square().sum()) for m in (factors, rest, mean - factors - rest)]
        assert sum(energies) == pytest.approx(float(mean.square().sum()))
        assert energies[2] <= 0.03 * float(mean.square().sum()) + 1e-12
        share += energies[2]
    assert share > 0


# HetLoRA


def test_hetlora_aggregate_does_not_depend_on_a_common_scale_of_the_weights() -> None:
    fed = Federation("hetlora", ranks=mixed_ranks()).run(rounds=1)
    done = fed.train(CLIENTS)
    plain, doubled = fed.fork(), fed.fork()
    plain.finish(done)
    factor = 7.0
    doubled.server.apply([Part(factor * fed.server.weight(u), u) for u in done.updates])
    assert_same(dict(doubled.server.adapter.tensors), dict(plain.server.adapter.tensors))
    larger = [
        replace(
            u, adapter=replace(u.adapter, scaling={m: 3 * s for m, s in u.adapter.scaling.items()})
        )
        for u in done.updates
    ]
    ratios = [
        fed.server.weight(x) / fed.server.weight(u)
        for x, u in zip(larger, done.updates, strict=True)
    ]
    assert ratios == pytest.approx([3.0] * len(CLIENTS))


def test_hetlora_counts_ranks_that_a_client_lacks_as_zeros_by_norm() -> None:
    fed = Federation("hetlora", {"gamma": 1.0}, ranks=mixed_ranks())
    for cohort in (CLIENTS, (0, 2), CLIENTS):
        before = fed.server.adapter
        done = fed.round(cohort)
        norms = {
            cid: float(np.sqrt(sum(float(path_product(own, m).square().sum()) for m in SHAPES)))
            for cid, own in done.trained.items()
        }
        total = sum(norms.values())
        largest = max(fed.ranks.of(cid) for cid in cohort)
        for layer in SHAPES:
            wanted = before[name_a(layer)].clone()
            wanted[:largest] = 0.0
            for cid in cohort:
                wanted[: fed.ranks.of(cid)] += norms[cid] / total * done.trained[cid][name_a(layer)]
            assert_same({layer: fed.server.adapter[name_a(layer)]}, {layer: wanted})


def test_hetlora_weighs_clients_alike_that_have_trained_nothing() -> None:
    fed = Federation("hetlora", steps=0)
    done = fed.round()
    assert len({fed.server.weight(u) for u in done.updates}) == 1
    assert all(bool(t.isfinite().all()) for t in fed.server.adapter.tensors.values())
    assert_same(dict(fed.server.adapter.tensors), dict(done.before.adapter.tensors))


def test_hetlora_penalty_is_the_product_of_the_tails_and_has_a_slope_at_zero() -> None:
    server, client = make("hetlora", {"gamma": 0.5, "strength": 0.7})
    start = start_adapter(RANK, torch.float64)
    full = start.overlaid({name_b(m): noise((SHAPES[m][0], RANK), "b", m) for m in SHAPES})
    wanted = 0.0
    for layer in SHAPES:
        a, b = full[name_a(layer)], full[name_b(layer)]
        wanted += 0.7 * float(a[2:].norm()) * float(b[:, 2:].norm())
    job = Job(0, Payload(0, full), settings=vars(server))
    assert float(client.penalty(full.tensors, job) or 0.0) == pytest.approx(wanted)
    live = {n: t.clone().requires_grad_() for n, t in start.tensors.items()}  # B is zero here
    penalty = client.penalty(live, job)
    assert penalty is not None
    slopes = torch.autograd.grad(penalty, list(live.values()), allow_unused=True)
    assert all(bool(slope.isfinite().all()) for slope in slopes if slope is not None)


@pytest.mark.parametrize(("shrinks", "rank"), [(True, 7), (False, 8)])
def test_hetlora_gives_up_a_rank_of_eight_at_its_default_if_the_tail_shrinks(
    shrinks: bool, rank: int
) -> None:
    server, client = make("hetlora", {})
    start = start_adapter(8, torch.float64)
    start = start.overlaid({name_b(m): noise((SHAPES[m][0], 8), "b", m) for m in SHAPES})
    factor = torch.ones(8, dtype=torch.float64)
    factor[-1] = 0.9 if shrinks else 1.1
    ended = start.overlaid({name_b(m): start[name_b(m)] * factor for m in SHAPES})
    sent = client.finish(ended, Job(0, Payload(2, start), settings=vars(server)))
    assert {sent.rank_of(m) for m in SHAPES} == {rank}
    for layer in SHAPES:
        assert torch.equal(sent[name_a(layer)], ended[name_a(layer)][:rank])
        assert torch.equal(sent[name_b(layer)], ended[name_b(layer)][:, :rank])


# LoRA-FAIR


@pytest.mark.parametrize("solver", ["ridge", "cosine_sgd"])
def test_lora_fair_corrects_nothing_where_clients_agree(solver: str) -> None:
    fed = Federation("lora-fair", {"solver": solver}).run(rounds=2)
    parts = alike(fed)
    fed.server.apply(parts)
    sent = parts[0].update.adapter
    assert_same({n: fed.server.adapter[n] for n in sent}, dict(sent.tensors))


@pytest.mark.parametrize("strength", [0.0, 0.01, 1.0, 100.0])
def test_lora_fair_is_no_worse_than_fedit_however_strongly_b_is_held(strength: float) -> None:
    fair, fit = Federation("lora-fair", {"strength": strength}), Federation("fedit")
    for fed in (fair, fit):
        fed.run(rounds=1)
    fit.server.adapter = fair.server.adapter  # both go on from one state
    done = fair.round((0, 2, 3))
    fit.server.apply([Part(fit.server.weight(u), u) for u in done.updates])
    for layer in SHAPES:
        products = done.client_products()
        wanted = sum(p * products[c][layer] for c, p in done.shares.items())
        errors = [
            float((wanted - path_product(fed.server.adapter, layer)).norm()) for fed in (fair, fit)
        ]
        assert errors[0] <= errors[1] * (1 + 1e-12)


# cyclic


def in_a_row(updates: list[Update], start: Adapter, jobs: list[Job]) -> Adapter:
    """Train one job after the other by hand, each from where the one before ended."""
    engine, here = FakeEngine(), start
    for update, job in zip(updates, jobs, strict=True):
        alone = replace(job, payload=Payload(job.version, here))
        run_jobs([alone], BaseClient(), engine)
        here = engine.trained[update.cid]
    return here


def test_a_cycle_is_local_training_of_one_client_after_the_other() -> None:
    fed = Federation("cyclic")
    start = fed.server.adapter
    fed.run(rounds=len(CLIENTS))
    updates = [r.updates[0] for r in fed.rounds]
    jobs = [r.jobs[0] for r in fed.rounds]
    assert sorted(u.cid for u in updates) == list(CLIENTS)
    end = in_a_row(updates, start, jobs)
    assert_same(dict(fed.server.adapter.tensors), dict(end.tensors))


def test_cyclic_with_one_client_is_repeated_local_training() -> None:
    fed = Federation("cyclic")
    start = fed.server.adapter
    for _ in range(3):
        fed.round(fed.server.sample([2], 1, np.random.default_rng(0)))
    end = in_a_row([r.updates[0] for r in fed.rounds], start, [r.jobs[0] for r in fed.rounds])
    assert_same(dict(fed.server.adapter.tensors), dict(end.tensors))


def test_the_order_of_a_cycle_is_part_of_the_servers_state() -> None:
    fed = Federation("cyclic", {"reshuffle": True}).run(rounds=6)
    going_on = fed.fork()
    walks = [[f.round(f.sampled(1)).jobs[0].cid for _ in range(6)] for f in (fed, going_on)]
    assert walks[0] == walks[1]
    server: Any = fed.server
    assert sorted(server.order) == list(NUM_SAMPLES)
