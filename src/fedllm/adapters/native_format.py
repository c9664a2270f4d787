"""Our own layout of adapters that are no LoRA: experts with a router, paths mixed by instance.

    fedllm_adapter.json           everything but the tensors
    fedllm_adapter.safetensors    the tensors, fp32, under the names of `fedllm.adapters.names`

The JSON holds `format` (1), `base_model`, `task_type`, `scaling` (path to alpha / r), `routing`
(`slots`, the slot of the path that each output of a router stands for, and `top`, how many outputs
are kept), `mix` (slot to a constant weight on its paths) and `metadata`. A layer computes

    W x + sum over its paths p of  w_p * scaling_p * B_p A_p x

with w_p the sum of a router's kept outputs for p, softmax(R x) renormalised over the `top` largest,
or the constant of `mix`, or 1. `fedllm.attach(model, folder)` puts it onto a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm.adapters.adapter import Adapter, Routing
from fedllm.adapters.base_delta import BaseDelta
from fedllm.adapters.names import in_slot, is_router, name_a, name_b, slot_of
from fedllm.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "fedllm_adapter.json"
TENSORS_FILE = "fedllm_adapter.safetensors"
_BASE_SLOT = "base"
"""Slot of the path that holds what was merged into the base weights."""


def is_routed(adapter: Adapter) -> bool:
    """Tell whether routers weigh the adapter's paths."""
    return any(is_router(name) for name in adapter)


def save_native(
    adapter: Adapter,
    folder: Path,
    *,
    base_model: str,
    task_type: str,
    base: BaseDelta | None = None,
    mix: Mapping[str, float] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter of any kind.

    Args:
        adapter: What to write.
        folder: Made if missing; files that are there are replaced.
        base_model: Folder or hub id of the model the adapter belongs to.
        task_type: PEFT's name for what that model does.
        base: What has been merged into the base weights; becomes a path of its own.
        mix: Slot to the constant weight of its paths.
        metadata: Where the adapter comes from.
    """
    from safetensors.torch import save_file

    whole, routing = _with_base(adapter, base or BaseDelta()), adapter.routing
    config = {
        "format": 1,
        "base_model": base_model,
        "task_type": task_type,
        "scaling": dict(whole.scaling),
        "routing": None if routing is None else {"slots": routing.slots, "top": routing.top},
        "mix": dict(mix or {}),
        "metadata": {**(metadata or {}), "adapter_sha256": adapter.digest()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    flat = {n: t.detach().cpu().float().contiguous().clone() for n, t in whole.tensors.items()}
    save_file(flat, folder / TENSORS_FILE)


def _with_base(adapter: Adapter, base: BaseDelta) -> Adapter:
    """Return the adapter with a path for what was merged into the base."""
    tensors: dict[str, Tensor] = {}
    scaling: dict[str, float] = {}
    for layer, product in base.as_products().items():
        path = in_slot(layer, _BASE_SLOT)
        tensors |= {name_b(path): product.b, name_a(path): product.a}
        scaling[path] = 1.0
    return adapter.joined(Adapter(tensors, scaling))


def load_native(folder: Path) -> Adapter:
    """Read what `save_native` wrote; constant weights of paths are part of their scaling.

    Raises:
        ModelError: If the folder holds no such adapter, or one of a later format.
    """
    from safetensors.torch import load_file

    missing = [name for name in (CONFIG_FILE, TENSORS_FILE) if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} holds no adapter in fedllm's layout: {', '.join(missing)} is missing. An"
            " adapter with an adapter_config.json is read by PEFT"
        )
    config = json.loads((folder / CONFIG_FILE).read_text())
    if config.get("format") != 1:
        raise ModelError(
            f"{folder / CONFIG_FILE} is of format {config.get('format')!r}, and this version reads"
            " format 1; install a newer fedllm"
        )
    scaling = {p: s * config["mix"].get(slot_of(p), 1.0) for p, s in config["scaling"].items()}
    routing = config["routing"]
    return Adapter(
        load_file(folder / TENSORS_FILE),
        scaling,
        None if routing is None else Routing(tuple(routing["slots"]), routing["top"]),
    )
