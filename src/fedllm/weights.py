"""Safetensors files, checked by their headers before a weight is read; no torch here.

A header is a few kilobytes, so the check costs milliseconds however large the weights are. What
only the values tell (NaN, infinities) is looked for once they are loaded.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import ModelError

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""How weights are stored that can be trained on as they are."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Files that run whatever code they hold when they are read; never opened here."""

_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4},
}
_MAX_HEADER = 100_000_000
_AGAIN = "Fetch or write the file again."


@dataclass(frozen=True, slots=True)
class Stored:
    """What a header says of a tensor."""

    dtype: str
    """As safetensors writes it: `F32`, `BF16`, ..."""
    shape: tuple[int, ...]
    file: Path
    """Where it stands."""


def read_header(file: Path) -> dict[str, Stored]:
    """Return what a safetensors file holds, after checking that it is whole.

    Raises:
        ModelError: If it cannot be read, is cut off, is no safetensors file, names a tensor twice,
            or has a tensor whose bytes do not fit its shape.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as data:
            start = data.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > min(size - 8, _MAX_HEADER):
                raise ModelError(
                    f"{file} is damaged: it has {size} bytes, and its beginning is not that of a"
                    f" whole safetensors file. {_AGAIN}"
                )
            text = data.read(length)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}. Check the file.") from None
    tree = _parsed(file, text)
    tree.pop("__metadata__", None)
    end = max((_end(file, name, entry) for name, entry in tree.items()), default=0)
    if 8 + length + end != size:
        raise ModelError(
            f"{file} is damaged: its tensors need {8 + length + end} bytes and it has {size}."
            f" {_AGAIN}"
        )
    return {n: Stored(e["dtype"], tuple(e["shape"]), file) for n, e in tree.items()}


def read_shards(files: Sequence[Path]) -> dict[str, Stored]:
    """Return what several files hold together.

    Raises:
        ModelError: If one is damaged, or a tensor stands in two of them.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in found:
                raise ModelError(
                    f"The tensor '{name}' stands in {found[name].file} and in {file.name} too, so"
                    " nobody can tell which one is meant. Fetch the model again."
                )
            found[name] = stored
    return found


def read_index(index: Path) -> dict[str, Stored]:
    """Return what the shards of an index hold.

    Raises:
        ModelError: If the index is damaged, names files that are not there, are no safetensors or
            lie elsewhere, or does not agree with what the files hold.
    """
    places = _places(index)
    files = {name: index.parent / name for name in sorted(set(places.values()))}
    for name in files:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise ModelError(
                f"{index} names '{name}', which is no safetensors file beside it. Pickled weights"
                " are never read. Fetch the model again, or convert it with save_pretrained."
            )
    if absent := [name for name, file in files.items() if not file.is_file()]:
        raise ModelError(
            f"'{index.parent}' is incomplete: {few(absent)} is missing. Fetch the model again."
        )
    found = read_shards(list(files.values()))
    wrong = [n for n, file in places.items() if n not in found or found[n].file.name != file]
    if wrong := wrong or sorted(set(found) - set(places)):
        raise ModelError(
            f"{index} and the files it names disagree on where {few(wrong)} stands. Fetch the"
            " model again."
        )
    return found


def refuse_integers(found: Mapping[str, Stored]) -> None:
    """Refuse weights that are stored as whole numbers.

    Raises:
        ModelError: If there are such.
    """
    for name, stored in found.items():
        if name.endswith(".weight") and stored.dtype not in FLOATS:
            raise ModelError(
                f"{stored.file}: the tensor '{name}' is stored as {stored.dtype}, where a weight is"
                f" {', '.join(sorted(FLOATS))}. If the weights are quantised, give the original"
                " model (with model.quantization, if memory is short)."
            )


def few(names: Sequence[str], most: int = 3) -> str:
    """Return the first names in one line.

    >>> few(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _parsed(file: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ModelError(f"{file} names the tensor '{twice}' twice. {_AGAIN}")
        return tree

    try:
        tree = json.loads(text, object_pairs_hook=once)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise ModelError(f"{file} is no safetensors file, or is damaged at its head. {_AGAIN}")
    return tree


def _end(file: Path, name: str, entry: Any) -> int:
    """Return where a tensor's bytes end, after checking that they fit its shape."""
    try:
        begin, end = entry["data_offsets"]
        bits = math.prod(entry["shape"]) * _BITS.get(entry["dtype"], 0)
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{file} says nothing sensible of the tensor '{name}'. {_AGAIN}") from None
    if begin < 0 or end < begin or (bits and bits != 8 * (end - begin)):
        raise ModelError(
            f"{file} is damaged: the tensor '{name}', {entry['dtype']} of shape"
            f" {tuple(entry['shape'])}, has {end - begin} bytes. {_AGAIN}"
        )
    return int(end)


def _places(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        good = isinstance(places, dict) and all(isinstance(p, str) for p in places.values())
    except (OSError, ValueError, KeyError, TypeError):
        good = False
    if not good or not places:
        raise ModelError(f"Cannot read {index}: it is no index of weights. Fetch the model again.")
    return dict(places)
