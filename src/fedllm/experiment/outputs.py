"""What a run leaves of its adapters: the global view and each client's own, for other programs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedllm.adapters.native_format import is_routed, save_native
from fedllm.adapters.peft_format import save_peft
from fedllm.experiment.parts import Parts
from fedllm.federation import Payload, visible


def view_of(parts: Parts, cid: int | None = None) -> Payload:
    """Return the global view, or a client's with its private tensors."""
    state = parts.loop.store.get(cid) if cid is not None else None
    return parts.server.view(cid, state)


def personal_clients(parts: Parts) -> Iterable[int]:
    """Return the clients that have taken part and have a view of their own."""
    if parts.server.is_personal:
        return sorted(parts.server.contacts)
    store = parts.loop.store
    return [cid for cid in store.clients() if visible(store.get(cid))]


def write_adapter(parts: Parts, folder: Path, cid: int | None = None) -> None:
    """Write a view as PEFT reads it, or, where a router weighs paths, in our own layout."""
    payload = view_of(parts, cid)
    words = peft_words(parts, cid)
    if is_routed(payload.adapter) or payload.mix is not None:
        mix = payload.mix.shares if payload.mix is not None else {}
        save_native(payload.adapter, folder, base=payload.base, mix=mix, **native_words(words))
    else:
        save_peft(payload.adapter, folder, base=payload.base, **words)


def native_words(words: dict[str, Any]) -> dict[str, Any]:
    """Return those of PEFT's words that our own layout has, too."""
    return {key: words[key] for key in ("base_model", "task_type", "metadata")}


def peft_words(parts: Parts, cid: int | None = None) -> dict[str, Any]:
    """Return what an exported adapter says of itself."""
    held = parts.config.model.quantization
    return {
        "base_model": parts.loaded.source,
        "task_type": parts.task_type,
        "conv1d_modules": parts.engine.resident.conv1d_modules,
        "dropout": parts.config.adapter.dropout,
        "metadata": {
            "algorithm": parts.config.algorithm.name,
            "version": str(parts.server.version),
            "client": "global" if cid is None else str(cid),
            "base_hash": parts.loaded.base_hash,
            # the hash is that of the packed weights
            **({} if held == "none" else {"base_quantization": held}),
        },
    }
