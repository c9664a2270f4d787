"""What holds for all LoRA arithmetic: no full matrix, no modified argument, shapes from shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedllm.adapters import (
    Adapter,
    algebra,
    alignment,
    clustering,
    factoring,
    linear,
    measure,
    name_a,
    name_b,
)

ROWS, COLUMNS, RANK, CLIENTS = 150, 120, 4, 3
PATHS = {"q": (ROWS, COLUMNS), "v:expert0": (COLUMNS, ROWS)}
SCALING = dict.fromkeys(PATHS, 2.0)
Parts = list[tuple[float, Adapter]]
Operation = Callable[[Parts], Any]


def member(seed: int, rank: int) -> Adapter:
    """Draw a participant."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for path, (rows, columns) in PATHS.items():
        tensors[name_a(path)] = torch.from_numpy(draw.normal(size=(rank, columns)))
        tensors[name_b(path)] = torch.from_numpy(draw.normal(size=(rows, rank)))
    return Adapter(tensors, SCALING)


def products(parts: Parts) -> Any:
    return algebra.mean_products(parts)


def mean(parts: Parts) -> Adapter:
    return replace(parts[0][1], tensors=algebra.mean(parts, parts[0][1]))


OPERATIONS: dict[str, Operation] = {
    "stack": algebra.stack,
    "mean": mean,
    "refactor": lambda p: algebra.refactor(products(p), 6, SCALING),
    "qr split": lambda p: factoring.qr_split(products(p), 6, SCALING),
    "orthonormal split": lambda p: factoring.orthonormal_split(products(p), 6, SCALING),
    "balanced split": lambda p: factoring.balanced_split(products(p), 6, SCALING, 1.0),
    "wide balanced split": lambda p: factoring.balanced_split(products(p), 20, SCALING, 1.0),
    "residual of the mean": lambda p: factoring.residual(p, mean(p)),
    "truncated residual": lambda p: factoring.residual(p, mean(p), 5),
    "residual of unequal ranks": lambda p: factoring.residual(
        [(1.0, algebra.truncate(p[0][1], 2)), *p[1:]], mean(p)
    ),
    "rotated by A": lambda p: alignment.rotated(p[0][1], p[1][1], "a", 0.5),
    "rotated by B": lambda p: alignment.rotated(p[0][1], p[1][1], "b", 1.0, False),
    "ridge": lambda p: alignment.ridge_correction(products(p), mean(p), 0.01),
    "cosine": lambda p: alignment.cosine_correction(products(p), mean(p), 0.01, 3, 0.1),
    "change of basis": lambda p: alignment.change_of_basis(
        p[0][1][name_b("q")], p[1][1][name_a("q")], p[2][1][name_a("q")]
    ),
    "norm": lambda p: measure.norm(products(p)["q"]),
    "norm of an adapter": lambda p: measure.adapter_norm(p[0][1]),
    "inner": lambda p: measure.inner(products(p)["q"], p[0][1].product("q")),
    "norm of a difference": lambda p: measure.difference_norm(
        {path: [product, p[0][1].product(path)] for path, product in products(p).items()}
    ),
    "add": lambda p: linear.add(p[0][1].tensors, p[1][1].tensors, 0.5),
    "flat norm": lambda p: linear.flat_norm(p[0][1].tensors),
    "mean of padded": lambda p: linear.mean_padded(
        [(1.0, algebra.truncate(p[0][1], 2)), *p[1:]], p[1][1]
    ),
    "truncated": lambda p: linear.truncated_to(
        p[0][1].tensors, algebra.truncate(p[1][1], 2).tensors
    ),
    "cosine distances": lambda p: clustering.cosine_distances([a for _, a in p]),
    "subspace distances": lambda p: clustering.subspace_distances([a for _, a in p], 2),
    "linkage": lambda p: len(clustering.agglomerate(np.ones((3, 3)) - np.eye(3), 2)),
}
every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


@pytest.fixture
def parts() -> Parts:
    return [(0.5 * (k + 1), member(k, RANK)) for k in range(CLIENTS)]


def shapes(result: Any) -> Any:
    """Return the same structure with shapes in place of tensors."""
    match result:
        case Tensor() | np.ndarray():
            return tuple(result.shape)
        case Adapter():
            return shapes(result.tensors)
        case dict():
            return {name: shapes(each) for name, each in result.items()}
        case tuple():
            return tuple(shapes(each) for each in result)
        case _:
            return type(result)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        sizes = [each.numel() for each in made if isinstance(each, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@every_operation
def test_shapes_alone_give_the_shapes(operation: Operation, parts: Parts) -> None:
    bare = [
        (w, replace(one, tensors={n: t.to("meta") for n, t in one.tensors.items()}))
        for w, one in parts
    ]
    assert shapes(operation(bare)) == shapes(operation(parts))


@every_operation
def test_no_argument_is_modified(operation: Operation, parts: Parts) -> None:
    before = [one.digest() for _, one in parts]
    operation(parts)
    assert [one.digest() for _, one in parts] == before


@every_operation
def test_no_full_matrix_is_formed(operation: Operation, parts: Parts) -> None:
    with Largest() as largest:
        operation(parts)
    assert largest.numel < ROWS * COLUMNS / 3


def test_the_watch_sees_a_full_matrix(parts: Parts) -> None:
    with Largest() as largest:
        products(parts)["q"].dense()
    assert largest.numel == ROWS * COLUMNS
