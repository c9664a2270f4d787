"""From the configuration to what is done to messages, and which combinations have a meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm import algorithms
from fedllm.adapters import wire
from fedllm.config import Config, means_mixed_ranks
from fedllm.federation import BaseClient, BaseServer, privacy, robust
from fedllm.federation.privacy import ClientPrivacy, Epsilon
from fedllm.federation.transport import Transport
from fedllm.seeding import derive, rng
from fedllm.simulation import Reception

_COMBINING = ("median", "trimmed-mean")
"""Rules that make one update of all."""
_CHOOSING = ("krum", "multi-krum")
"""Rules that keep those that lie close to each other."""
_COMPARING = (*_COMBINING, *_CHOOSING)
"""Rules that compare clients' tensors with each other."""


def transport_of(config: Config) -> Transport:
    """Return how messages travel."""
    up, down = config.communication.uplink, config.communication.downlink
    return Transport(wire.make(up.name, **up.settings), wire.make(down.name, **down.settings))


def privacy_of(config: Config) -> ClientPrivacy | None:
    """Return the clipping and the noise, if asked for."""
    asked = config.updates.privacy
    if asked is None:
        return None
    seed = derive(config.seed, "privacy")
    return ClientPrivacy(asked.clip, asked.noise_multiplier, asked.delta, seed)


def reception_of(config: Config) -> Reception:
    """Return what is done to updates that arrive."""
    asked = config.updates.robust
    return Reception(
        transport=transport_of(config),
        max_norm=config.updates.max_norm,
        robust=robust.make(asked.name, asked.settings),
        privacy=privacy_of(config),
    )


def epsilon_of(config: Config, server: BaseServer, rounds: int, population: int) -> Epsilon | None:
    """Return what may be claimed after this many rounds; None without privacy.

    Args:
        config: The run's.
        server: Says how it samples.
        rounds: Server updates done.
        population: Clients that cohorts are drawn from.

    Raises:
        MissingExtraError: If dp-accounting is not installed.
    """
    asked = config.updates.privacy
    if asked is None:
        return None
    sampling = "uniform" if server.is_random_cohort else "sequential"
    cohort = min(config.federation.cohort, population)
    return privacy.epsilon(
        rounds, population, cohort, asked.noise_multiplier, asked.delta, sampling
    )


def problems(config: Config) -> list[str]:
    """Return what is wrong with `communication` and `updates`, one sentence each."""
    down = config.communication.downlink
    wrong = misspelt(config.model_dump())
    if not wrong and wire.make(down.name, **down.settings).needs_reference:
        wrong.append(
            f"communication.downlink: '{down.name}' is for changes, and what clients download is no"
            " change; choose one of fp32, bf16, fp16, int8, nf4"
        )
    name, settings = config.algorithm.name, config.algorithm.settings
    if wrong or algorithms.problems(name, settings):
        return wrong
    server, client = algorithms.make(name, settings, config.adapter.head)
    return [*_undefined(config, server), *_unfit(config, server), *_beside(config, client)]


def misspelt(tree: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with names and settings, even if the rest of a tree is no good either.

    Args:
        tree: Checked or not; what has no such form at all is told by the schema.
    """
    tables = {
        ("communication", "uplink"): wire.problems,
        ("communication", "downlink"): wire.problems,
        ("updates", "robust"): robust.problems,
    }
    wrong = []
    for (section, key), problems_of in tables.items():
        given = tree.get(section)
        chosen = given.get(key) if isinstance(given, Mapping) else None
        settings = dict(chosen) if isinstance(chosen, Mapping) else {"name": chosen}
        name = settings.pop("name", None)
        if isinstance(name, str) and all(isinstance(word, str) for word in settings):
            wrong += problems_of(name, settings, f"{section}.{key}")
    return wrong


def _undefined(config: Config, server: BaseServer) -> list[str]:
    """Refuse what subtracts tensors where that has no meaning."""
    asked = []
    if config.updates.robust.name != "mean":
        asked.append("updates.robust")
    if config.updates.privacy is not None:
        asked.append("updates.privacy")
    if config.communication.uplink.name == "topk":
        asked.append("communication.uplink")
    why = server.recoordinated
    return [f"{key}: not defined for '{config.algorithm.name}': {why}" for key in asked if why]


def _unfit(config: Config, server: BaseServer) -> list[str]:
    """Refuse what does not go with ranks, cohort, or with each other."""
    rule, wrong = config.updates.robust, []
    private = config.updates.privacy is not None
    if means_mixed_ranks(config.adapter.model_dump()["rank"]):
        compared = ["updates.robust"] if rule.name in _COMPARING else []
        wrong += [
            f"{key}: clients of unequal rank have no common tensors to compare; give all one rank"
            for key in [*compared, *(["updates.privacy"] if private else [])]
        ]
    if server.is_uneven:
        setting = " < ".join(server.chosen_of or ())
        compared = ["updates.robust"] if rule.name in _CHOOSING else []
        wrong += [
            f"{key}: not defined where each client trains tensors of its own choice ({setting})"
            for key in [*compared, *(["updates.privacy"] if private else [])]
        ]
    if private and rule.name in _COMPARING:
        wrong.append(
            f"updates.robust: '{rule.name}' looks at clients before noise is added, which privacy"
            " does not allow; use mean or norm-bound"
        )
    made = robust.make(rule.name, rule.settings)
    if isinstance(made, robust.Krum) and not server.recoordinated:
        wrong += _too_few(config, server, made)
    return wrong


def _too_few(config: Config, server: BaseServer, rule: robust.Krum) -> list[str]:
    """Refuse a rule that no cohort is large enough for."""
    name, cohort = config.algorithm.name, config.federation.cohort
    clients = range(config.federation.num_clients)
    found = len(server.sample(clients, cohort, rng(config.seed, "cohort", 0)))
    if min(found, cohort) >= rule.fewest:
        return []
    has = (
        f"federation.cohort_size is {cohort}"
        if found >= cohort
        else f"'{name}' takes {found} at a time"
    )
    return [
        f"updates.robust: '{config.updates.robust.name}' with byzantine {rule.byzantine} and keep"
        f" {rule.keep} needs a cohort of at least {rule.fewest} ({has})"
    ]


def _beside(config: Config, client: BaseClient) -> list[str]:
    """Refuse what would overlook that something travels beside the model."""
    if type(client).extra_names is BaseClient.extra_names:
        return []
    wrong, rule = [], config.updates.robust.name
    if config.updates.privacy is not None:
        wrong.append(
            "updates.privacy: clients send control variates besides their tensors, and these get"
            " no noise; choose an algorithm without them"
        )
    if rule in _COMBINING:
        wrong.append(
            f"updates.robust: '{rule}' makes one update of all, and of the control variates that"
            " clients send besides nobody's is right for it; use krum or norm-bound"
        )
    return wrong
