"""What the specification says of FedIT, FlexLoRA and FedSA-LoRA; settings of all algorithms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conformance.sanitiser import digest
from conformance.world import (
    CLIENTS,
    HEAD,
    RANK,
    SCALING,
    SHAPES,
    FakeEngine,
    Federation,
    assert_same,
    effective,
    mixed_ranks,
    run_jobs,
    start_adapter,
)

from fedllm.adapters import is_a, name_a, name_b
from fedllm.algorithms import make, problems
from fedllm.errors import ConfigError
from fedllm.federation import BaseClient, Payload

# FedIT


def test_fedit_misses_the_ideal_by_the_known_cross_term() -> None:
    fed = Federation("fedit").run(rounds=2)
    done = fed.round()
    view, ideal = fed.global_view(), done.ideal()
    for module in SHAPES:
        a, b = name_a(module), name_b(module)
        mean = fed.server.adapter
        cross = torch.stack(
            [
                p * (done.trained[cid][b] - mean[b]) @ (done.trained[cid][a] - mean[a])
                for cid, p in done.shares.items()
            ]
        ).sum(dim=0)
        assert float(cross.norm()) > 1e-2
        assert_same({module: view[module] - ideal[module]}, {module: -SCALING * cross})


def test_fedit_is_exact_where_all_clients_hold_the_same_a() -> None:
    fed = Federation("fedit").run(rounds=2)
    done = fed.train(CLIENTS)
    common = {n: t for n, t in done.trained[2].tensors.items() if is_a(n)}
    done = replace(
        done,
        updates=[replace(u, adapter=u.adapter.overlaid(common)) for u in done.updates],
        trained={cid: adapter.overlaid(common) for cid, adapter in done.trained.items()},
    )
    fed.finish(done)
    view = fed.global_view()
    assert_same({m: view[m] for m in SHAPES}, done.ideal())


def test_fedit_averages_each_factor_by_samples() -> None:
    fed = Federation("fedit")
    done = fed.round()
    for name, tensor in fed.server.adapter.tensors.items():
        clients = [0.4, 0.3, 0.2, 0.1]
        wanted = sum(p * done.trained[cid][name] for cid, p in enumerate(clients))
        assert_same({name: tensor}, {name: torch.as_tensor(wanted)})


# FlexLoRA


def test_flexlora_reaches_the_least_possible_error() -> None:
    fed = Federation("flexlora")
    for _ in range(3):
        done = fed.round()
        view, ideal = fed.global_view(), done.ideal()
        for module in SHAPES:
            lost = float((view[module] - ideal[module]).square().sum())
            tail = np.linalg.svd(ideal[module].numpy(), compute_uv=False)[RANK:]
            assert lost == pytest.approx(float((tail**2).sum()), rel=1e-9)
            assert lost > 1e-3


def test_flexlora_puts_the_spectrum_into_b_and_keeps_a_orthonormal() -> None:
    fed = Federation("flexlora")
    done = fed.round()
    for module, ideal in done.ideal().items():
        a, b = fed.server.adapter[name_a(module)], fed.server.adapter[name_b(module)]
        assert_same({module: a @ a.T}, {module: torch.eye(RANK, dtype=a.dtype)})
        spectrum = np.linalg.svd(ideal.numpy(), compute_uv=False)[:RANK]
        assert np.allclose(SCALING * b.norm(dim=0).numpy(), spectrum, atol=1e-9)


def test_flexlora_loses_nothing_where_the_rank_suffices() -> None:
    fed = Federation("flexlora", ranks=mixed_ranks())
    small = sorted(CLIENTS, key=fed.ranks.of)[:2]  # ranks 2 and 4 fit into 16
    for _ in range(3):
        done = fed.round(small)
        view = fed.global_view()
        assert_same({m: view[m] for m in SHAPES}, done.ideal())


def test_flexlora_sends_the_leading_part_to_a_client_of_smaller_rank() -> None:
    fed = Federation("flexlora", ranks=mixed_ranks())
    done = fed.round()
    received = {fed.ranks.of(j.cid): j.payload.adapter for j in fed.jobs(CLIENTS)}
    for module, ideal in done.ideal().items():
        u, s, vh = np.linalg.svd(ideal.numpy(), full_matrices=False)
        for rank, adapter in received.items():
            assert torch.equal(adapter[name_a(module)], received[16][name_a(module)][:rank])
            assert torch.equal(adapter[name_b(module)], received[16][name_b(module)][:, :rank])
            best = torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])
            assert_same({module: adapter.product(module).dense()}, {module: best})


# FedSA-LoRA


def test_fedsa_lora_sends_a_and_nothing_else() -> None:
    fed = Federation("fedsa-lora")
    for _ in range(3):
        done = fed.round()
        for update in done.updates:
            assert set(update.adapter) == {name_a(m) for m in SHAPES}
            assert set(update.state) == {*(name_b(m) for m in SHAPES), HEAD}


def test_fedsa_lora_clients_share_a_and_own_their_b() -> None:
    fed = Federation("fedsa-lora").run(rounds=3)
    starts = [fed.client.start(job) for job in fed.jobs(CLIENTS)]
    for module in SHAPES:
        assert len({digest(s[name_a(module)]) for s in starts}) == 1
        assert len({digest(s[name_b(module)]) for s in starts}) == len(CLIENTS)


def test_fedsa_lora_shows_an_unseen_client_the_model_unchanged() -> None:
    fed = Federation("fedsa-lora")
    fed.round((0, 1))
    fed.round((1, 2))
    for view in (fed.global_view(), fed.client_view(3)):
        assert all(not view[module].any() for module in SHAPES)
    assert all(fed.client_view(1)[module].any() for module in SHAPES)


def test_fedsa_lora_with_one_client_is_local_training() -> None:
    fed = Federation("fedsa-lora", engine=FakeEngine("quadratic"), learning_rate=1e-2)
    local = start_adapter(RANK, torch.float64)
    engine = FakeEngine("quadratic")
    for _ in range(3):
        (job,) = fed.round([2]).jobs
        alone = replace(job, payload=Payload(0, local), state={})
        run_jobs([alone], BaseClient(), engine)
        local = engine.trained[2]
        assert_same(fed.client_view(2), effective(local, job.payload.base))


def test_fedsa_lora_averages_a_row_over_the_clients_that_own_it() -> None:
    fed = Federation("fedsa-lora", ranks=mixed_ranks())
    done = fed.round()
    for module in SHAPES:
        for row in range(fed.ranks.largest):
            owners = [cid for cid in CLIENTS if fed.ranks.of(cid) > row]
            total = sum(done.shares[cid] for cid in owners)
            wanted = sum(
                done.shares[cid] / total * done.trained[cid][name_a(module)][row] for cid in owners
            )
            got = fed.server.adapter[name_a(module)][row]
            assert_same({module: got}, {module: torch.as_tensor(wanted)})


# settings


@pytest.mark.parametrize(
    ("name", "settings", "part"),
    [
        ("flexlroa", {}, "Did you mean 'flexlora'?"),
        (
            "fedit",
            {"weigths": "uniform"},
            "algorithm.weigths: unknown key. Did you mean 'weights'?",
        ),
        ("fedit", {"version": 3}, "algorithm.version: unknown key"),
        ("fedit", {"weights": "size"}, "algorithm.weights: "),
        ("rolora", {"flip_every": "2"}, "algorithm.flip_every: "),
    ],
)
def test_a_wrong_name_or_setting_is_told_before_anything_is_made(
    name: str, settings: dict[str, Any], part: str
) -> None:
    (told,) = problems(name, settings)
    assert part in told
    with pytest.raises(ConfigError):
        make(name, settings)


def test_settings_arrive_at_the_server_and_the_head_at_the_client() -> None:
    server, client = make("rolora", {"flip_every": 3, "weights": "uniform"}, "local")
    assert (getattr(server, "flip_every", None), server.weights) == (3, "uniform")
    assert client.head == "local"


def test_all_settings_are_checked_at_once() -> None:
    assert len(problems("rolora", {"flip": 1, "weights": "none"}, mixed_rank=True)) == 2
    assert len(problems("fedit", {"flip": 1}, mixed_rank=True)) == 2


@pytest.mark.parametrize("flip_every", [0, -1])
def test_a_half_lasts_at_least_one_version(flip_every: int) -> None:
    (told,) = problems("rolora", {"flip_every": flip_every})
    assert told.startswith("algorithm.flip_every:")
