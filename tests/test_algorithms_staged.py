"""Methods that change form on the way: stages, split products, pruned ranks, cycles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
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
    run_jobs,
)
from torch import Tensor

from fedllm.adapters import (
    BaseDelta,
    in_slot,
    is_index,
    is_values,
    measure,
    name_a,
    name_b,
    name_index,
    name_values,
    note,
)
from fedllm.federation import BaseClient, FitRequest, Part


def tail(matrix: Tensor, rank: int) -> float:
    """Return the energy beyond the leading `rank` singular values."""
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


def ideal_mean(done: Any, layer: str) -> Tensor:
    """Return sum_k p_k s_k B_k A_k of a layer."""
    products = done.client_products()
    return torch.as_tensor(sum(p * products[k][layer] for k, p in done.shares.items()))


# SLoRA


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


def test_slora_clients_share_a_mask_of_its_density_and_leave_all_else() -> None:
    fed = Federation("slora", {"density": 0.1, "sparse_rounds": 3})
    first = fed.server.adapter
    for _ in range(2):
        done = fed.round()
        for adapter in (fed.server.adapter, *done.trained.values()):
            change = effective(adapter, BaseDelta())
            for layer, (rows, columns) in SHAPES.items():
                places = adapter[name_index(layer)]
                assert torch.equal(places, first[name_index(layer)])
                assert len(set(places.tolist())) == round(0.1 * rows * columns)
                free = torch.ones(rows * columns, dtype=torch.bool)
                free[places] = False
                assert not change[layer].reshape(-1)[free].any()
                assert change[layer].any()


def test_slora_continues_by_an_svd_on_the_base_as_it_was() -> None:
    fed = Federation("slora", {"density": 0.1, "sparse_rounds": 2}, ranks=mixed_ranks())
    fed.round()
    done = fed.round()
    assert fed.server.base.version == -1
    assert not any(is_values(n) or is_index(n) for n in fed.server.adapter)
    assert fed.server.rebase(done.updates[0], done.jobs[0]) is None  # of a stage that is over
    change = {m: ideal_mean(done, m).numpy() for m in SHAPES}
    for job in fed.jobs(CLIENTS):
        for layer, matrix in change.items():
            u, s, vh = np.linalg.svd(matrix, full_matrices=False)
            rank, own = min(fed.ranks.of(job.cid), len(s)), job.payload.adapter
            best = torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])
            found = path_product(own, layer)
            assert_same({layer: found}, {layer: best})
            lost = float((torch.from_numpy(matrix) - found).square().sum())
            assert lost == pytest.approx(float(np.sum(s[rank:] ** 2)), rel=1e-9, abs=1e-12)
            a, sizes = own[name_a(layer)][:rank], own[name_b(layer)][:, :rank].norm(dim=0)
            assert_same({layer: a @ a.T}, {layer: torch.eye(rank, dtype=a.dtype)})
            assert_same({layer: SCALING * sizes}, {layer: torch.from_numpy(s[:rank])})


def test_slora_goes_on_as_fedit() -> None:
    fed, fit = Federation("slora", {"sparse_rounds": 2}).run(2), Federation("fedit")
    fit.server.adapter, fit.server.version = fed.server.adapter, fed.server.version
    assert fed.server.adapter.digest() == fit.run(2).fork().rounds[0].before.adapter.digest()
    assert fed.run(2).server.adapter.digest() == fit.server.adapter.digest()


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


def test_ilora_control_is_the_mean_of_the_clients_under_full_participation() -> None:
    fed = Federation("ilora").run(rounds=3)
    server: Any = fed.server
    for name, control in server.control.items():
        own = [fed.store.get(cid)[note("control", name)] for cid in CLIENTS]
        assert_same({name: control}, {name: torch.stack(own).mean(dim=0)})
        assert control.any()


def test_ilora_clients_of_every_rank_begin_at_the_weights_of_the_base() -> None:
    fed = Federation("ilora", ranks=mixed_ranks())
    for job in fed.jobs(CLIENTS):
        start = fed.client.start(job)
        assert_same(
            {m: effective(start, job.payload.base)[m] for m in SHAPES},
            {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()},
        )
        assert all(float(path_product(start, m).norm()) > 1.0 for m in SHAPES)


def test_ilora_loses_nothing_of_the_mean_product_where_the_rank_suffices() -> None:
    fed = Federation("ilora", ranks=mixed_ranks())
    small = sorted(CLIENTS, key=fed.ranks.of)[:2]  # ranks 2 and 4 fit into 16
    for _ in range(2):
        done = fed.round(small)
        for layer in SHAPES:
            wanted = sum(p * path_product(done.trained[k], layer) for k, p in done.shares.items())
            found = path_product(fed.server.adapter, layer)
            assert_same({layer: found}, {layer: torch.as_tensor(wanted)})


@pytest.mark.parametrize("split", ["svd", "qr"])
def test_ilora_by_svd_loses_the_tail_and_by_qr_more(split: str) -> None:
    fed = Federation("ilora", {"split": split})
    for _ in range(2):
        done = fed.round()
        for layer in SHAPES:
            wanted = torch.as_tensor(
                sum(p * path_product(done.trained[k], layer) for k, p in done.shares.items())
            )
            lost = float((wanted - path_product(fed.server.adapter, layer)).square().sum())
            least = tail(wanted, RANK)
            assert least > 1e-3
            assert lost == pytest.approx(least) if split == "svd" else lost > 1.01 * least


def test_ilora_shift_and_base_are_those_of_the_start_for_the_whole_run() -> None:
    fed = Federation("ilora", ranks=mixed_ranks())
    first = {j.cid: j.payload.adapter for j in fed.jobs(CLIENTS)}
    for _ in range(3):
        done = fed.round()
        assert fed.server.base.version == -1
        for cid, adapter in done.trained.items():
            for layer in SHAPES:
                shift = in_slot(layer, "shift")
                assert adapter.scaling[shift] == -SCALING
                for name in (name_a(shift), name_b(shift)):
                    assert torch.equal(adapter[name], first[cid][name])
        assert not any(":shift" in n for u in done.updates for n in u.adapter)


# FedMomentum


@pytest.mark.parametrize("energy", [0.6, 0.9, 0.95, 1.0])
def test_fedmomentum_keeps_the_leading_part_that_holds_its_energy(energy: float) -> None:
    fed = Federation("fedmomentum", {"energy": energy})
    done = fed.round()
    for layer in SHAPES:
        u, s, vh = np.linalg.svd(ideal_mean(done, layer).numpy(), full_matrices=False)
        held = np.cumsum(s**2) / np.sum(s**2)
        count = max(RANK, 1 + int(np.sum(held < energy - 1e-12)))
        wanted = torch.from_numpy((u[:, :count] * s[:count]) @ vh[:count])
        view = fed.global_view()[layer]
        assert_same({layer: view}, {layer: wanted})
        lost = float((ideal_mean(done, layer) - view).square().sum())
        assert lost <= (1 - energy) * float(np.sum(s**2)) + 1e-12
        roots = torch.from_numpy(np.sqrt(s[:RANK] / SCALING))
        b, a = fed.server.adapter[name_b(layer)], fed.server.adapter[name_a(layer)]
        assert_same({"b": b.norm(dim=0), "a": a.norm(dim=1)}, {"b": roots, "a": roots})


def test_fedmomentum_residual_is_orthogonal_to_the_factors_on_both_sides() -> None:
    fed = Federation("fedmomentum", {"energy": 1.0})
    fed.round()
    for layer in SHAPES:
        rest = fed.server.base.as_products()[layer].dense()
        assert float(rest.norm()) > 1e-2
        assert float((rest.T @ fed.server.adapter[name_b(layer)]).norm()) < 1e-9
        assert float((rest @ fed.server.adapter[name_a(layer)].T).norm()) < 1e-9


def test_fedmomentum_pads_where_the_mean_has_less_than_the_rank() -> None:
    fed = Federation("fedmomentum", ranks=mixed_ranks())
    small = min(CLIENTS, key=fed.ranks.of)
    done = fed.round([small])
    assert fed.server.base.version == -1
    for layer in SHAPES:
        assert fed.server.adapter.rank_of(layer) == fed.ranks.largest
        assert float(fed.server.adapter[name_b(layer)][:, fed.ranks.of(small) :].norm()) < 1e-9
        assert_same({layer: fed.global_view()[layer]}, {layer: ideal_mean(done, layer)})


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
    shrunk = []
    for _ in range(4):
        done = fed.round()
        for job, update in zip(done.jobs, done.updates, strict=True):
            before, after = job.payload.adapter, done.trained[job.cid]
            keep = min(before.rank, max(2, before.rank // 2))
            sizes = [
                sum(x[name_a(m)][keep:].norm() * x[name_b(m)][:, keep:].norm() for m in SHAPES)
                for x in (before, after)
            ]
            shrunk.append(bool(sizes[1] < sizes[0]))
            assert update.adapter.rank == (keep if shrunk[-1] else before.rank)
            seen[update.cid].append(update.adapter.rank)
    assert set(shrunk) == {True, False}
    for cid, ranks in seen.items():
        assert ranks == sorted(ranks, reverse=True)
        assert min(ranks) >= 2
        assert fed.jobs([cid])[0].payload.adapter.rank == ranks[-1]
    assert any(ranks[-1] < fed.ranks.of(cid) for cid, ranks in seen.items())


def test_hetlora_padding_leaves_the_product_of_a_small_client_as_it_is() -> None:
    fed = Federation("hetlora", {"gamma": 1.0}, ranks=mixed_ranks()).run(rounds=1)
    small, large = min(CLIENTS, key=fed.ranks.of), max(CLIENTS, key=fed.ranks.of)
    done = fed.train((small, large))
    own, other = done.updates
    assert float(path_product(fed.server.adapter, "h.0.c_attn").norm()) > 1e-2
    fed.server.apply([Part(1.0, own), Part(0.0, other)])
    received = fed.jobs([small])[0].payload.adapter
    for layer in SHAPES:
        assert_same(
            {layer: path_product(fed.server.adapter, layer)},
            {layer: path_product(own.adapter, layer)},
        )
        for name in (name_a(layer), name_b(layer)):
            assert torch.equal(received[name], own.adapter[name])


def test_hetlora_averages_both_factors_by_norms_that_sum_to_one() -> None:
    fed = Federation("hetlora", {"gamma": 1.0, "strength": 0.0}).run(rounds=1)
    done = fed.round()
    sizes = [
        np.sqrt(sum(np.linalg.norm(path_product(done.trained[c], m).numpy()) ** 2 for m in SHAPES))
        for c in CLIENTS
    ]
    shares = np.array(sizes) / np.sum(sizes)
    assert float(np.abs(shares - np.array([0.4, 0.3, 0.2, 0.1])).max()) > 1e-2  # not by samples
    for name in fed.server.adapter:
        wanted = sum(w * done.trained[c][name] for c, w in zip(CLIENTS, shares, strict=True))
        assert_same({name: fed.server.adapter[name]}, {name: torch.as_tensor(wanted)})


def test_hetlora_of_different_clients_of_one_norm_is_fedit_with_uniform_weights() -> None:
    het = Federation("hetlora", {"gamma": 1.0, "strength": 0.0})
    fit = Federation("fedit", {"weights": "uniform"})
    even = []
    for update in het.train(CLIENTS).updates:
        size = measure.adapter_norm(update.adapter.body)
        leveled = {n: update.adapter[n] / size for n in map(name_b, SHAPES)}
        even.append(replace(update, adapter=update.adapter.overlaid(leveled)))
    for fed in (het, fit):
        fed.server.apply([Part(fed.server.weight(u), u) for u in even])
    assert_same(dict(het.server.adapter.tensors), dict(fit.server.adapter.tensors))


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


@pytest.mark.parametrize("reshuffle", [False, True])
def test_cyclic_records_the_order_it_walks(reshuffle: bool) -> None:
    fed = Federation("cyclic", {"reshuffle": reshuffle})
    server: Any = fed.server
    for _ in range(3):
        walked = [fed.round(fed.sampled(1)).jobs[0].cid for _ in CLIENTS]
        assert walked == list(server.order)


class OneTask(FakeEngine):
    """Training of which every client has the same data."""

    def _loss(self, request: FitRequest, live: Mapping[str, Tensor], step: int) -> Tensor:
        return super()._loss(replace(request, job=replace(request.job, cid=0)), live, step)


def test_a_cycle_over_clients_of_one_task_is_one_pass_of_central_training() -> None:
    fed = Federation("cyclic", engine=OneTask("quadratic"), learning_rate=1e-2)
    (job,) = fed.fork().jobs([0])
    central = OneTask("quadratic")
    run_jobs([replace(job, steps=fed.steps * len(CLIENTS))], BaseClient(), central)
    fed.run(rounds=len(CLIENTS))
    assert_same(dict(fed.server.adapter.tensors), dict(central.trained[0].tensors))
