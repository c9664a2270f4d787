"""Adapters and their algebra."""

from fedllm.adapters import algebra
from fedllm.adapters.adapter import Adapter, Product, fresh, initial
from fedllm.adapters.base_delta import BaseDelta
from fedllm.adapters.names import is_a, is_b, is_head, module_of, name_a, name_b

__all__ = [
    "Adapter",
    "BaseDelta",
    "Product",
    "algebra",
    "fresh",
    "initial",
    "is_a",
    "is_b",
    "is_head",
    "module_of",
    "name_a",
    "name_b",
]
