"""A PEFT adapter's files, checked before PEFT or anybody else loads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.adapters.lazy import LazyModule
from fedllm.errors import ModelError
from fedllm.weights import FLOATS, PICKLES, Stored, few, read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_A, _B = ".lora_A.weight", ".lora_B.weight"
_AGAIN = "Export or fetch the adapter again."


def check_peft(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Check the two files of an adapter by what they say of themselves; no value is read.

    Returns:
        The configuration, and module to (out, in) of the layer that it was made for.

    Raises:
        ModelError: If a file is missing, damaged or pickled, a factor lacks its other half or has
            another rank than the configuration says, or a name is not PEFT's.
    """
    refuse_pickled(folder)
    config = _config(folder)
    found = read_header(folder / TENSORS_FILE)
    for name, stored in found.items():
        if not name.startswith(PREFIX):
            raise ModelError(
                f"{stored.file} has an unexpected tensor '{name}': PEFT's names begin with"
                f" '{PREFIX}'. {_AGAIN}"
            )
        if stored.dtype not in FLOATS:
            raise ModelError(
                f"{stored.file}: the tensor '{name}' is stored as {stored.dtype}, where an adapter"
                f" is {', '.join(sorted(FLOATS))}. {_AGAIN}"
            )
    shapes = _shapes(found, folder / TENSORS_FILE)
    _check_targets(config, shapes, folder)
    return config, shapes


def refuse_pickled(folder: Path) -> None:
    """Refuse a folder whose adapter is only there as a pickle, which nobody opens.

    Raises:
        ModelError: If it is so.
    """
    if (folder / TENSORS_FILE).is_file() or not folder.is_dir():
        return
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickles:
        raise ModelError(
            f"{folder} has its adapter only as a pickle ({', '.join(pickles)}), which can run any"
            f" code when it is read, so fedllm reads {TENSORS_FILE} only. Ask for the adapter in"
            " safetensors, which PEFT has written for years."
        )


def refuse_nonfinite(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter whose values are not numbers.

    Raises:
        ModelError: If one is NaN or infinite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{file}: the tensor '{name}' has values that are NaN or infinite. Take a"
                " checkpoint from before the training went wrong."
            )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    for needed in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / needed).is_file():
            raise ModelError(f"{folder} holds no PEFT adapter: {needed} is missing. {_AGAIN}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}. {_AGAIN}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ModelError(
            f"{file} is of the kind {kind!r}; fedllm reads LoRA adapters (peft_type LORA)."
        )
    return config


def _shapes(found: Mapping[str, Stored], file: Path) -> dict[str, tuple[int, int]]:
    """Return module to (out, in), both factors being there and of one rank."""
    shapes = {}
    for name in found:
        for own, other in ((_A, _B), (_B, _A)):
            if name.endswith(own) and name.removesuffix(own) + other not in found:
                raise ModelError(
                    f"{file}: '{name}' is there and '{name.removesuffix(own)}{other}' is missing."
                    f" {_AGAIN}"
                )
    for name, stored in found.items():
        if name.endswith(_A):
            module = name.removesuffix(_A)
            a, b = stored.shape, found[module + _B].shape
            if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                raise ModelError(
                    f"{file}: the factors of '{module.removeprefix(PREFIX)}' have shapes {b} and"
                    f" {a}, which cannot be multiplied. {_AGAIN}"
                )
            shapes[module.removeprefix(PREFIX)] = (b[0], a[1])
    return shapes


def _check_targets(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], folder: Path
) -> None:
    """Refuse an adapter that lacks what its configuration names."""
    targets = config.get("target_modules")
    wanted = targets if isinstance(targets, list) else []
    absent = [t for t in wanted if not any(m == t or m.endswith(f".{t}") for m in shapes)]
    if absent or not shapes:
        what = few(sorted(absent)) if absent else "every factor"
        raise ModelError(
            f"{folder / TENSORS_FILE} lacks what {CONFIG_FILE} names: {what} is missing. {_AGAIN}"
        )
