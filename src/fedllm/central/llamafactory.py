"""LLaMA-Factory's configuration files, read as they are. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.central.llamafactory_keys import IGNORED, INERT, REFUSED, RENAMED
from fedllm.central.llamafactory_values import CONVERTERS, Mapped
from fedllm.errors import ConfigError, did_you_mean

_KNOWN = sorted({*RENAMED, *CONVERTERS, *IGNORED, *REFUSED})


def is_llamafactory(tree: Mapping[str, Any]) -> bool:
    """Tell whether a raw tree is one of LLaMA-Factory's: its keys are flat."""
    return "model_name_or_path" in tree


def mapped(tree: Mapping[str, Any], source: str, folder: Path) -> Mapped:
    """Map every key of LLaMA-Factory's.

    Args:
        tree: Its file.
        source: Name of the file, for messages.
        folder: Where the file lies; its paths are as seen from where the command runs, or from
            there.

    Raises:
        ConfigError: If a key is unknown, or cannot be honoured and would change what is learned.
    """
    found, wrong = Mapped(), []
    for key, value in tree.items():
        if key in CONVERTERS:
            continue
        if value is None:
            found.ignored[key] = "not set"
        elif key in RENAMED:
            found.put(key, RENAMED[key], value)
        elif key in REFUSED and value not in INERT:
            wrong.append(f"{key}: {value!r} cannot be honoured: {REFUSED[key]}")
        elif key in REFUSED:
            found.ignored[key] = "has its neutral value"
        elif key in IGNORED or re.match(r"(swanlab|ray|kt|galore|apollo|badam|muon|sglang)_", key):
            found.ignored[key] = IGNORED.get(key, "belongs to something that is off")
        else:
            wrong.append(f"{key}: no key of LLaMA-Factory's.{did_you_mean(key, _KNOWN)}")
    for key, convert in CONVERTERS.items():
        if tree.get(key) is not None:
            problem = convert(found, tree, folder)
            wrong += [f"{key}: {problem}"] if problem else []
    if found.tree.get("training", {}).get("max_steps", 0) in (-1, None):
        del found.tree["training"]["max_steps"]
    if "max_steps" in found.tree.get("training", {}):
        found.tree["training"].pop("epochs", None)
    _set_defaults(found, tree)
    if wrong:
        raise ConfigError(wrong, f"{source} (of LLaMA-Factory)")
    return found


def _set_defaults(found: Mapped, tree: Mapping[str, Any]) -> None:
    """Put in LLaMA-Factory's own defaults where ours differ."""
    training = found.tree.setdefault("training", {})
    if "max_steps" not in training:
        training.setdefault("epochs", 3.0)
    training.setdefault("learning_rate", 5e-5)
    training.setdefault("scheduler", "linear")
    adapter = found.tree.setdefault("adapter", {})
    if adapter.get("method", "lora") == "lora":
        adapter.setdefault("targets", "all-linear")
    found.tree.setdefault("data", {}).setdefault("max_length", 2048)
    found.tree["data"].setdefault("overlong", "truncate")
    found.tree.setdefault("stage", "sft")
    found.tree.setdefault("evaluation", {}).setdefault("every", 0)
    found.tree.setdefault("checkpoint", {}).setdefault("every", 500)
    if "disable_gradient_checkpointing" not in tree:
        training.setdefault("gradient_checkpointing", True)
