"""What can be said of an algorithm without running it: for lists, forms and references."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from fedllm.algorithms import ALGORITHMS, OPTIMIZERS, SCHEDULES, server_class, settings_of


@dataclass(frozen=True)
class Description:
    """One algorithm of the table."""

    name: str
    summary: str
    mixed_rank: str
    is_personal: bool
    optimizers: tuple[str, ...]  # what `algorithm.optimizer` may be
    no_optimizer: str  # why it may be nothing; empty where it may be something
    schedules: Mapping[str, str]  # likewise, why it is refused
    settings: Mapping[str, Mapping[str, Any]]  # name to `type` and `default`
    paper: str


def describe(name: str) -> Description:
    """Describe an algorithm; nothing heavy is imported."""
    cls = server_class(name)
    alone = "it is an optimiser itself" if name in OPTIMIZERS else cls.recoordinated
    kinds, defaults = settings_of(cls), {f.name: f.default for f in fields(cls)}
    return Description(
        name=name,
        summary=ALGORITHMS[name].summary,
        mixed_rank=cls.mixed_rank,
        is_personal=cls.is_personal,
        optimizers=() if alone else OPTIMIZERS,
        no_optimizer=alone,
        schedules={kind: cls.refused_schedules.get(kind, "") for kind in SCHEDULES},
        settings={k: {"type": type_text(v), "default": defaults[k]} for k, v in kinds.items()},
        paper=_paper(inspect.getdoc(ALGORITHMS.load(name)) or ""),
    )


def _paper(doc: str) -> str:
    found = re.search(r"\nPaper:(.*(?:\n .*)*)", doc)
    return " ".join(found[1].split()) if found else ""


def type_text(kind: Any) -> str:
    """Return a type as a writer of YAML reads it."""
    origin = get_origin(kind)
    if origin is Annotated:
        return type_text(get_args(kind)[0])
    if origin in (Literal, Union, types.UnionType):
        return " | ".join(map(type_text, get_args(kind)))
    return "null" if kind in (None, type(None)) else getattr(kind, "__name__", str(kind))
