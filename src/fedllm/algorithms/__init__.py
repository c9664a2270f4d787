"""Federated algorithms: an explicit table, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fedllm.errors import ConfigError, did_you_mean, unknown
from fedllm.federation import BaseClient, BaseServer, HeadPolicy
from fedllm.registry import Entry, Table

ALGORITHMS = Table(
    "algorithm",
    {
        "fedit": Entry("fedllm.algorithms.fedit", "weighted mean of A and B (FedAvg on LoRA)"),
        "ffa-lora": Entry("fedllm.algorithms.ffa_lora", "A frozen, B averaged: exact"),
        "fedsa-lora": Entry("fedllm.algorithms.fedsa_lora", "A shared, B personal"),
        "rolora": Entry("fedllm.algorithms.rolora", "B and A in turn: exact"),
        "flexlora": Entry("fedllm.algorithms.flexlora", "mean of products, refactored by SVD"),
        "flora": Entry("fedllm.algorithms.flora", "stacked adapters merged into the base: exact"),
    },
)


def server_class(name: str) -> type[BaseServer]:
    """Return the server class of an algorithm.

    Raises:
        ConfigError: If there is no such algorithm.
    """
    found: type[BaseServer] = ALGORITHMS.load(name).Server
    return found


def make(
    name: str, settings: Mapping[str, Any], head: HeadPolicy = "shared"
) -> tuple[BaseServer, BaseClient]:
    """Return the server and the client behaviour of an algorithm.

    Raises:
        ConfigError: If the name or a setting is wrong.
    """
    wrong = problems(name, settings)
    if wrong:
        raise ConfigError(wrong)
    module = ALGORITHMS.load(name)
    return module.Server(**settings), module.Client(head)


def problems(name: str, settings: Mapping[str, Any], *, mixed_rank: bool = False) -> list[str]:
    """Return what is wrong with an algorithm's name and settings, one sentence each.

    Args:
        name: As under `algorithm.name`.
        settings: The keys beside the name.
        mixed_rank: Whether clients have unequal ranks.
    """
    if name not in ALGORITHMS:
        return [f"algorithm.name: {unknown('algorithm', name, ALGORITHMS)}"]
    cls = server_class(name)
    known = settings_of(cls)
    wrong = []
    for key, value in settings.items():
        if key not in known:
            hint = did_you_mean(key, known) or f" '{name}' has: {', '.join(known)}"
            wrong.append(f"algorithm.{key}: unknown key.{hint}")
            continue
        try:
            TypeAdapter(known[key]).validate_python(value, strict=True)
        except ValidationError as error:
            wrong.append(f"algorithm.{key}: {error.errors()[0]['msg'].lower()} (got {value!r})")
    if mixed_rank and cls.mixed_rank == "unsupported":
        able = [other for other in ALGORITHMS if server_class(other).mixed_rank != "unsupported"]
        wrong.append(
            f"adapter.rank: '{name}' needs one rank for all clients; give a number,"
            f" or choose one of {', '.join(able)}"
        )
    return wrong


def settings_of(cls: type[BaseServer]) -> dict[str, Any]:
    """Return the settings of an algorithm, name to type."""
    hints = get_type_hints(cls, localns={"Tensor": object}, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}
