"""Writing so that a kill leaves the old or the new, and a full disk one clear message."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedllm.errors import RunError

_MENDS = {
    errno.ENOSPC: "no space is left on the device; free some",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file is larger than this file system or its limit allows",
    errno.EACCES: "permission is denied; change it or choose another output_dir",
    errno.EPERM: "permission is denied; change it or choose another output_dir",
    errno.EROFS: "the file system is read-only; choose another output_dir",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EEXIST: "it already exists; choose another name",
    errno.ENOTEMPTY: "it already exists; choose another name",
}
_ENCODER = json.JSONEncoder(sort_keys=True, allow_nan=False, ensure_ascii=False)
_NAMES, _PLAIN = frozenset({str}), frozenset({str, int, float, bool, type(None)})


@contextmanager
def explained(path: Path, safe: str) -> Iterator[None]:
    """Turn failures to write into a `RunError` that names the path and what is safe.

    Args:
        path: What was to be written.
        safe: A sentence: what is not lost, and how to go on.

    Raises:
        RunError: For a full disk, a lacking permission and the like; other errors pass.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number not in _MENDS:
            raise
        raise RunError(f"Cannot write {path}: {_MENDS[number]}. {safe}") from error


def _errno(error: Exception) -> int | None:
    """Return the system's error number; safetensors tells it only in its text."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


@contextmanager
def atomic_folder(
    target: Path, temporary: Path | None = None, *, replace: bool = False
) -> Iterator[Path]:
    """Give a temporary folder that becomes `target`, on the disk for good, when the block ends.

    Args:
        target: Its parents are made.
        temporary: Beside the target; what is there from a killed process is deleted.
        replace: Put an older target out of the way at the last moment.
    """
    temporary = temporary or target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        old = temporary.with_name(temporary.name + "-old")
        if replace and target.exists():
            target.rename(old)
        temporary.rename(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, replacing one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def strict_json(value: Any) -> str:
    """Return JSON on one line with sorted keys, in which NaN and infinities are null.

    JSON has no word for them, and a reader in another language would refuse the file.
    """
    if _is_flat(value):
        try:
            return _ENCODER.encode(value)
        except ValueError:  # a number that is not finite
            pass
    return _ENCODER.encode(_finite(value))


def _is_flat(value: Any) -> bool:
    """Tell whether this is a plain record, as most are: JSON as it stands, but for numbers."""
    if type(value) is not dict:
        return False
    return _NAMES.issuperset(map(type, value)) and _PLAIN.issuperset(map(type, value.values()))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
