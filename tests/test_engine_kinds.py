"""Adapters of every kind in the engine, against the same arithmetic written out in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from engine_world import World, make_world, peft_loss
from torch import Tensor, nn

from fedllm.adapters import (
    Adapter,
    Routing,
    in_slot,
    initial,
    is_head,
    is_router,
    layer_of,
    name_a,
    name_b,
    name_core,
    name_gain,
    name_index,
    name_router,
    name_values,
    slot_of,
)
from fedllm.adapters.native_format import load_native, save_native
from fedllm.adapters.peft_format import save_peft
from fedllm.config import TrainingConfig
from fedllm.engine.attach import attach
from fedllm.errors import ModelError
from fedllm.federation import BaseClient, Job, View
from fedllm.results import merge_into
from fedllm.seeding import derive

RATE = 1e-2


def drawn(shape: tuple[int, ...], *seed: object) -> Tensor:
    """Random numbers that follow from the names."""
    stream = torch.Generator().manual_seed(derive(0, str(seed)))
    return torch.randn(shape, generator=stream) * 0.2


def experts(world: World, seed: int, *, top: int = 2) -> Adapter:
    """Three experts and a router with four outputs, the last two for the same expert."""
    whole = Adapter({}, {}, Routing(("e0", "e1", "e2", "e2"), top))
    for number in range(3):
        part = initial(world.resident.shapes, 3, 1.5 + number, seed + number)
        whole = whole.joined(replace(part.moved(f"e{number}"), routing=None))
    tensors = {n: drawn(tuple(t.shape), seed, n) for n, t in whole.tensors.items()}
    for layer, (_, columns) in world.resident.shapes.items():
        tensors[name_router(layer)] = drawn((4, columns), seed, layer)
    return replace(whole, tensors=tensors)


def dual(world: World, seed: int) -> Adapter:
    """A plain path and a local one of another rank and scaling."""
    plain = initial(world.resident.shapes, 4, 0.7, seed)
    local = initial(world.resident.shapes, 2, 2.5, seed + 1).moved("local")
    whole = plain.joined(local)
    return whole.overlaid({n: drawn(tuple(t.shape), seed, n) for n, t in whole.tensors.items()})


def cores(world: World, seed: int) -> Adapter:
    """Two heads with a matrix between their factors and a gain."""
    whole = Adapter({})
    for number in range(2):
        whole = whole.joined(
            initial(world.resident.shapes, 3, 1.0, seed + number).moved(f"h{number}")
        )
    tensors = {n: drawn(tuple(t.shape), seed, n) for n, t in whole.tensors.items()}
    for path in whole.modules:
        tensors[name_core(path)] = drawn((3, 3), seed, path, "core")
        tensors[name_gain(path)] = 1.0 + drawn((), seed, path, "gain")
    return replace(whole, tensors=tensors)


def sparse(world: World, seed: int) -> Adapter:
    """A few entries of every layer's weight."""
    tensors = {}
    for layer, (rows, columns) in world.resident.shapes.items():
        places = np.random.default_rng(5).choice(rows * columns, 20, replace=False)
        tensors[name_index(layer)] = torch.from_numpy(np.sort(places)).to(torch.int32)
        tensors[name_values(layer)] = drawn((20,), seed, layer)
    return Adapter(tensors, shapes=world.resident.shapes)


KINDS: dict[str, Callable[[World, int], Adapter]] = {
    "experts": experts,
    "dual": dual,
    "cores": cores,
    "sparse": sparse,
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


class Written(nn.Module):
    """A linear layer with an adapter, as the formula has it."""

    def __init__(self, base: nn.Linear, layer: str, adapter: Adapter, leaves: dict[str, Tensor]):
        super().__init__()
        self.base, self.layer, self.adapter, self.leaves = base, layer, adapter, leaves

    def forward(self, x: Tensor) -> Tensor:
        own, layer, y = self.leaves, self.layer, self.base(x)
        weights = None
        if name_router(layer) in own:
            routing = self.adapter.routing
            assert routing is not None
            share = torch.softmax(x @ own[name_router(layer)].T, dim=-1)
            smallest = share.topk(routing.top, dim=-1).values[..., -1:]
            share = torch.where(share >= smallest, share, torch.zeros(()))
            weights = share / share.sum(dim=-1, keepdim=True)
        for path in (p for p in self.adapter.modules if layer_of(p) == layer):
            inner = x @ own[name_a(path)].T
            if name_core(path) in own:
                inner = inner @ own[name_core(path)].T * own[name_gain(path)]
            z = self.adapter.scaling[path] * inner @ own[name_b(path)].T
            if weights is not None:
                assert self.adapter.routing is not None
                mine = [i for i, s in enumerate(self.adapter.routing.slots) if s == slot_of(path)]
                z = z * weights[..., mine].sum(dim=-1, keepdim=True)
            y = y + z
        if name_values(layer) in own:
            rows, columns = self.adapter.shapes[layer]
            change = torch.zeros(rows * columns)
            change = change.index_put((own[name_index(layer)].long(),), own[name_values(layer)])
            y = y + x @ change.view(rows, columns).T
        return y


def written(world: World, adapter: Adapter) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a fresh model with the adapter written out, and its leaves."""
    model = world.fresh_model().eval().requires_grad_(False)
    leaves = {
        n: t.clone().requires_grad_() if t.is_floating_point() else t
        for n, t in adapter.tensors.items()
    }
    for layer in world.resident.shapes:
        parent, _, last = layer.rpartition(".")
        base = model.get_submodule(layer)
        assert isinstance(base, nn.Linear)
        setattr(model.get_submodule(parent), last, Written(base, layer, adapter, leaves))
    return model, leaves


@pytest.fixture
def world(tiny_model: Callable[..., Path]) -> World:
    training = TrainingConfig(batch_size=64, optimizer="sgd", learning_rate=RATE, max_grad_norm=0.0)
    return make_world(tiny_model("llama"), training=training, sizes=(6, 3, 9, 4))


@each_kind
def test_loss_and_gradients_equal_the_formula_for_every_client_of_a_cohort(
    world: World, kind: str
) -> None:
    jobs = [world.job(cid, KINDS[kind](world, cid), steps=1) for cid in (0, 2, 3)]
    client = BaseClient()
    found = world.engine.train([world.engine.fit(j, j.payload.adapter, client) for j in jobs])
    for job, result in zip(jobs, found, strict=True):
        model, leaves = written(world, job.payload.adapter)
        rows = world.engine.partition.train(job.cid)
        loss = peft_loss(world, model, rows.tolist())
        assert result.metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        loss.backward()
        for name, leaf in leaves.items():
            if not leaf.is_floating_point():
                assert torch.equal(result.adapter[name], leaf)
                continue
            assert leaf.grad is not None
            wanted = leaf.detach() - RATE * leaf.grad
            assert float(leaf.grad.norm()) > 0, name
            moved = (result.adapter[name] - leaf.detach()).norm()
            error = (result.adapter[name] - wanted).norm()
            assert float(error) <= 2e-4 * float(moved) + 1e-7, name


@each_kind
def test_what_is_frozen_does_not_move(world: World, kind: str) -> None:
    class Frozen(BaseClient):
        def trainable(self, name: str, job: Job) -> bool:
            return is_router(name) or name_core("") in name or "local" in name or "values" in name

    job = world.job(1, experts(world, 1) if kind == "experts" else KINDS[kind](world, 1), steps=3)
    (result,) = world.engine.train([world.engine.fit(job, job.payload.adapter, Frozen())])
    for name, tensor in job.payload.adapter.tensors.items():
        same = torch.equal(result.adapter[name], tensor)
        assert same != Frozen().trainable(name, job), name


@each_kind
def test_the_gradient_over_a_shard_is_one_step_of_sgd(world: World, kind: str) -> None:
    job = world.job(2, KINDS[kind](world, 2), steps=1)
    client, start = BaseClient(), job.payload.adapter
    (stepped,) = world.engine.train([world.engine.fit(job, start, client)])
    (slope,) = world.engine.train([world.engine.gradient(job, start, client)])
    assert slope.num_steps == 0 or slope.num_steps == job.steps
    for name, tensor in start.tensors.items():
        if tensor.is_floating_point():
            wanted = tensor - RATE * slope.adapter[name]
            torch.testing.assert_close(stepped.adapter[name], wanted, atol=1e-6, rtol=1e-5)


@each_kind
def test_scores_of_views_equal_the_formula(world: World, kind: str) -> None:
    adapters = [KINDS[kind](world, seed) for seed in (7, 8)]
    tokens = world.engine.tokens
    rows = [np.arange(0, 5), np.arange(5, 12)]
    base = world.job(0, adapters[0], 0).payload.base
    views = [View(a, base, r) for a, r in zip(adapters, rows, strict=True)]
    scores = world.engine.score(views, tokens)
    for adapter, own in zip(adapters, rows, strict=True):
        model, _ = written(world, adapter)
        for row in own.tolist():
            with torch.no_grad():
                loss = float(peft_loss(world, model, [row]))
            mean = scores.loss_sum[row] / scores.count[row]
            assert mean == pytest.approx(loss, rel=1e-4)


def test_a_view_weighs_its_paths_row_by_row(world: World) -> None:
    adapter, tokens = dual(world, 3), world.engine.tokens
    base = world.job(0, adapter, 0).payload.base
    rows = np.arange(6)
    local = np.array([0.0, 1.0, 0.5, 0.25, 0.0, 1.0])
    view = View(adapter, base, rows, mix={"": 1.0 - local, "local": local})
    scores = world.engine.score([view], tokens)
    for row, share in zip(rows.tolist(), local.tolist(), strict=True):
        scaling = {
            p: s * (share if slot_of(p) == "local" else 1.0 - share)
            for p, s in adapter.scaling.items()
        }
        model, _ = written(world, replace(adapter, scaling=scaling))
        with torch.no_grad():
            loss = float(peft_loss(world, model, [row]))
        assert scores.loss_sum[row] / scores.count[row] == pytest.approx(loss, rel=1e-4)


def test_rows_like_the_clients_own_are_called_alike(world: World) -> None:
    adapter, tokens = dual(world, 3), world.engine.tokens
    base = world.job(0, adapter, 0).payload.base
    own = world.engine.partition.train(1)
    view = View(adapter, base, own)
    (alike,) = world.engine.similarity([view], [1], tokens, references=1, seed=0)
    assert alike.max() == pytest.approx(1.0, abs=1e-5)
    assert alike.min() >= -1.0 - 1e-6
    again = world.engine.similarity([view], [1], tokens, references=1, seed=0)[0]
    assert np.array_equal(alike, again)


@pytest.mark.parametrize("kind", ["experts", "dual", "cores"])
def test_an_exported_adapter_works_on_an_ordinary_model(
    world: World, kind: str, tmp_path: Path
) -> None:
    adapter = KINDS[kind](world, 4)
    save_native(adapter, tmp_path / "a", base_model="x", task_type="CAUSAL_LM")
    assert load_native(tmp_path / "a").routing == adapter.routing
    model = attach(world.fresh_model().eval(), tmp_path / "a")
    other, _ = written(world, adapter)
    ids = torch.arange(9, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, other(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )


def test_attaching_to_another_model_names_the_layer(world: World, tmp_path: Path) -> None:
    adapter = dual(world, 4)
    strange = Adapter(
        {in_slot(n, slot_of(n)).replace("q_proj", "z_proj"): t for n, t in adapter.tensors.items()},
        {p.replace("q_proj", "z_proj"): s for p, s in adapter.scaling.items()},
    )
    assert not any(is_head(n) for n in strange)
    with pytest.raises(ModelError, match="z_proj"):
        attach(world.fresh_model(), strange)


@pytest.mark.parametrize("folder", ["nothing", "later"])
def test_a_folder_that_is_no_adapter_says_so(world: World, tmp_path: Path, folder: str) -> None:
    save_native(dual(world, 1), tmp_path / "later", base_model="x", task_type="CAUSAL_LM")
    config = tmp_path / "later" / "fedllm_adapter.json"
    config.write_text(config.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ModelError, match="missing" if folder == "nothing" else "format 9"):
        load_native(tmp_path / folder)


def logits(model: nn.Module) -> Tensor:
    """Return a model's logits for a few tokens."""
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(9, 25)[None]).logits
    return found


@pytest.mark.parametrize("kind", ["dual", "cores", "sparse"])
@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_kind_that_is_a_lora_is_exported_as_peft_and_merged(
    world: World, kind: str, tmp_path: Path
) -> None:
    adapter = KINDS[kind](world, 4)
    wanted = logits(written(world, adapter)[0])
    save_peft(adapter, tmp_path / "a", base_model="x", task_type="CAUSAL_LM")
    loaded = peft.PeftModel.from_pretrained(world.fresh_model(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(loaded), wanted, atol=1e-4, rtol=1e-4)
    merged = world.fresh_model().eval()
    merge_into(merged, adapter)
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(world.fresh_model().eval()), wanted, atol=1e-2)


def test_a_routed_adapter_has_no_peft_layout_and_says_what_it_has(
    world: World, tmp_path: Path
) -> None:
    adapter = experts(world, 4)
    with pytest.raises(ModelError, match=r"router .*fedllm.attach"):
        save_peft(adapter, tmp_path / "a", base_model="x", task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match="cannot be merged"):
        merge_into(world.fresh_model(), adapter)
