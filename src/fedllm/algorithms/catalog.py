"""What can be said of an algorithm without running it: for lists, forms and references."""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from fedllm.algorithms import ALGORITHMS, OPTIMIZERS, server_class, settings_of


@dataclass(frozen=True)
class Description:
    """One algorithm of the table."""

    name: str
    summary: str
    mixed_rank: str
    is_personal: bool
    optimizers: tuple[str, ...]  # what `algorithm.optimizer` may be
    no_optimizer: str  # why it may be nothing; empty where it may be something
    settings: Mapping[str, Mapping[str, Any]]  # name to `type` and `default`
    paper: str


def describe(name: str) -> Description:
    """Describe an algorithm; nothing heavy is imported."""
    cls = server_class(name)
    alone = "it is an optimiser itself" if name in OPTIMIZERS else cls.recoordinated
    defaults = {f.name: f.default for f in fields(cls)}
    kinds = {key: type_text(kind) for key, kind in settings_of(cls).items()}
    return Description(
        name=name,
        summary=ALGORITHMS[name].summary,
        mixed_rank=cls.mixed_rank,
        is_personal=cls.is_personal,
        optimizers=() if alone else OPTIMIZERS,
        no_optimizer=alone,
        settings={k: {"type": kind, "default": defaults[k]} for k, kind in kinds.items()},
        paper=_paper(inspect.getdoc(ALGORITHMS.load(name)) or ""),
    )


def _paper(doc: str) -> str:
    first, *others = doc.partition("\nPaper:")[2].splitlines() or [""]
    more = itertools.takewhile(lambda line: line.startswith(" "), others)
    return " ".join(line.strip() for line in (first, *more))


def type_text(kind: Any) -> str:
    """Return a type as a writer of YAML reads it."""
    match get_origin(kind):
        case origin if origin is Annotated:
            return type_text(get_args(kind)[0])
        case origin if origin in (Literal, Union, types.UnionType):
            return " | ".join(type_text(member) for member in get_args(kind))
    return "null" if kind in (None, type(None)) else getattr(kind, "__name__", str(kind))
