"""Adapters on disk as PEFT reads them: `adapter_config.json` and `adapter_model.safetensors`.

A third file, `fedllm.json`, says where the adapter comes from. It is not part of the safetensors
header because that library orders header entries at random: as it is, equal adapters make equal
files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedllm.adapters.adapter import Adapter, Product
from fedllm.adapters.base_delta import BaseDelta
from fedllm.adapters.lazy import LazyModule
from fedllm.adapters.names import (
    is_a,
    is_b,
    is_head,
    is_router,
    layer_of,
    name_a,
    name_b,
    name_core,
    name_values,
)
from fedllm.adapters.peft_check import (
    CONFIG_FILE,
    PREFIX,
    TENSORS_FILE,
    check_peft,
    refuse_nonfinite,
)
from fedllm.errors import ModelError
from fedllm.starting import import_peft

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]
"""PEFT's names for the kinds of model."""

ORIGIN_FILE = "fedllm.json"

_SUFFIX = ".weight"
_MORE_THAN_LORA = (
    "use_dora",
    "lora_bias",
    "layer_replication",
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
_HEAD_ENDINGS = ("classifier", "score")


def save_peft(
    adapter: Adapter,
    folder: Path,
    *,
    base_model: str,
    task_type: TaskType,
    base: BaseDelta | None = None,
    conv1d_modules: Collection[str] = (),
    dropout: float = 0.0,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained(model, folder)` loads, in fp32.

    The loaded model computes W + scaling * B @ A + the base delta. Files of an adapter that is
    already there are replaced.

    Args:
        adapter: Both factors of every module, and the tensors of a trained head, if any.
        folder: Made if missing.
        base_model: Folder or hub id of the model the adapter belongs to.
        task_type: What that model does.
        base: What has been merged into the base weights; exported as extra rank.
        conv1d_modules: Modules whose weight is stored (in, out), as GPT-2's are.
        dropout: Dropout the adapter was trained with.
        metadata: Where the adapter comes from (algorithm, version, ...), for `fedllm.json`.
    """
    whole = folded(adapter, base or BaseDelta())
    config = _config(whole, base_model, task_type, conv1d_modules, dropout)
    origin = {**(metadata or {}), "adapter_sha256": adapter.digest()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(_json(config), encoding="utf-8")
    (folder / TENSORS_FILE).write_bytes(_tensor_bytes(whole))
    (folder / ORIGIN_FILE).write_text(_json(origin), encoding="utf-8")


def load_peft(folder: Path) -> Adapter:
    """Read a plain LoRA that fedllm, PEFT or TRL wrote, in fp32.

    Of what `save_peft` wrote, a base delta is then part of the factors.

    Raises:
        ModelError: If the folder holds no adapter, a damaged one, or one that does more than add
            scaling * B A to linear layers.
    """
    from safetensors.torch import load_file

    config, _ = check_peft(folder)
    more = [key for key in _MORE_THAN_LORA if config.get(key)]
    more += [f"bias: {config['bias']}"] if config.get("bias", "none") != "none" else []
    if more:
        raise ModelError(
            f"{folder} is no plain LoRA ({more[0]}), so it cannot stand beside the weights here."
            f" Merge it: fedllm export {folder} --to MERGED --merged; then use the folder MERGED"
        )
    stored = load_file(folder / TENSORS_FILE)
    refuse_nonfinite(folder / TENSORS_FILE, stored)
    adapter = Adapter({_our_name(name): tensor.float() for name, tensor in stored.items()})
    return Adapter(adapter.tensors, _scaling(config, adapter))


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


def folded(adapter: Adapter, base: BaseDelta) -> Adapter:
    """Return one adapter that does exactly what the adapter and the base delta do together.

    A layer with one plain path stays as it is. One with several paths, a core, a sparse change or a
    delta becomes [B_1, B_2, ...] @ [s_1 A_1; s_2 A_2; ...] with scaling 1; no rank exceeds
    min(out, in), and a path with B = 0 takes no rank.

    Raises:
        ModelError: If a router weighs the paths: no LoRA does the same.
    """
    if any(is_router(name) for name in adapter):
        raise ModelError(
            "an adapter whose paths are weighed by a router is no LoRA; it has no PEFT layout and"
            " cannot be merged. It is exported in fedllm's own layout, see `fedllm.attach`"
        )
    tensors = {name: adapter[name] for name in adapter.heads}
    scaling: dict[str, float] = {}
    added = base.as_products()
    for layer in dict.fromkeys((*adapter.layers, *added)):
        paths = [path for path in adapter.modules if layer_of(path) == layer]
        if paths == [layer] and layer not in added and name_core(layer) not in adapter:
            tensors |= {name: adapter[name] for name in (name_a(layer), name_b(layer))}
            scaling[layer] = adapter.scaling[layer]
            continue
        tensors[name_b(layer)], tensors[name_a(layer)] = _compact(
            _whole(adapter, layer, paths, added.get(layer))
        )
        scaling[layer] = 1.0
    return Adapter(tensors, scaling)


def _whole(adapter: Adapter, layer: str, paths: Sequence[str], added: Product | None) -> Product:
    """Return all that is added to a layer as one product."""
    products = [adapter.product(path) for path in paths]
    parts = [product for product in products if product.b.any()]
    if name_values(layer) in adapter:
        parts += BaseDelta(dense={layer: adapter.sparse(layer)}).as_products().values()
    parts += [added] if added is not None else []
    if not parts:
        return products[0]
    return Product(torch.cat([p.b for p in parts], dim=1), torch.cat([p.a for p in parts]))


def head_module(name: str) -> str:
    """Return the module PEFT must keep in full so that it holds this head tensor.

    >>> head_module("classifier.dense.weight")
    'classifier'
    """
    *path, _ = name.split(".")
    for depth, part in enumerate(path, start=1):
        if part.endswith(_HEAD_ENDINGS):
            return ".".join(path[:depth])
    return ".".join(path)


def _compact(product: Product) -> Product:
    """Return the same matrix at a rank of at most min(out, in)."""
    b, a = product
    if b.shape[1] <= min(b.shape[0], a.shape[1]):
        return product
    return BaseDelta(dense={"": product.dense()}).as_products()[""]


def _config(
    adapter: Adapter,
    base_model: str,
    task_type: TaskType,
    conv1d_modules: Collection[str],
    dropout: float,
) -> dict[str, Any]:
    """Return PEFT's configuration: the commonest rank and alpha, and the modules that differ."""
    import_peft()
    from peft import LoraConfig

    ranks = {module: adapter.rank_of(module) for module in adapter.modules}
    alphas = {module: adapter.scaling[module] * rank for module, rank in ranks.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    config = LoraConfig(
        task_type=task_type,
        base_model_name_or_path=base_model,
        inference_mode=True,
        target_modules=list(ranks),
        r=rank,
        lora_alpha=alpha,
        rank_pattern={m: r for m, r in ranks.items() if r != rank},
        alpha_pattern={m: a for m, a in alphas.items() if a != alpha},
        lora_dropout=dropout,
        fan_in_fan_out=any(module in conv1d_modules for module in ranks),
        modules_to_save=sorted({head_module(name) for name in adapter.heads}) or None,
    )
    tree: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]  # PEFT's
    return tree


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _tensor_bytes(adapter: Adapter) -> bytes:
    from safetensors.torch import save

    tensors = {
        _peft_name(name): tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in adapter.tensors.items()
    }
    return save(tensors, {"format": "pt"})


def _peft_name(name: str) -> str:
    return PREFIX + name + ("" if is_head(name) else _SUFFIX)


def _our_name(stored: str) -> str:
    name = stored.removeprefix(PREFIX)
    factor = name.removesuffix(_SUFFIX)
    return factor if is_a(factor) or is_b(factor) else name


def _json(tree: Mapping[str, Any]) -> str:
    # PEFT keeps module names in sets, whose order changes from process to process
    return json.dumps(tree, indent=2, sort_keys=True, default=sorted) + "\n"
