"""Adapters of every kind leave as PEFT, merged, or in our own layout, with a merged base too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from engine_world import World, make_world
from test_engine_kinds import KINDS, drawn, dual, experts, logits, written
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedllm.adapters import (
    Adapter,
    BaseDelta,
    Product,
    initial,
    layer_of,
    name_a,
    name_b,
    name_core,
    name_gain,
    name_index,
    name_values,
)
from fedllm.adapters.native_format import load_native, save_native
from fedllm.adapters.peft_format import folded, load_peft, save_peft
from fedllm.engine.attach import attach
from fedllm.errors import ModelError
from fedllm.results import merge_into

PLAIN = ("dual", "cores", "sparse")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def world(tiny_model: Callable[[str], Path]) -> World:
    return make_world(tiny_model("llama"), targets=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def transposed(tiny_model: Callable[[str], Path]) -> World:
    return make_world(tiny_model("gpt2"), targets=["c_attn"])


def base_of(world: World) -> BaseDelta:
    """Merge an increment into every layer, and one that becomes dense into the first."""
    layers = list(world.resident.shapes)
    base = BaseDelta()
    for version, names in ((1, layers), (2, layers[:1])):
        rank = 3 if version == 1 else 40
        parts = {}
        for layer in names:
            rows, columns = world.resident.shapes[layer]
            parts[layer] = Product(
                drawn((rows, rank), version, layer, "b"), drawn((rank, columns), version, layer)
            )
        base = base.merged(version, parts)
    assert base.dense
    assert base.products
    return base


def dense_change(adapter: Adapter, base: BaseDelta, layer: str) -> Tensor:
    """Return all that is added to a layer, written out."""
    total = torch.zeros(())
    for path in adapter.modules:
        if layer_of(path) != layer or name_a(path) not in adapter:
            continue
        b = adapter[name_b(path)]
        if name_core(path) in adapter:
            b = b @ adapter[name_core(path)]
        if name_gain(path) in adapter:
            b = b * adapter[name_gain(path)]
        total = total + adapter.scaling[path] * (b @ adapter[name_a(path)])
    if name_values(layer) in adapter:
        shape = adapter.shapes[layer]
        flat = torch.zeros(shape[0] * shape[1])
        flat[adapter[name_index(layer)].long()] = adapter[name_values(layer)]
        total = total + flat.view(shape)
    if layer in base.products:
        total = total + base.products[layer].b @ base.products[layer].a
    return total + base.dense.get(layer, torch.zeros(()))


def by_hand(world: World, adapter: Adapter, base: BaseDelta) -> nn.Module:
    """Return the model with everything added to its weights."""
    model = world.fresh_model().eval()
    with torch.no_grad():
        for layer in dict.fromkeys((*adapter.layers, *base.as_products())):
            module = model.get_submodule(layer)
            change = dense_change(adapter, base, layer)
            module.weight += change.T if isinstance(module, Conv1D) else change
    return model


def as_peft(world: World, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(world.fresh_model(), folder).eval()


def saved(adapter: Adapter, folder: Path, base: BaseDelta, world: World) -> None:
    conv1d = [n for n, m in world.fresh_model().named_modules() if isinstance(m, Conv1D)]
    words = {"base_model": "x", "task_type": "CAUSAL_LM", "conv1d_modules": conv1d}
    save_peft(adapter, folder, base=base, **words)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_merged_base_goes_along_with_every_kind(world: World, kind: str, tmp_path: Path) -> None:
    adapter, base = KINDS[kind](world, 4), base_of(world)
    wanted = logits(by_hand(world, adapter, base))
    saved(adapter, tmp_path / "a", base, world)
    torch.testing.assert_close(logits(as_peft(world, tmp_path / "a")), wanted, **CLOSE)
    merged = world.fresh_model().eval()
    merge_into(merged, adapter, base)
    torch.testing.assert_close(logits(merged), wanted, **CLOSE)
    alone = logits(by_hand(world, adapter, BaseDelta()))
    assert not torch.allclose(alone, wanted, atol=1e-2)


@pytest.mark.parametrize("kind", ["dual", "cores", "sparse"])
@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_weight_that_is_stored_transposed_is_no_exception(
    transposed: World, kind: str, tmp_path: Path
) -> None:
    adapter, base = KINDS[kind](transposed, 4), base_of(transposed)
    wanted = logits(by_hand(transposed, adapter, base))
    saved(adapter, tmp_path / "a", base, transposed)
    torch.testing.assert_close(logits(as_peft(transposed, tmp_path / "a")), wanted, **CLOSE)
    merged = transposed.fresh_model().eval()
    merge_into(merged, adapter, base)
    torch.testing.assert_close(logits(merged), wanted, **CLOSE)


@pytest.mark.parametrize("kind", [*PLAIN, "experts"])
def test_what_is_attached_has_the_merged_base_in_it(
    world: World, kind: str, tmp_path: Path
) -> None:
    adapter, base = KINDS[kind](world, 4), base_of(world)
    words = {"base_model": "x", "task_type": "CAUSAL_LM"}
    if kind == "sparse":
        # only adapters that are no LoRA take this layout, and a sparse change is one
        saved(adapter, tmp_path / "a", base, world)
        wanted = logits(by_hand(world, adapter, base))
    elif kind == "experts":
        save_native(adapter, tmp_path / "a", base=base, **words)
        inside = written(world, adapter)[0]
        with torch.no_grad():
            for layer in base.as_products():
                change = dense_change(Adapter({}), base, layer)
                inside.get_submodule(layer).base.weight += change
        wanted = logits(inside)
    else:
        save_native(adapter, tmp_path / "a", base=base, **words)
        wanted = logits(by_hand(world, adapter, base))
    attached = attach(world.fresh_model().eval(), tmp_path / "a")
    torch.testing.assert_close(logits(attached), wanted, **CLOSE)


@pytest.mark.parametrize("shares", [{"": 0.25, "local": 0.75}, {"": 1.0, "local": 0.0}])
def test_a_constant_mix_is_part_of_the_file(
    world: World, shares: dict[str, float], tmp_path: Path
) -> None:
    adapter = dual(world, 4)
    save_native(adapter, tmp_path / "a", base_model="x", task_type="CAUSAL_LM", mix=shares)
    scaling = {
        path: scaling * shares["local" if path.endswith(":local") else ""]
        for path, scaling in adapter.scaling.items()
    }
    assert load_native(tmp_path / "a").scaling == pytest.approx(scaling)
    wanted = logits(by_hand(world, replace(adapter, scaling=scaling), BaseDelta()))
    attached = attach(world.fresh_model().eval(), tmp_path / "a")
    torch.testing.assert_close(logits(attached), wanted, **CLOSE)
    told = json.loads((tmp_path / "a" / "fedllm_adapter.json").read_text())
    assert told["mix"] == shares


def test_paths_become_one_whose_rank_is_their_sum_or_that_of_the_layer(world: World) -> None:
    adapter = dual(world, 4)
    whole = folded(adapter, BaseDelta())
    assert set(whole.modules) == set(world.resident.shapes)
    for layer, shape in world.resident.shapes.items():
        assert whole.rank_of(layer) == 4 + 2
        assert whole.scaling[layer] == 1.0
        torch.testing.assert_close(
            whole.product(layer).dense(), dense_change(adapter, BaseDelta(), layer)
        )
        assert min(shape) > 6
    wide = folded(adapter, base_of(world))
    first = next(iter(world.resident.shapes))
    assert wide.rank_of(first) == min(world.resident.shapes[first])


def test_a_path_that_does_nothing_takes_no_rank(world: World) -> None:
    adapter = dual(world, 4)
    zeros = {n: torch.zeros_like(t) for n, t in adapter.tensors.items() if n.endswith("lora_B")}
    layer = next(iter(world.resident.shapes))
    half = adapter.overlaid({name_b(f"{layer}:local"): zeros[name_b(f"{layer}:local")]})
    assert folded(half, BaseDelta()).rank_of(layer) == 4
    # where nothing does anything, a layer still needs a rank
    none = folded(adapter.overlaid(zeros), BaseDelta())
    assert none.rank_of(layer) > 0
    assert float(none.product(layer).dense().norm()) == 0


def test_a_plain_path_keeps_its_factors_beside_folded_ones(world: World, tmp_path: Path) -> None:
    shapes = world.resident.shapes
    first, *_ = shapes
    plain = initial(shapes, 4, 0.7, 1)
    extra = initial({first: shapes[first]}, 2, 2.5, 2).moved("local")
    adapter = plain.joined(extra)
    adapter = adapter.overlaid({n: drawn(tuple(t.shape), n) for n, t in adapter.tensors.items()})
    saved(adapter, tmp_path / "a", BaseDelta(), world)
    back = load_peft(tmp_path / "a")
    for layer in shapes:
        if layer == first:
            assert back.rank_of(layer) == 6
            continue
        assert torch.equal(back[name_a(layer)], adapter[name_a(layer)])
        assert back.scaling[layer] == pytest.approx(0.7)


def test_a_router_is_refused_by_every_way_that_cannot_hold_it(world: World, tmp_path: Path) -> None:
    adapter = experts(world, 4)
    remedy = r"fedllm's own layout, see `fedllm\.attach`"
    with pytest.raises(ModelError, match=remedy):
        saved(adapter, tmp_path / "a", BaseDelta(), world)
    with pytest.raises(ModelError, match=remedy):
        merge_into(world.fresh_model(), adapter)
    assert not (tmp_path / "a").exists()


def test_an_adapter_in_the_other_layout_is_named_as_that(world: World, tmp_path: Path) -> None:
    saved(dual(world, 1), tmp_path / "peft", BaseDelta(), world)
    with pytest.raises(ModelError, match=r"adapter_config\.json is read by PEFT"):
        load_native(tmp_path / "peft")
    save_native(dual(world, 1), tmp_path / "own", base_model="x", task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match=r"adapter_config\.json.* is missing"):
        load_peft(tmp_path / "own")
