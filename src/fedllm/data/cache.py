"""Tokenised rows on disk, under a name that follows from all that went into them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.data.template import Tokenizer
from fedllm.data.tokens import Encoded

FORMAT = 2
"""Raised whenever the same input would give other tokens."""

_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Return the folder of tokenised rows in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fedllm" / "tokens"


def fingerprint(tokenizer: Tokenizer) -> str | None:
    """Return a hash of all that a fast tokenizer does to text; None if it cannot be told."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python may do anything
        return None
    import transformers

    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    words = [transformers.__version__, type(tokenizer).__name__, special, backend.to_str()]
    return hashlib.blake2b(json.dumps(words, sort_keys=True).encode()).hexdigest()


def key_of(parts: Sequence[Any]) -> str:
    """Return a name for everything that the tokens depend on.

    Args:
        parts: Values that JSON can hold.
    """
    digest = hashlib.blake2b(digest_size=20)
    encoder = json.JSONEncoder(ensure_ascii=True, sort_keys=True)
    for chunk in encoder.iterencode([FORMAT, *parts]):
        digest.update(chunk.encode())
    return digest.hexdigest()


def cached(key: str, make: Callable[[], Encoded]) -> Encoded:
    """Return what the cache has under a key, else make and keep it.

    A damaged file is made anew, and a cache that cannot be written is not needed: neither stops
    a run.
    """
    path = cache_dir() / f"{key}.npz"
    found = _load(path)
    if found is not None:
        return found
    made = make()
    try:
        _save(path, made)
    except OSError as error:
        _log.warning("Tokenised rows are not cached in %s: %s", path.parent, error)
    return made


def _load(path: Path) -> Encoded | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = Encoded(**{field.name: arrays[field.name] for field in fields(Encoded)})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("The cached tokens in %s are damaged and made anew: %s", path, error)
        return None
    return found


def _save(path: Path, encoded: Encoded) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file, **{field.name: getattr(encoded, field.name) for field in fields(Encoded)}
            )
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
