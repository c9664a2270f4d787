"""What the specification says of single aggregation methods, beyond what it asks of all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conformance.sanitiser import digest
from conformance.world import (
    CLIENTS,
    RANK,
    SCALING,
    SHAPES,
    FakeEngine,
    Federation,
    assert_same,
    effective,
    noise,
    path_product,
    start_adapter,
)
from torch import Tensor

from fedllm.adapters import (
    BaseDelta,
    in_slot,
    is_a,
    is_core,
    is_gain,
    is_head,
    is_on_path,
    name_a,
    name_b,
    name_core,
    name_gain,
)
from fedllm.algorithms import make
from fedllm.errors import ConfigError
from fedllm.federation import Job, Payload


def tail(matrix: Tensor, rank: int) -> float:
    """Return the energy beyond the leading `rank` singular values."""
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


def ideal_mean(done: Any, layer: str) -> Tensor:
    """Return sum_k p_k s_k B_k A_k of a layer."""
    products = done.client_products()
    return torch.as_tensor(sum(p * products[k][layer] for k, p in done.shares.items()))


# FedEx-LoRA


def test_fedex_residual_has_the_rank_of_the_deviations_and_needs_its_scaling() -> None:
    fed = Federation("fedex-lora")
    for cohort in (CLIENTS, (0, 3)):
        before = fed.server.base
        done = fed.round(cohort)
        for layer, added in fed.server.base.since(before).items():
            matrix = added if isinstance(added, Tensor) else added.dense()
            found = int(torch.linalg.matrix_rank(matrix, tol=1e-9))
            assert 0 < found <= min((len(cohort) - 1) * RANK, *SHAPES[layer])
            own = path_product(fed.server.adapter, layer)
            wanted = ideal_mean(done, layer)
            assert float((matrix + own - wanted).norm()) < 1e-9
            assert float((matrix / SCALING + own - wanted).norm()) > 1e-3


def test_fedex_residual_can_be_cut_to_a_rank() -> None:
    whole, cut = Federation("fedex-lora"), Federation("fedex-lora", {"residual_rank": 2})
    whole.round()
    cut.round()
    for layer in SHAPES:
        full = whole.server.base.as_products()[layer].dense()
        part = cut.server.base.as_products()[layer].dense()
        assert float((full - part).square().sum()) == pytest.approx(tail(full, 2))
        assert tail(full, 2) > 1e-3
        assert int(torch.linalg.matrix_rank(part, tol=1e-9)) == 2


def test_fedex_charges_an_absent_client_for_the_increments_it_lacks_and_no_more() -> None:
    fed = Federation("fedex-lora", head="frozen")
    fed.round((0, 3))
    fed.round((0, 1))
    late, present = fed.jobs((3, 0))
    pair = 8 * RANK * sum(o + i for o, i in SHAPES.values())  # as much as a residual of two
    assert (late.payload.nbytes, present.payload.nbytes) == (3 * pair, 2 * pair)
    views = [effective(job.payload.adapter, job.payload.base) for job in (late, present)]
    assert_same(views[0], views[1])


# FedSVD


def test_fedsvd_refactors_without_changing_the_product_or_the_subspace() -> None:
    fed = Federation("fedsvd", engine=FakeEngine("perturb"))
    first = fed.server.adapter
    for _ in range(3):
        done = fed.round()
        for layer in SHAPES:
            a = fed.server.adapter[name_a(layer)]
            assert_same({layer: a @ a.T}, {layer: torch.eye(RANK, dtype=a.dtype)})
            assert float(torch.linalg.matrix_norm(a, 2)) == pytest.approx(1.0)
            assert_same(
                {layer: path_product(fed.server.adapter, layer)}, {layer: ideal_mean(done, layer)}
            )
            rows = first[name_a(layer)]
            projector = torch.linalg.pinv(rows) @ rows
            assert_same({layer: a @ projector}, {layer: a})


def test_fedsvd_period_is_kept_and_a_then_needs_no_sending() -> None:
    fed = Federation("fedsvd", {"period": 3}, head="frozen")
    sent = []
    for _ in range(5):
        before = fed.server.adapter
        done = fed.round()
        sent.append(done.jobs[0].payload.nbytes)
        moved = not torch.equal(
            before[name_a("h.0.c_attn")], fed.server.adapter[name_a("h.0.c_attn")]
        )
        assert moved == (fed.server.version % 3 == 0)
    both, only_b = sent[0], sent[1]
    assert sent == [both, only_b, only_b, both, only_b]
    assert only_b < both


def test_fedsvd_brings_a_late_b_to_todays_a() -> None:
    fed = Federation("fedsvd").run(rounds=1)
    late = fed.train([2])
    fed.run(rounds=2)
    turned = fed.server.rebase(late.updates[0], late.jobs[0])
    assert turned is not None
    now = fed.server.adapter.overlaid(turned.adapter.tensors)
    start = late.jobs[0].payload.adapter
    for layer in SHAPES:
        changed = path_product(late.trained[2], layer) - path_product(start, layer)
        wanted = path_product(fed.server.adapter, layer) + changed
        assert_same({layer: path_product(now, layer)}, {layer: wanted})


def test_fedsvd_trains_b_against_an_a_that_stays_bit_for_bit() -> None:
    fed = Federation("fedsvd", engine=FakeEngine("quadratic"), learning_rate=1e-2).run(rounds=1)
    done = fed.round()
    for job, update in zip(done.jobs, done.updates, strict=True):
        assert not any(is_a(name) for name in update.adapter)
        for layer in SHAPES:
            received, own = job.payload.adapter, done.trained[job.cid]
            assert torch.equal(own[name_a(layer)], received[name_a(layer)])
            assert not torch.equal(own[name_b(layer)], received[name_b(layer)])


def test_fedsvd_puts_the_spectrum_of_the_averaged_b_times_a_into_b() -> None:
    fed = Federation("fedsvd").run(rounds=1)
    done = fed.round()
    for layer in SHAPES:
        mean = sum(p * done.trained[k][name_b(layer)] for k, p in done.shares.items())
        product = (torch.as_tensor(mean) @ done.before.adapter[name_a(layer)]).numpy()
        spectrum = np.linalg.svd(product, compute_uv=False)[:RANK]
        b = fed.server.adapter[name_b(layer)]
        assert_same({layer: b.T @ b}, {layer: torch.diag(torch.from_numpy(spectrum**2))})


def test_fedsvd_completes_the_basis_where_b_has_less_than_its_rank() -> None:
    fed = Federation("fedsvd", steps=0)
    fed.round()
    for layer in SHAPES:
        a, b = fed.server.adapter[name_a(layer)], fed.server.adapter[name_b(layer)]
        assert_same({layer: a @ a.T}, {layer: torch.eye(RANK, dtype=a.dtype)})
        assert float(b.norm()) < 1e-12


# RAVAN


def ravan(**settings: Any) -> Federation:
    return Federation("ravan", {"heads": 3, **settings})


def test_ravan_starts_at_nothing_on_orthogonal_bases_that_never_move() -> None:
    fed = ravan()
    start = fed.server.adapter
    for layer in SHAPES:
        assert not effective(start, BaseDelta())[layer].any()
        rows = torch.cat([start[name_a(in_slot(layer, f"head{j}"))] for j in range(3)])
        columns = torch.cat([start[name_b(in_slot(layer, f"head{j}"))] for j in range(3)], dim=1)
        one = torch.eye(3 * RANK, dtype=rows.dtype)
        assert_same({"a": rows @ rows.T, "b": columns.T @ columns}, {"a": one, "b": one})
    done = fed.run(rounds=2).round()
    for adapter in (fed.server.adapter, *done.trained.values()):
        for name in filter(lambda n: is_on_path(n) and not (is_core(n) or is_gain(n)), start):
            assert torch.equal(adapter[name], start[name])


def test_ravan_sends_cores_with_their_gains_inside() -> None:
    fed = ravan().run(rounds=1)
    done = fed.round()
    for update in done.updates:
        assert all(is_core(n) or is_head(n) for n in update.adapter)
        for path in done.trained[update.cid].modules:
            own = done.trained[update.cid]
            wanted = own[name_gain(path)] * own[name_core(path)]
            assert_same({path: update.adapter[name_core(path)]}, {path: wanted})
            assert float(own[name_gain(path)]) != 1.0
            assert float(fed.server.adapter[name_gain(path)]) == 1.0


@pytest.mark.parametrize("absent", ["exclude", "hold"])
def test_ravan_counts_absent_heads_as_it_is_told(absent: str) -> None:
    fed = ravan(trained_heads=1, absent=absent).run(rounds=2)
    before = fed.server.adapter
    done = fed.round()
    assert len({n for u in done.updates for n in u.adapter if is_core(n)}) > len(SHAPES)
    for name in filter(is_core, before):
        sent = {u.cid: u.adapter[name] for u in done.updates if name in u.adapter}
        held = {cid: sent.get(cid, before[name]) for cid in CLIENTS} if absent == "hold" else sent
        if not held:
            continue
        total = sum(done.shares[cid] for cid in held)
        wanted = sum(done.shares[cid] / total * tensor for cid, tensor in held.items())
        assert_same({name: fed.server.adapter[name]}, {name: torch.as_tensor(wanted)})


def test_ravan_says_when_orthogonal_heads_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.heads: 8 orthogonal .* gaussian"):
        Federation("ravan", {"heads": 8})
    Federation("ravan", {"heads": 8, "bases": "gaussian"})


def test_ravan_loses_nothing_where_all_train_the_same_heads() -> None:
    fed = ravan()
    for _ in range(3):
        done = fed.round()
        for layer in SHAPES:
            wanted = torch.zeros(SHAPES[layer], dtype=torch.float64)
            for cid, p in done.shares.items():
                for path in (in_slot(layer, f"head{j}") for j in range(3)):
                    own = done.trained[cid]
                    core = own[name_gain(path)] * own[name_core(path)]
                    wanted += p * own[name_b(path)] @ core @ own[name_a(path)]
            assert float(wanted.norm()) > 1e-2
            assert_same({layer: fed.global_view()[layer]}, {layer: wanted})


@pytest.mark.parametrize(("trained", "count"), [(None, 3), (1, 1), (2, 2)])
def test_ravan_sends_one_square_for_each_head_that_it_trained(
    trained: int | None, count: int
) -> None:
    for update in ravan(trained_heads=trained).round().updates:
        numbers = sum(update.adapter[n].numel() for n in update.adapter if not is_head(n))
        assert numbers == count * RANK**2 * len(SHAPES)


def test_ravan_keeps_a_core_that_nobody_trained() -> None:
    fed = ravan(trained_heads=1).run(rounds=1)
    before = fed.server.adapter
    (update,) = fed.round([2]).updates
    moved = {n for n in before if is_core(n) and not torch.equal(fed.server.adapter[n], before[n])}
    assert moved == {n for n in update.adapter if is_core(n)}
    assert len(moved) == len(SHAPES)


# FedRot-LoRA


def test_fedrot_turns_factors_and_leaves_products_and_the_first_round() -> None:
    fed = Federation("fedrot-lora", {"strength": 1.0})
    for version in range(3):
        done = fed.round()
        for update in done.updates:
            own = done.trained[update.cid]
            for layer in SHAPES:
                assert_same(
                    {layer: path_product(update.adapter, layer)}, {layer: path_product(own, layer)}
                )
                same = torch.equal(update.adapter[name_a(layer)], own[name_a(layer)])
                assert same == (version == 0)
            if version:
                side = name_a if version % 2 else name_b
                goal = done.jobs[update.cid].payload.adapter
                near = [
                    float((x[side("h.0.c_attn")] - goal[side("h.0.c_attn")]).norm())
                    for x in (update.adapter, own)
                ]
                assert near[0] <= near[1] + 1e-12


def test_fedrot_without_strength_is_fedit() -> None:
    plain, same = Federation("fedit").run(3), Federation("fedrot-lora", {"strength": 0.0}).run(3)
    assert plain.server.adapter.digest() == same.server.adapter.digest()


def procrustes(own: Tensor, goal: Tensor, strength: float) -> Tensor:
    """Return the soft rotation of a factor (r, n) towards another, by numpy."""
    u, _, vh = np.linalg.svd((own @ goal.T).numpy())
    u[:, -1] *= np.sign(np.linalg.det(u @ vh))
    left, _, right = np.linalg.svd((1 - strength) * np.eye(RANK) + strength * (u @ vh))
    return torch.from_numpy(left @ right)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_fedrot_aligns_a_in_odd_rounds_and_b_in_even_ones(strength: float) -> None:
    fed = Federation("fedrot-lora", {"strength": strength}).run(rounds=1)
    for version in (1, 2, 3):
        done = fed.round()
        for job, update in zip(done.jobs, done.updates, strict=True):
            own, goal = done.trained[job.cid], job.payload.adapter
            for layer in SHAPES:
                a, b = name_a(layer), name_b(layer)
                pair = (own[a], goal[a]) if version % 2 else (own[b].T, goal[b].T)
                turn = procrustes(*pair, strength)
                wanted = {a: turn.T @ own[a], b: own[b] @ turn}
                assert_same({n: update.adapter[n] for n in wanted}, wanted)


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_fedrot_turns_by_rotations_alone(strength: float) -> None:
    fed = Federation("fedrot-lora", {"strength": strength}).run(rounds=1)
    for _ in range(2):
        done = fed.round()
        for update in done.updates:
            for layer in SHAPES:
                own = done.trained[update.cid][name_b(layer)]
                turn = torch.linalg.lstsq(own, update.adapter[name_b(layer)]).solution
                one = torch.eye(RANK, dtype=turn.dtype)
                assert_same({layer: turn.T @ turn}, {layer: one})
                assert float(torch.linalg.det(turn)) == pytest.approx(1.0)
                assert float((turn - one).norm()) > 1e-6


@pytest.mark.parametrize("version", [0, 1, 2], ids=["first", "align-a", "align-b"])
def test_fedrot_takes_a_half_turn_in_full_but_nothing_in_the_first_round(version: int) -> None:
    half = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    common = start_adapter(RANK, torch.float64)
    common = common.overlaid({name_b(m): noise((SHAPES[m][0], RANK), "b", m) for m in SHAPES})
    trained = common.overlaid(
        {n: half @ common[n] if is_a(n) else common[n] @ half for n in common if is_on_path(n)}
    )
    server, client = make("fedrot-lora", {"strength": 0.5})
    sent = client.finish(trained, Job(0, Payload(version, common), settings=vars(server)))
    assert_same(dict(sent.tensors), dict((common if version else trained).tensors))


# LoRA-FAIR


def test_lora_fair_keeps_a_and_is_never_worse_than_fedit() -> None:
    fair, fit = Federation("lora-fair", {"strength": 1e-9}), Federation("fedit")
    done = fair.round()
    fit.round()
    for layer in SHAPES:
        a = fair.server.adapter[name_a(layer)]
        assert torch.equal(a, fit.server.adapter[name_a(layer)])
        wanted = ideal_mean(done, layer)
        errors = [
            float((wanted - path_product(fed.server.adapter, layer)).norm()) for fed in (fair, fit)
        ]
        assert errors[0] < errors[1]
        rows = torch.linalg.pinv(a) @ a
        assert_same({layer: path_product(fair.server.adapter, layer)}, {layer: wanted @ rows}, 1e-5)


@pytest.mark.parametrize("strength", [0.01, 3.0])
def test_lora_fair_corrects_b_by_the_ridge_in_closed_form(strength: float) -> None:
    fed = Federation("lora-fair", {"strength": strength})
    done = fed.round()
    for layer in SHAPES:
        names = name_a(layer), name_b(layer)
        a, b = (sum(p * done.trained[k][n].numpy() for k, p in done.shares.items()) for n in names)
        missing = ideal_mean(done, layer).numpy() / SCALING - b @ a
        step = missing @ a.T @ np.linalg.inv(a @ a.T + strength * np.eye(RANK))
        assert np.linalg.norm(step) > 1e-3
        wanted = torch.from_numpy(b + step)
        assert_same({layer: fed.server.adapter[name_b(layer)]}, {layer: wanted})


def test_lora_fair_by_cosine_turns_from_fedit_towards_the_mean_product_and_keeps_a() -> None:
    settings = {"solver": "cosine_sgd", "strength": 0.0, "step_size": 1.0}
    feds = [Federation("lora-fair", {**settings, "steps": n}) for n in (200, 1)]
    feds.append(Federation("fedit"))
    done, *_ = [fed.round() for fed in feds]  # all start and train alike
    for layer in SHAPES:
        wanted, cosines = ideal_mean(done, layer), []
        for fed in feds:
            found = path_product(fed.server.adapter, layer)
            cosines.append(float((wanted * found).sum() / (wanted.norm() * found.norm())))
        assert cosines[0] > cosines[1] + 1e-4 > cosines[2] + 1e-4
        assert len({digest(fed.server.adapter[name_a(layer)]) for fed in feds}) == 1


@pytest.mark.parametrize("solver", ["ridge", "cosine_sgd"])
def test_lora_fair_held_strongly_is_fedit(solver: str) -> None:
    fair, fit = Federation("lora-fair", {"solver": solver, "strength": 1e12}), Federation("fedit")
    assert_same(fair.run(2).global_view(), fit.run(2).global_view())
