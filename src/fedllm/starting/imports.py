"""Imports of large packages, without what only others need."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fedllm.starting.index import IMPORT_UTILS, indexed
from fedllm.starting.patterns import compile_when_asked


@contextmanager
def without(package: str, checkers: str, *checks: str) -> Iterator[None]:
    """Let a package look as if it were not installed, inside the block.

    None in `sys.modules` is Python's own sign for "not to be found", which `import` and
    `find_spec` heed. Afterwards the package can be imported as ever. If it is imported already,
    nothing is done.

    Args:
        package: Its name.
        checkers: Module of the library that looks for the package.
        checks: Functions there that remember what they found; made to forget it.
    """
    if package in sys.modules:
        yield
        return
    _forget(checkers, checks)
    sys.modules[package] = None  # type: ignore[assignment]  # as the import system allows
    try:
        yield
    finally:
        sys.modules.pop(package, None)
        _forget(checkers, checks)


def _forget(module: str, checks: Sequence[str]) -> None:
    for check in checks:
        forget = getattr(getattr(sys.modules.get(module), check, None), "cache_clear", None)
        if forget is not None:
            forget()


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Hide bitsandbytes from PEFT inside the block.

    PEFT imports it on import and when it wraps a layer, whether or not anything is quantised,
    and it draws in torch's compiler: two seconds, a fifth of the time to the first step. What
    stays is that `peft.helpers`, if imported inside, cannot measure condition numbers of quantised
    layers, which we never ask for.
    """
    checks = ("is_bnb_available", "is_bnb_4bit_available")
    with without("bitsandbytes", "peft.import_utils", *checks):
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """Search for no garbage inside the block, for imports and loading.

    Both make millions of objects that stay, and Python walks over all of them again and again in
    search of cycles: a tenth of the time to the first step. Memory is freed as ever when the last
    reference goes; only cycles wait for the end of the block.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def import_transformers() -> None:
    """Import transformers ahead of whoever asks for it first, without what we never use.

    Its losses of object detection, which every model draws in and we never use, import SciPy's
    optimisers: they do without; SciPy can be imported afterwards as ever.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    with uncollected():
        with indexed():
            importlib.import_module("transformers.models")
        # only now: before, it notes which of its objects cannot be had
        with without("scipy", IMPORT_UTILS, "is_scipy_available"):
            importlib.import_module("transformers.modeling_utils")
    compile_when_asked()


def import_peft() -> None:
    """Import PEFT ahead of transformers' trainer, which would import it with bitsandbytes."""
    import_transformers()
    with uncollected(), without_bitsandbytes():
        importlib.import_module("peft")


def import_trl() -> None:
    """Import TRL, which looks through all that is installed for the names of two distributions."""
    import_peft()
    names = Distributions(importlib.metadata.packages_distributions)
    with uncollected(), _replaced(importlib.metadata, "packages_distributions", lambda: names):
        importlib.import_module("trl")


class Distributions(dict[str, list[str]]):
    """Names of distributions by package; most have the package's own, so that is tried first."""

    def __init__(self, find_all: Callable[[], Mapping[str, list[str]]]) -> None:
        super().__init__()
        self._find_all = find_all

    def __missing__(self, package: str) -> list[str]:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return self._find_all()[package]
        return [package]


@contextmanager
def _replaced(holder: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute inside the block."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
