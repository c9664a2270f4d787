"""What the source files of transformers offer, kept in the user's cache between starts.

On import it reads all its models' files, some 1,500, to learn which objects they define, and that
twice: a tenth of the time to the first step. The answer is that of one installed version, so it is
kept, as Python keeps what it compiled. Without it, or with a damaged one, the files are read once.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

IMPORT_UTILS = "transformers.utils.import_utils"

Structure = dict[frozenset[str], dict[str, set[str]]]
"""By the backends that are needed: names of modules to the objects they offer."""


@contextmanager
def indexed() -> Iterator[None]:
    """Let transformers, when it is imported inside the block, use the index."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Lays the index over the one function that asks for it, as soon as its module is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != IMPORT_UTILS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        loader: Any = spec.loader if spec is not None else None
        if loader is None:
            return spec
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            define = getattr(module, "define_import_structure", None)
            if define is not None:
                module.define_import_structure = indexing(define)  # type: ignore[attr-defined]  # there

        loader.exec_module = exec_module
        return spec


def indexing(define: Callable[..., Structure]) -> Callable[..., Structure]:
    """Return transformers' `define_import_structure` with the index before it.

    Args:
        define: Takes a folder or the `__init__.py` in it, and a prefix for the names of modules.
    """

    def known(path: str | Path, prefix: str | None = None) -> Structure:
        file = Path(path)
        folder = file.parent if file.suffix else file
        is_all = (folder.parent.name, folder.name) == ("transformers", "models")
        # in a checkout that is worked on, files change while the version stays
        if not is_all or "dev" in importlib.metadata.version("transformers"):
            return define(path, prefix)
        # a new one each time, since transformers adds to it
        return {
            backends: {f"{prefix}.{name}" if prefix else name: {*objects} for name, objects in part}
            for backends, part in _rows(folder, define)
        }

    return known


_Rows = list[tuple[frozenset[str], list[tuple[str, list[str]]]]]


def _rows(folder: Path, define: Callable[..., Structure]) -> _Rows:
    file = _index_file(folder)
    with suppress(OSError, ValueError, TypeError, AttributeError):
        rows = [
            (frozenset(backends), list(part.items()))
            for backends, part in json.loads(file.read_text(encoding="utf-8"))
        ]
        if rows:
            return rows
    found = define(str(folder))
    kept = [
        (sorted(backends), {name: sorted(objects) for name, objects in part.items()})
        for backends, part in found.items()
    ]
    with suppress(OSError):
        _write(file, json.dumps(kept))
    return [(frozenset(backends), list(part.items())) for backends, part in kept]


def _index_file(folder: Path) -> Path:
    """Name the index after all that it depends on."""
    version = importlib.metadata.version("transformers")
    told = json.dumps([version, str(folder.resolve()), folder.stat().st_mtime_ns])
    key = hashlib.blake2b(told.encode(), digest_size=12).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fedllm" / "transformers" / f"{version}-{key}.json"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as whole:
        whole.write(text)
    Path(name).replace(file)
