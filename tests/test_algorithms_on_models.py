"""Methods with several paths, routers and passes, trained on a tiny model by the real engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_world import World, make_world

from fedllm.adapters import Adapter, BaseDelta, Routing, in_slot, is_head, is_router, slot_of
from fedllm.algorithms import make
from fedllm.config import TrainingConfig
from fedllm.engine.routing import Router, one_hot
from fedllm.executors import InlineExecutor
from fedllm.federation import LOCAL, BaseServer, ClientId, Part, View
from fedllm.system import RankRule

RANK, SCALING = 4, 1.5


@pytest.fixture
def world(tiny_model: Callable[[str], Path]) -> World:
    training = TrainingConfig(batch_size=4, learning_rate=5e-3, max_grad_norm=0.0)
    return make_world(tiny_model("llama"), training=training)


def played(
    world: World, name: str, settings: dict[str, Any], rounds: int = 3
) -> tuple[BaseServer, dict[ClientId, Any]]:
    """Train an algorithm for some rounds with everyone; return server and private states."""
    server, client = make(name, settings)
    start = world.resident.initial_adapter(RANK, SCALING, 3)
    server.start(start, RankRule((RANK,)), num_clients=4, rounds=rounds, seed=5)
    states: dict[ClientId, Any] = {}
    executor = InlineExecutor(world.engine, client)
    for version in range(rounds):
        jobs = [
            replace(
                job,
                seed=1000 * version + job.cid,
                steps=2,
                learning_rate=5e-3,
                num_samples=len(world.engine.partition.train(job.cid)),
                state=states.get(job.cid, {}),
            )
            for job in server.local_run(range(4))
        ]
        server.contacts |= dict.fromkeys(range(4), version)
        updates = executor.run(jobs)
        states |= {update.cid: update.state for update in updates}
        server.apply([Part(server.weight(update), update) for update in updates])
    return server, states


def losses(world: World, adapter: Adapter, mix: dict[str, float] | None = None) -> np.ndarray:
    """Return the loss of each row under an adapter, slots weighed alike for all rows."""
    rows = np.arange(len(world.engine.tokens))
    weights = {slot: np.full(len(rows), weight) for slot, weight in (mix or {}).items()}
    view = View(adapter, BaseDelta(), rows, mix=weights)
    return world.engine.score([view], world.engine.tokens).loss_sum


def test_a_weight_of_nothing_is_the_global_model_and_of_one_the_local(world: World) -> None:
    server, states = played(world, "feddpa-t", {})
    both = server.view(1, states[1]).adapter
    common, local = both.moved(""), both.moved("", of=LOCAL)
    answers = {
        0.0: losses(world, both, {"": 1.0, LOCAL: 0.0}),
        1.0: losses(world, both, {"": 0.0, LOCAL: 1.0}),
    }
    assert np.allclose(answers[0.0], losses(world, common), atol=1e-4)
    assert np.allclose(answers[1.0], losses(world, local), atol=1e-4)
    assert not np.allclose(answers[0.0], answers[1.0], atol=1e-2)
    base, _ = played(world, "fedit", {})
    assert np.allclose(answers[0.0], losses(world, base.view().adapter), atol=1e-4)


@pytest.mark.parametrize("name", ["feddpa-f", "pfedlora", "ditto", "fedalt", "fine-tune"])
def test_training_on_a_model_moves_what_each_client_keeps(world: World, name: str) -> None:
    server, states = played(world, name, {})
    for cid in range(4):
        start = server.download(cid).adapter
        for tensor_name, tensor in states[cid].items():
            assert tensor.isfinite().all()
            assert not torch.equal(tensor, start[tensor_name]), tensor_name


def test_a_router_of_fedalt_shares_out_exactly_one(world: World) -> None:
    # with the same adapter on both paths, any shares that sum to 1 give the plain model
    server, states = played(world, "fedalt", {})
    own = server.view(2, states[2]).adapter
    paths = own.body.moved("").select(lambda name: not is_router(name))
    twice = own.overlaid(paths.moved("rest").tensors)
    assert twice.routing == Routing(("rest", ""), top=2)
    single = replace(paths, routing=None)
    assert np.allclose(losses(world, twice), losses(world, single), atol=1e-4)
    assert not np.allclose(losses(world, own), losses(world, single), atol=1e-3)


def test_a_pulled_model_stays_nearer_to_the_download(world: World) -> None:
    gaps = []
    for strength in (0.0, 50.0):
        _, states = played(world, "ditto", {"strength": strength}, rounds=1)
        start = world.resident.initial_adapter(RANK, SCALING, 3)
        moved = [states[0][in_slot(n, "personal")] - start[n] for n in start]
        gaps.append(float(torch.cat([t.flatten() for t in moved]).norm()))
    assert 0 < gaps[1] < 0.9 * gaps[0]


@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_the_kept_outputs_of_fedlease_share_out_exactly_one(world: World, clusters: int) -> None:
    server, states = played(world, "fedlease", {"warmup_rounds": 1, "clusters": clusters})
    own = server.view(0, states[0]).adapter
    first = own.body.moved("", of="expert0").select(lambda name: not is_router(name))
    single = replace(first, routing=None)
    alike = own
    for cluster in range(clusters):
        alike = alike.overlaid(single.moved(f"expert{cluster}").tensors)
    assert np.allclose(losses(world, alike), losses(world, single), atol=1e-4)
    if clusters > 1:
        assert not np.allclose(losses(world, own), losses(world, single), atol=1e-3)


@pytest.mark.parametrize("clusters", [2, 3])
def test_whatever_the_router_says_the_own_expert_is_kept(world: World, clusters: int) -> None:
    server, states = played(world, "fedlease", {"warmup_rounds": 1, "clusters": clusters})
    for cid in range(4):
        view = server.view(cid, states[cid]).adapter
        assert view.routing is not None
        slots, paths = view.routing.slots, sorted(set(view.routing.slots))
        table = one_hot([slots], paths)
        router = Router(torch.empty(0), table, view.routing.top, torch.arange(len(paths)))
        stream = torch.Generator().manual_seed(cid)
        logits = torch.randn(200, len(slots), generator=stream)
        logits[:, [slot == slots[-1] for slot in slots]] -= 8.0  # far less than any other
        weights = router.columns_of(0, logits)
        assert torch.allclose(weights.sum(dim=1), torch.ones(200))
        assert bool((weights[:, paths.index(slots[-1])] > 0).all())
        assert bool((weights >= 0).all())


def test_penalties_of_hilora_reach_the_tiers(world: World) -> None:
    overlaps = []
    for strength in (0.0, 100.0):
        settings = {"root_rounds": 1, "cluster_rounds": 1, "min_clusters": 1, "max_clusters": 1}
        settings |= {"root_penalty": strength, "cluster_penalty": strength}
        server, states = played(world, "hilora", settings, rounds=3)
        view = server.view(0, states[0]).adapter
        layers = [name for name in view if slot_of(name) == "root" and name.endswith(".lora_B")]
        leaf = [view[in_slot(name, "root")].T @ view[in_slot(name, "leaf")] for name in layers]
        overlaps.append(sum(float(product.square().sum()) for product in leaf))
        assert not any(is_head(name) for name in view)
    assert 0 < overlaps[1] < 0.5 * overlaps[0]


def test_one_expert_of_fedlease_trains_as_fedit_does(world: World) -> None:
    one, _ = played(world, "fedlease", {"warmup_rounds": 1, "clusters": 1})
    base, _ = played(world, "fedit", {"weights": "uniform"})
    ours, theirs = (losses(world, server.view().adapter) for server in (one, base))
    start = losses(world, world.resident.initial_adapter(RANK, SCALING, 3))
    assert np.allclose(ours, theirs, atol=1e-3)
    assert not np.allclose(theirs, start, atol=1e-1)
