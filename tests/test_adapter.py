"""Adapters as values: names, sizes, digests, and the start that all clients share."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters import (
    Adapter,
    fresh,
    initial,
    is_a,
    is_b,
    is_head,
    module_of,
    name_a,
    name_b,
)

SHAPES = {"model.q_proj": (20, 14), "model.v_proj": (14, 20)}
HEAD = "score.weight"
A, B = name_a("model.q_proj"), name_b("model.q_proj")

quick = settings(deadline=None, max_examples=25)


@pytest.fixture
def adapter() -> Adapter:
    draw = torch.Generator().manual_seed(1)
    start = initial(SHAPES, 4, 2.0, seed=3, heads={HEAD: torch.ones(3, 14)})
    return start.overlaid({B: torch.randn(20, 4, generator=draw)})


@quick
@given(st.from_regex(r"[a-z]+(\.[a-z0-9_]+){0,5}", fullmatch=True))
def test_names_tell_their_kind_and_their_module(module: str) -> None:
    assert module_of(name_a(module)) == module_of(name_b(module)) == module
    kinds = [(is_a(n), is_b(n), is_head(n)) for n in (name_a(module), name_b(module), module)]
    assert kinds == [(True, False, False), (False, True, False), (False, False, True)]


def test_an_adapter_behaves_as_a_mapping_of_its_tensors(adapter: Adapter) -> None:
    assert list(adapter) == list(adapter.tensors)
    assert len(adapter) == 5
    assert A in adapter
    assert "model.k_proj.lora_A" not in adapter
    assert adapter[A] is adapter.tensors[A]


def test_modules_heads_and_ranks_follow_from_the_tensors(adapter: Adapter) -> None:
    assert adapter.modules == tuple(SHAPES)
    assert adapter.heads == (HEAD,)
    assert adapter.rank == 4
    assert [adapter.select(which).rank_of("model.q_proj") for which in (is_a, is_b)] == [4, 4]
    assert adapter.select(is_a).modules == tuple(SHAPES)
    assert adapter.select(is_head).rank == 0
    assert Adapter({}).modules == ()


def test_the_rank_is_the_largest_of_all_modules(adapter: Adapter) -> None:
    wide = adapter.overlaid({A: torch.zeros(9, 14), B: torch.zeros(20, 9)})
    assert wide.rank == 9
    assert wide.rank_of("model.v_proj") == 4


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)]
)
def test_bytes_are_numbers_times_their_size(
    adapter: Adapter, dtype: torch.dtype, size: int
) -> None:
    cast = replace(adapter, tensors={n: t.to(dtype) for n, t in adapter.tensors.items()})
    assert cast.nbytes == size * (4 * (20 + 14) + 4 * (14 + 20) + 3 * 14)
    assert cast.select(is_head).nbytes == size * 42


def test_a_product_holds_the_scaling(adapter: Adapter) -> None:
    product = adapter.product("model.q_proj")
    assert torch.allclose(product.dense(), 2.0 * adapter[B] @ adapter[A])
    doubled = replace(adapter, scaling=dict.fromkeys(SHAPES, 4.0))
    assert torch.allclose(doubled.product("model.q_proj").dense(), 2.0 * product.dense())


def test_operations_return_new_adapters(adapter: Adapter) -> None:
    before, names = adapter.digest(), list(adapter)
    assert list(adapter.select(is_a)) == [n for n in names if is_a(n)]
    changed = adapter.overlaid({A: torch.zeros(4, 14), "extra.weight": torch.zeros(1)})
    assert float(changed[A].norm()) == 0.0
    assert "extra.weight" in changed
    assert changed.scaling == adapter.scaling
    assert (adapter.digest(), list(adapter)) == (before, names)
    with pytest.raises(FrozenInstanceError):
        adapter.tensors = {}  # type: ignore[misc]


def test_the_digest_tells_any_difference(adapter: Adapter) -> None:
    nudged = adapter[A].clone()
    nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(9.0))
    others = [
        adapter.overlaid({A: nudged}),
        adapter.overlaid({A: adapter[A].T.contiguous()}),
        adapter.overlaid({A: adapter[A].double()}),
        adapter.overlaid({"extra.weight": torch.zeros(1)}),
        adapter.select(lambda name: name != HEAD),
        replace(adapter, scaling={**adapter.scaling, "model.q_proj": 2.5}),
    ]
    digests = {adapter.digest(), *(other.digest() for other in others)}
    assert len(digests) == 1 + len(others)


def test_the_digest_does_not_depend_on_order_or_layout(adapter: Adapter) -> None:
    backwards = Adapter(
        dict(reversed(list(adapter.tensors.items()))),
        dict(reversed(list(adapter.scaling.items()))),
    )
    assert backwards.digest() == adapter.digest()
    column_major = adapter.overlaid({A: adapter[A].T.contiguous().T})
    assert not column_major[A].is_contiguous()
    assert column_major.digest() == adapter.digest()
    assert pickle.loads(pickle.dumps(adapter)).digest() == adapter.digest()


def test_the_digest_takes_a_tensor_without_dimensions(adapter: Adapter) -> None:
    one, two = (adapter.overlaid({"gate": torch.tensor(x)}) for x in (1.0, 2.0))
    assert one.digest() != two.digest()


# the common start


@quick
@given(st.integers(0, 2**40), st.integers(1, 16), st.integers(1, 16))
def test_a_smaller_rank_starts_with_the_leading_rows_of_a_larger(
    seed: int, one: int, two: int
) -> None:
    small, large = (initial(SHAPES, rank, 2.0, seed) for rank in sorted((one, two)))
    for module in SHAPES:
        a = small[name_a(module)]
        assert torch.equal(a, large[name_a(module)][: len(a)])


@quick
@given(st.integers(0, 2**40), st.integers(1, 16))
def test_a_start_changes_no_weight_and_has_a_bounded_a(seed: int, rank: int) -> None:
    start = initial(SHAPES, rank, 2.0, seed)
    for module, (rows, columns) in SHAPES.items():
        a, b = start[name_a(module)], start[name_b(module)]
        assert (a.shape, b.shape) == ((rank, columns), (rows, rank))
        assert not b.any()
        assert 0.0 < float(a.abs().max()) <= columns**-0.5
    assert start.scaling == dict.fromkeys(SHAPES, 2.0)


def test_a_start_spreads_over_its_whole_range() -> None:
    a = initial({"m": (1, 100)}, 400, 1.0, seed=0)[name_a("m")] * 10  # uniform within 1
    assert float(a.mean().abs()) < 0.01
    assert float(a.var()) == pytest.approx(1 / 3, rel=0.02)
    assert float(a.abs().max()) > 0.999


def test_the_seed_and_the_module_decide_the_start() -> None:
    square = {"one": (8, 8), "two": (8, 8)}
    start, again, other = (initial(square, 2, 1.0, seed) for seed in (5, 5, 6))
    assert start.digest() == again.digest() != other.digest()
    assert not torch.equal(start[name_a("one")], start[name_a("two")])
    alone = initial({"two": (8, 8)}, 2, 1.0, 5)
    assert torch.equal(alone[name_a("two")], start[name_a("two")])


def test_drawing_a_start_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    fresh(initial(SHAPES, 4, 2.0, seed=1), seed=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_fresh_factors_are_new_and_heads_are_not(adapter: Adapter) -> None:
    double = replace(adapter, tensors={n: t.double() for n, t in adapter.tensors.items()})
    new, again, other = (fresh(double, seed) for seed in (1, 1, 2))
    assert new.digest() == again.digest() != other.digest()
    assert new[HEAD] is double[HEAD]
    assert new.scaling == double.scaling
    assert {n: (t.shape, t.dtype) for n, t in new.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in double.tensors.items()
    }
    assert not any(new[name_b(m)].any() for m in SHAPES)
    assert not any(torch.equal(new[name_a(m)], double[name_a(m)]) for m in SHAPES)
