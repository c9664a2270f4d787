"""Adapters from their folders into the layers of a resident model, many at once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedllm.adapters import Adapter, Routing, is_a, is_b, is_router, module_of, name_a, name_b
from fedllm.adapters.native_format import CONFIG_FILE as NATIVE_CONFIG
from fedllm.adapters.native_format import load_native
from fedllm.adapters.peft_check import CONFIG_FILE, TENSORS_FILE
from fedllm.adapters.peft_format import ORIGIN_FILE
from fedllm.engine import Resident
from fedllm.engine.assembly import Sources, assembled
from fedllm.engine.buffers import Buffer
from fedllm.engine.lora import Active
from fedllm.errors import ModelError

_PREFIX, _SUFFIX = "base_model.model.", ".weight"
_FOREIGN = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings of PEFT under which an adapter is more than scaling * B A on linear layers."""


def read_adapter(folder: Path) -> Adapter:
    """Read a LoRA that PEFT, TRL or fedllm wrote, or an adapter in fedllm's own layout.

    Raises:
        ModelError: If the folder holds none, a damaged one, or one that is no plain LoRA.
    """
    if (folder / NATIVE_CONFIG).is_file():
        return _finite(load_native(folder), folder)
    config, stored = _files(folder)
    foreign = [key for key in _FOREIGN if config.get(key)]
    if config.get("peft_type") != "LORA" or foreign or config.get("bias", "none") != "none":
        what = foreign[0] if foreign else f"{config.get('peft_type')} bias={config.get('bias')}"
        raise ModelError(
            f"{folder} is no plain LoRA ({what}), so it cannot share a batch with others. Merge it"
            " into its base (fedllm export --merged) and serve the merged folder"
        )
    tensors = {_our_name(name): tensor.float() for name, tensor in stored.items()}
    strange = sorted(name for name in tensors if not (is_a(name) or is_b(name)))
    if strange:
        raise ModelError(f"{folder / TENSORS_FILE} holds '{strange[0]}', which is no LoRA factor")
    adapter = Adapter(tensors)
    for module in adapter.modules:
        if name_a(module) not in adapter or name_b(module) not in adapter:
            raise ModelError(f"{folder / TENSORS_FILE} has only one factor for {module}")
    return _finite(replace(adapter, scaling=_scaling(config, adapter)), folder)


def recorded_base(folder: Path) -> str | None:
    """Return the fingerprint of the base that an adapter was trained on, if it is recorded."""
    for name in (ORIGIN_FILE, NATIVE_CONFIG):
        if (folder / name).is_file():
            tree = json.loads((folder / name).read_text(encoding="utf-8"))
            found = tree.get("metadata", tree).get("base_hash")
            return None if found is None else str(found)
    return None


def together(adapters: Mapping[str, Adapter]) -> list[Adapter]:
    """Return adapters with the same tensors each, so that they can lie side by side.

    A path that an adapter lacks gets B = 0 there, and a router it lacks weighs only such paths.

    Raises:
        ModelError: If some have parts of another kind that others have not, or unequal routers.
    """
    everything = list(adapters.values())
    names = {name for adapter in everything for name in adapter}
    strange = [n for n in names if not (is_a(n) or is_b(n) or is_router(n))]
    missing = any(name not in adapter for adapter in everything for name in strange)
    routings = [adapter.routing for adapter in everything if adapter.routing is not None]
    if missing or len({(len(routing.slots), routing.top) for routing in routings}) > 1:
        raise ModelError(
            "these adapters are of kinds that cannot lie side by side (their routers or other parts"
            " differ in shape). Serve one adapter folder alone"
        )
    shapes = {name: tensor.shape for one in everything for name, tensor in one.tensors.items()}
    return [_filled(one, shapes, next(iter(routings), None)) for one in everything]


def activate(resident: Resident, adapters: Sequence[Adapter]) -> Active:
    """Put adapters, one a row, in the layout that the layers of a model apply."""
    buffer = Buffer(adapters, lambda name: True, resident.device)
    data = buffer.data.to(resident.dtype)
    layers = assembled(Sources(adapters, [(buffer, data)]), resident.shapes)
    return Active(modules=layers.low_ranks, sparse=layers.sparse)


def check_shapes(
    name: str, adapter: Adapter, shapes: Mapping[str, tuple[int, int]], model: str
) -> None:
    """Refuse an adapter that does not fit the layers of the base.

    Raises:
        ModelError: Naming the first tensor that does not fit.
    """
    for path in adapter.modules:
        layer = path.partition(":")[0]
        rows, columns = shapes[layer]
        a, b = adapter[name_a(path)], adapter[name_b(path)]
        if a.shape[1] != columns or b.shape[0] != rows or a.shape[0] != b.shape[1]:
            raise ModelError(
                f"adapter '{name}': {path} is ({b.shape[0]}, {a.shape[1]}) at ranks {b.shape[1]}"
                f" and {a.shape[0]}, and {model} has a layer of ({rows}, {columns}) there. Serve it"
                " on the base it was trained on"
            )


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    if not (folder / TENSORS_FILE).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "has its weights only as a pickle, which may run code" if pickled else "is incomplete"
        raise ModelError(f"{folder} {why}: {TENSORS_FILE} is missing. Save it with safetensors")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return config, load_file(folder / TENSORS_FILE)
    except Exception as error:
        # safetensors raises its own class, which is no public name, for a damaged file
        raise ModelError(f"{folder} cannot be read: {error}. Fetch the adapter again") from None


def _our_name(stored: str) -> str:
    return stored.removeprefix(_PREFIX).removesuffix(_SUFFIX)


def _scaling(config: Mapping[str, Any], adapter: Adapter) -> dict[str, float]:
    """Return alpha / r of every module, as PEFT finds it."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    found = {}
    for module in adapter.modules:
        match = next((k for k in patterns if re.match(rf"(.*\.)?({k})$", module)), None)
        alpha = float(config["lora_alpha"] if match is None else patterns[match])
        rank = adapter.rank_of(module)
        found[module] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return found


def _finite(adapter: Adapter, folder: Path) -> Adapter:
    for name, tensor in adapter.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{folder}: {name} holds values that are not finite. Train it again")
    return adapter


def _filled(adapter: Adapter, shapes: Mapping[str, torch.Size], routing: Routing | None) -> Adapter:
    """Return the adapter with paths that add nothing where it has none."""
    tensors, scaling = {}, {}
    for name, (rows, columns) in shapes.items():
        if name in adapter:
            tensors[name] = adapter[name]
        elif is_router(name):
            tensors[name] = torch.zeros(rows, columns)
        else:
            tensors[name] = torch.zeros((1, columns) if is_a(name) else (rows, 1))
        if not is_router(name):
            scaling[module_of(name)] = adapter.scaling.get(module_of(name), 1.0)
    return replace(adapter, tensors=tensors, scaling=scaling, routing=adapter.routing or routing)
