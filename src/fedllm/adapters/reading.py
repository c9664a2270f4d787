"""Adapters in folders of either layout: what is one, and what is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.adapters.adapter import Adapter
from fedllm.adapters.native_format import CONFIG_FILE as NATIVE_CONFIG
from fedllm.adapters.native_format import TENSORS_FILE as NATIVE_TENSORS
from fedllm.adapters.native_format import load_native
from fedllm.adapters.peft_check import CONFIG_FILE as PEFT_CONFIG
from fedllm.adapters.peft_check import refuse_nonfinite
from fedllm.adapters.peft_format import ORIGIN_FILE, load_peft


def is_native(folder: Path) -> bool:
    """Tell whether a folder holds an adapter in fedllm's own layout, which PEFT cannot read."""
    return (folder / NATIVE_CONFIG).is_file()


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter, to go by its configuration."""
    return is_native(folder) or (folder / PEFT_CONFIG).is_file()


def load_adapter(folder: Path) -> Adapter:
    """Read a LoRA that PEFT, TRL or fedllm wrote, or an adapter in fedllm's own layout.

    Raises:
        ModelError: If the folder holds none, a damaged one, or one that is no plain LoRA.
    """
    if not is_native(folder):
        return load_peft(folder)
    adapter = load_native(folder)
    refuse_nonfinite(folder / NATIVE_TENSORS, adapter.tensors)
    return adapter


def settings_of(folder: Path) -> Mapping[str, Any]:
    """Return an adapter's configuration; empty where it cannot be read (who loads it says why)."""
    return _json(folder / (NATIVE_CONFIG if is_native(folder) else PEFT_CONFIG))


def origin_of(folder: Path) -> Mapping[str, str]:
    """Return where an adapter comes from, as fedllm recorded it; empty for others' adapters."""
    if is_native(folder):
        return dict(settings_of(folder).get("metadata") or {})
    return _json(folder / ORIGIN_FILE)


def _json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
