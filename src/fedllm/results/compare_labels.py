"""What groups of compared runs are called, and which of their settings are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.config import is_central


def in_common(firsts: Sequence[Mapping[str, Any]], told: Sequence[str]) -> list[str]:
    """Return the settings that are told of groups: not those that central runs cannot have."""
    central = [own for own in firsts if is_central(own)]
    federated = [own for own in firsts if not is_central(own)]
    if not central or not federated:
        return list(told)

    def is_known(key: str, groups: Sequence[Mapping[str, Any]]) -> bool:
        return any(key in own for own in groups)

    def differs(key: str) -> bool:
        return any(len({repr(own.get(key)) for own in part}) > 1 for part in (central, federated))

    kinds = ("algorithm.name", "stage")
    return [
        key
        for key in told
        if key in kinds or differs(key) or (is_known(key, central) and is_known(key, federated))
    ]


def names(firsts: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    """Return a label for each group; of central ones beside federated ones, the stage leads.

    Args:
        firsts: All settings of each group.
        found: Those in which groups differ.
    """
    central = [place for place, own in enumerate(firsts) if is_central(own)]
    if len(central) in (0, len(firsts)):
        return _labels(found)
    found_names = [""] * len(firsts)
    for part in (central, [p for p in range(len(firsts)) if p not in central]):
        own = [found[p] for p in part]
        apart = [key for key in own[0] if len({repr(one.get(key)) for one in own}) > 1]
        labels = _labels([{key: one[key] for key in apart} for one in own])
        for place, label in zip(part, labels, strict=True):
            kind = str(firsts[place].get("algorithm.name", ""))
            if place in central:
                kind = f"central {firsts[place]['stage']}"
            words = [word for word in label.split(", ") if word not in (kind, "")]
            found_names[place] = ", ".join([kind, *words])
    return found_names


def _labels(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a short label for each group's settings; where two are equal, what tells them apart.

    >>> _labels([{"s.name": "async", "s.alpha": a} for a in (1, 2)] + [{"s.name": "sync"}])
    ['async, alpha 1', 'async, alpha 2', 'sync']
    """
    short = [_label(settings) for settings in found]
    labels = []
    for settings, label in zip(found, short, strict=True):
        alike = [own for own, other in zip(found, short, strict=True) if other == label]
        apart = [key for key in settings if len({repr(own.get(key)) for own in alike}) > 1]
        words = [f"{key.rpartition('.')[2]} {settings[key]}" for key in apart]
        labels.append(", ".join(filter(None, [label, *words])))
    return labels


def _label(settings: Mapping[str, Any]) -> str:
    """Return what tells a group from others; where forms differ, the rest of a form is left out."""
    named = {key.rpartition(".")[0] for key in settings if key.endswith((".name", ".kind"))}
    words = []
    for key, value in settings.items():
        section, _, own = key.rpartition(".")
        if own in ("name", "kind"):
            words.append(str(value))
        elif section not in named:
            words.append(f"{own} {value}")
    return ", ".join(words)
