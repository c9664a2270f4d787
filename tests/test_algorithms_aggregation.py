"""What the specification says of single aggregation methods, beyond what it asks of all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conformance.world import (
    CLIENTS,
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
    start_adapter,
)
from torch import Tensor

from fedllm.adapters import (
    BaseDelta,
    alignment,
    in_slot,
    is_a,
    is_core,
    is_gain,
    is_head,
    is_index,
    is_on_path,
    is_values,
    measure,
    name_a,
    name_b,
    name_core,
    name_gain,
    name_index,
    name_values,
    note,
)
from fedllm.errors import ConfigError
from fedllm.federation import Part


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
    done = whole.round()
    cut.round()
    for layer in SHAPES:
        full = whole.server.base.as_products()[layer].dense()
        part = cut.server.base.as_products()[layer].dense()
        assert float((full - part).square().sum()) == pytest.approx(tail(full, 2))
        assert float((ideal_mean(done, layer)).norm()) > 0


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
    turned = fed.server.rebase(late.updates[0])
    assert turned is not None
    now = fed.server.adapter.overlaid(turned.adapter.tensors)
    for layer in SHAPES:
        assert_same(
            {layer: path_product(now, layer)}, {layer: path_product(late.trained[2], layer)}
        )
    assert fed.server.rebase(replace(late.updates[0], version=-5)) is None


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


# SLoRA


def test_slora_changes_masked_entries_alone_and_continues_from_them() -> None:
    fed = Federation("slora", {"density": 0.1, "sparse_rounds": 2})
    mask = {layer: fed.server.adapter[name_index(layer)].long() for layer in SHAPES}
    fed.round()
    for layer, places in mask.items():
        change = effective(fed.server.adapter, BaseDelta())[layer].reshape(-1)
        change[places] = 0.0
        assert not change.any()
    done = fed.train(CLIENTS)
    sparse = {
        layer: sum(
            p * effective(done.trained[k], BaseDelta())[layer] for k, p in done.shares.items()
        )
        for layer in SHAPES
    }
    fed.finish(done)
    assert not any(is_values(n) or is_index(n) for n in fed.server.adapter)
    for layer, wanted in sparse.items():
        whole = torch.as_tensor(wanted)
        lost = whole - path_product(fed.server.adapter, layer)
        assert float(lost.square().sum()) == pytest.approx(tail(whole, RANK), rel=1e-9)
    assert fed.server.rebase(done.updates[0]) is None  # of a stage that is over


def test_slora_sends_as_many_numbers_as_the_mask_has() -> None:
    fed = Federation("slora", {"density": 0.1}, head="frozen")
    (update, *_), count = fed.round().updates, 0
    for rows, columns in SHAPES.values():
        count += round(0.1 * rows * columns)
    assert update.nbytes == 8 * count
    assert {name_values(layer) for layer in SHAPES} == set(update.adapter)


def test_slora_without_sparse_rounds_is_fedit() -> None:
    plain, same = Federation("fedit").run(3), Federation("slora", {"sparse_rounds": 0}).run(3)
    assert plain.server.adapter.digest() == same.server.adapter.digest()


# ILoRA


def test_ilora_starts_where_the_base_is_on_a_shift_that_stays() -> None:
    fed = Federation("ilora")
    first = fed.server.adapter
    assert all(float(effective(first, BaseDelta())[layer].norm()) < 1e-9 for layer in SHAPES)
    done = fed.run(rounds=2).round()
    for layer, shape in SHAPES.items():
        weight = noise(shape, "weight", layer)
        shift = in_slot(layer, "shift")
        q = first[name_b(shift)]
        assert_same({layer: q @ q.T @ weight}, {layer: q @ first[name_a(shift)]})
        for adapter in (fed.server.adapter, *done.trained.values()):
            assert torch.equal(adapter[name_a(shift)], first[name_a(shift)])


def test_ilora_keeps_the_first_columns_exactly_and_b_orthonormal() -> None:
    fed = Federation("ilora", ranks=mixed_ranks())
    done = fed.round()
    for layer in SHAPES:
        scaled = {cid: path_product(own, layer) for cid, own in done.trained.items()}
        wanted = torch.as_tensor(sum(p * scaled[cid] for cid, p in done.shares.items()))
        for job in fed.jobs(CLIENTS):
            own, rank = job.payload.adapter, min(fed.ranks.of(job.cid), *SHAPES[layer])
            found = path_product(own, layer)
            assert_same({layer: found[:, :rank]}, {layer: wanted[:, :rank]})
            b = own[name_b(layer)][:, :rank]
            assert_same({layer: b.T @ b}, {layer: torch.eye(rank, dtype=b.dtype)})


def test_ilora_by_svd_is_the_better_split() -> None:
    lost = {}
    for split in ("qr", "svd"):
        fed = Federation("ilora", {"split": split})
        done = fed.round()
        layer = "layers.0.q_proj"
        wanted = sum(p * path_product(done.trained[c], layer) for c, p in done.shares.items())
        lost[split] = float(
            (torch.as_tensor(wanted) - path_product(fed.server.adapter, layer)).norm()
        )
    assert lost["svd"] < lost["qr"]


def test_ilora_control_is_the_mean_of_the_clients_under_full_participation() -> None:
    fed = Federation("ilora").run(rounds=3)
    server: Any = fed.server
    for name, control in server.control.items():
        own = [fed.store.get(cid)[note("control", name)] for cid in CLIENTS]
        assert_same({name: control}, {name: torch.stack(own).mean(dim=0)})
        assert control.any()


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


def test_clients_that_differ_by_rotations_alone_aggregate_exactly() -> None:
    common = start_adapter(RANK, torch.float64)
    common = common.overlaid({name_b(m): noise((SHAPES[m][0], RANK), "b", m) for m in SHAPES})
    spun = []
    for cid in CLIENTS:
        q, r = torch.linalg.qr(noise((RANK, RANK), "turn", cid))
        q = q * r.diagonal().sign()
        q[:, 0] *= torch.linalg.det(q).sign()
        spun.append(
            common.overlaid(
                {
                    n: q.T @ t if is_a(n) else t @ q
                    for n, t in common.tensors.items()
                    if is_on_path(n)
                }
            )
        )
    back = [alignment.rotated(own, common, "a", 1.0) for own in spun]
    for layer in SHAPES:
        for own in back:
            assert_same({layer: own[name_a(layer)]}, {layer: common[name_a(layer)]})
        means = [
            torch.stack([own[name(layer)] for own in spun]).mean(dim=0) for name in (name_b, name_a)
        ]
        assert float((SCALING * means[0] @ means[1] - path_product(common, layer)).norm()) > 1e-2


# FedMomentum


def test_fedmomentum_loses_what_lies_beyond_its_energy_and_nothing_else() -> None:
    fed = Federation("fedmomentum", {"energy": 0.95})
    done = fed.round()
    for layer in SHAPES:
        wanted, view = ideal_mean(done, layer), fed.global_view()[layer]
        spectrum = torch.linalg.svdvals(wanted).square()
        lost = float((wanted - view).square().sum())
        assert lost <= 0.05 * float(spectrum.sum()) + 1e-12
        kept = int((spectrum.cumsum(0) < 0.95 * spectrum.sum()).sum()) + 1
        assert lost == pytest.approx(tail(wanted, max(kept, RANK)), abs=1e-9)
        b, a = fed.server.adapter[name_b(layer)], fed.server.adapter[name_a(layer)]
        torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))
        added = fed.server.base.as_products().get(layer)
        if added is not None:
            assert float((added.dense().T @ b).norm()) < 1e-9


# HetLoRA


def test_hetlora_weighs_by_norms_whatever_their_common_scale() -> None:
    fed = Federation("hetlora", ranks=mixed_ranks())
    done = fed.train(CLIENTS)
    weights = [fed.server.weight(u) for u in done.updates]
    norms = [measure.adapter_norm(u.adapter.body) for u in done.updates]
    assert weights == norms
    assert len(set(weights)) == len(CLIENTS)


def test_hetlora_prunes_a_tail_that_has_shrunk_and_the_server_follows() -> None:
    settings = {"gamma": 0.5, "strength": 50.0, "smallest_rank": 2}
    fed = Federation("hetlora", settings, ranks=mixed_ranks(), learning_rate=1e-2)
    seen: dict[int, list[int]] = {cid: [] for cid in CLIENTS}
    for _ in range(4):
        for update in fed.round().updates:
            seen[update.cid].append(update.adapter.rank)
    for cid, ranks in seen.items():
        assert ranks == sorted(ranks, reverse=True)
        assert min(ranks) >= 2
        assert fed.jobs([cid])[0].payload.adapter.rank == ranks[-1]
    assert any(ranks[-1] < fed.ranks.of(cid) for cid, ranks in seen.items())


def test_hetlora_of_equal_ranks_and_norms_is_fedit_with_uniform_weights() -> None:
    het = Federation("hetlora", {"gamma": 1.0, "strength": 0.0})
    fit = Federation("fedit", {"weights": "uniform"})
    done = het.train([1])
    parts = [Part(1.0, replace(done.updates[0], cid=c)) for c in CLIENTS]
    for fed in (het, fit):
        fed.server.apply(parts)
    assert_same(dict(het.server.adapter.tensors), dict(fit.server.adapter.tensors))


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


def test_lora_fair_held_strongly_is_fedit() -> None:
    fair, fit = Federation("lora-fair", {"strength": 1e12}).run(1), Federation("fedit").run(1)
    assert_same(dict(fair.server.adapter.tensors), dict(fit.server.adapter.tensors))


def test_lora_fair_by_cosine_points_closer_to_the_mean_product() -> None:
    found = []
    for steps in (1, 200):
        settings = {"solver": "cosine_sgd", "strength": 0.0, "steps": steps, "step_size": 1.0}
        fed = Federation("lora-fair", settings)
        done = fed.round()
        layer = "h.0.c_attn"
        one, other = ideal_mean(done, layer), path_product(fed.server.adapter, layer)
        found.append(float((one * other).sum() / (one.norm() * other.norm())))
    assert found[1] > found[0]


# cyclic


@pytest.mark.parametrize("reshuffle", [False, True])
def test_cyclic_visits_everyone_once_a_cycle(reshuffle: bool) -> None:
    fed = Federation("cyclic", {"reshuffle": reshuffle})
    walked = []
    for _ in range(4 * len(CLIENTS)):
        cohort = fed.sampled(3)
        walked += cohort
        done = fed.round(cohort)
        wanted = effective(done.trained[cohort[0]], BaseDelta())
        assert_same(fed.global_view(), wanted)
    cycles = [tuple(walked[i : i + len(CLIENTS)]) for i in range(0, len(walked), len(CLIENTS))]
    assert all(sorted(cycle) == list(CLIENTS) for cycle in cycles)
    assert (len(set(cycles)) > 1) == reshuffle
