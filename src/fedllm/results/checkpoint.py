"""Checkpoints: written whole or not at all, checked when read, never unpickled.

    checkpoints/<version>/  state.json  state.safetensors  adapter/ ...  sha256.json

`sha256.json` holds the digest of every other file, so that a torn or changed one is noticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.errors import RunError
from fedllm.results.run_dir import RunDir
from fedllm.results.storage import atomic_folder, explained

if TYPE_CHECKING:
    from torch import Tensor

_TREE, _TENSORS, _DIGESTS = "state.json", "state.safetensors", "sha256.json"

logger = logging.getLogger(__name__)


def save_checkpoint(
    run: RunDir,
    version: int,
    tree: Any,
    tensors: Mapping[str, Tensor],
    *,
    keep: int,
    write: Callable[[Path], None] | None = None,
) -> Path:
    """Save a state, delete all checkpoints but the newest `keep`, and return the folder.

    One of a later version belongs to a future that a resume has taken back, and is deleted too.

    Args:
        run: Gets locked.
        version: Number of server updates behind the state.
        tree: What `json` can hold; infinities and NaN are kept.
        tensors: Name to tensor, dense, of any device and dtype; not modified.
        keep: How many checkpoints stay, this one included; at least 1.
        write: Adds files of its own to the folder it is given, such as `adapter/`.

    Raises:
        RunError: If it cannot be written; the checkpoints before it are still there.
    """
    from safetensors.torch import save_file

    run.lock()
    folder = run.path / "checkpoints"
    target = folder / str(version)
    safe = f"The checkpoints before it are safe; then continue with: fedllm run --resume {run.path}"
    with explained(target, safe):
        _delete_leavings(folder)
        with atomic_folder(target, folder / f".tmp-{version}", replace=True) as temporary:
            (temporary / _TREE).write_text(json.dumps(tree), encoding="utf-8")
            save_file(_separate(tensors), temporary / _TENSORS)
            if write:
                write(temporary)
            (temporary / _DIGESTS).write_text(json.dumps(_digests(temporary), indent=2))
        _thin(folder, version, keep)
    return target


def latest_checkpoint(run: RunDir) -> Path | None:
    """Return the newest checkpoint that is whole; None if there is none at all.

    Raises:
        RunError: If there are some and all are damaged.
    """
    folder = run.path / "checkpoints"
    versions = _versions(folder)
    for version in versions:
        damage = _damage(folder / str(version))
        if damage is None:
            return folder / str(version)
        logger.warning("Checkpoint %s is damaged (%s) and is passed over", version, damage)
    if versions:
        raise RunError(
            f"All checkpoints in {folder} are damaged, so the run cannot be resumed. Restore one"
            " from a copy, or start the run again under another name=..."
        )
    return None


def load_checkpoint(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the tree and the tensors (on the CPU) that were saved.

    Raises:
        RunError: If the checkpoint is missing or damaged.
    """
    from safetensors.torch import load_file

    damage = _damage(path)
    if damage is not None:
        raise RunError(f"Checkpoint {path} is damaged: {damage}. Use another one of the run")
    tree = json.loads((path / _TREE).read_text(encoding="utf-8"))
    return tree, load_file(path / _TENSORS)


def _versions(folder: Path) -> list[int]:
    """Return the versions saved, newest first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)


def _delete_leavings(folder: Path) -> None:
    """Delete what killed processes have left half-written."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


def _thin(folder: Path, version: int, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints up to this version."""
    saved = _versions(folder)
    kept = [number for number in saved if number <= version][:keep]
    for number in saved:
        if number not in kept:
            shutil.rmtree(folder / str(number))


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors of which no two share memory, as safetensors wants them."""
    separate: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        separate[name] = own.clone() if place in taken else own
        taken.add(place)
    return separate


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its path inside it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None."""
    try:
        recorded = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        for name, digest in recorded.items():
            if _sha256(folder / name) != digest:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError:
        return f"{_DIGESTS} is not JSON"
    return None
