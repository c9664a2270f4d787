"""Which weights of a loaded model are trained, and how they are written down afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.adapters import Adapter, initial
from fedllm.adapters.names import name_a, name_b
from fedllm.adapters.peft_format import ORIGIN_FILE, save_peft
from fedllm.central.stages import STAGES
from fedllm.config import CentralConfig
from fedllm.errors import ModelError
from fedllm.models import Kind, LoadedModel, head_modules, linear_shape, target_modules
from fedllm.models.quiet import quiet
from fedllm.seeding import derive
from fedllm.starting import without_bitsandbytes

ADAPTER, MODEL = "adapter", "model"
"""Folder of a run that holds what was trained: by low rank, or whole weights."""


class Tuned:
    """A model of which some weights can be trained.

    Args:
        loaded: The base; it is changed.
        config: Which weights.
    """

    def __init__(self, loaded: LoadedModel, config: CentralConfig) -> None:
        self.loaded, self.config = loaded, config
        self.layers: tuple[str, ...] = ()
        """Layers that have an adapter."""
        self.conv1d: tuple[str, ...] = ()
        """Those of them that store their weight as (in, out), as GPT-2's do."""
        if config.adapter.method != "lora" or config.adapter.init == "pissa":
            loaded.base_hash  # noqa: B018  # read now, before weights of the base change
        self.half = autocast(config, loaded.model.dtype)
        """Dtype of the arithmetic while training, where it is not that of the weights."""
        self._is_mixed = config.adapter.method != "lora" and loaded.model.dtype != torch.float32
        if self._is_mixed and self.half is None:
            loaded.model.float()  # type: ignore[no-untyped-call]  # transformers' own
            self._is_mixed = False
        self.model: Any = loaded.model
        _make_differentiable(self.model)
        match config.adapter.method:
            case "lora":
                self._add_lora()
            case "freeze":
                layers = chosen_layers(self.model, loaded.kind, config.adapter.freeze_layers)
                _train(part for _, part in layers)
            case "full":
                _train([self.model])
        self.start = self._factors() if config.adapter.init == "pissa" else {}
        """The factors as they were, where part of the base moved into them."""

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Return the context in which weights of several dtypes can be multiplied."""
        if not self._is_mixed:
            return nullcontext()
        return torch.autocast(self.loaded.model.device.type, self.half)

    @property
    def body(self) -> Any:
        """The transformers model, with its adapters in it."""
        is_lora = self.config.adapter.method == "lora"
        return self.model.get_base_model() if is_lora else self.model

    @property
    def folder(self) -> str:
        """Name of the folder for what was trained."""
        return ADAPTER if self.config.adapter.method == "lora" else MODEL

    def trained(self) -> dict[str, Tensor]:
        """Return what is trained, by name."""
        named = self.model.named_parameters()
        return {name: tensor for name, tensor in named if tensor.requires_grad}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put trained tensors back that `trained` returned."""
        with torch.no_grad():
            for name, tensor in self.trained().items():
                tensor.copy_(tensors[name])

    def save(self, folder: Path, version: int) -> None:
        """Write what was trained, with the tokenizer and its template.

        Args:
            folder: Made if missing.
            version: Optimiser steps.
        """
        held = self.config.model.quantization
        origin = {
            "algorithm": f"central {self.config.stage}",
            "version": str(version),
            "client": "global",
            "base_hash": self.loaded.base_hash,
            # the hash is that of the packed weights
            **({} if held == "none" else {"base_quantization": held}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        if self.config.adapter.method != "lora":
            with quiet():
                self.model.save_pretrained(folder)
        elif self.config.adapter.dora:
            # lengths of columns have no place among low-rank factors
            self.model.save_pretrained(folder)
            (folder / "README.md").unlink(missing_ok=True)
            text = json.dumps(origin, indent=2, sort_keys=True)
            (folder / ORIGIN_FILE).write_text(text + "\n", encoding="utf-8")
        else:
            save_peft(
                self.adapter(),
                folder,
                base_model=self.loaded.source,
                task_type="CAUSAL_LM" if self.loaded.kind == "causal-lm" else "SEQ_CLS",
                conv1d_modules=self.conv1d,
                dropout=self.config.adapter.dropout,
                metadata=origin,
            )
        self.loaded.tokenizer.save_pretrained(folder)

    def adapter(self) -> Adapter:
        """Return what was trained as low-rank factors on the base as it was loaded."""
        now, scaling = self._factors(), self.config.adapter.scaling
        if self.start:
            # B A - B0 A0, where the base has lost B0 A0
            for layer in self.layers:
                a, b = name_a(layer), name_b(layer)
                now[b] = torch.cat([now[b], -self.start[b]], dim=1)
                now[a] = torch.cat([now[a], self.start[a]])
        heads = head_modules(self.body, self.loaded.kind)
        for name, tensor in self._head_tensors(heads):
            now[name] = tensor.detach().float().cpu().clone()
        return Adapter(now, dict.fromkeys(self.layers, scaling))

    def _head_tensors(self, heads: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
        for head in heads:
            module = self.body.get_submodule(head)
            kept = getattr(module, "modules_to_save", None)
            whole = kept["default"] if kept is not None else module
            if ".modules_to_save" in head:
                continue
            for name, tensor in whole.named_parameters():
                yield f"{head}.{name}", tensor

    def _factors(self) -> dict[str, Tensor]:
        """Copy both factors of every adapted layer, by our names."""
        found = {}
        for layer in self.layers:
            module = self.body.get_submodule(layer)
            for name, own in ((name_a(layer), module.lora_A), (name_b(layer), module.lora_B)):
                found[name] = own["default"].weight.detach().float().cpu().clone()
        return found

    def _add_lora(self) -> None:
        """Wrap layers in adapters that start as those of a federated run do."""
        from peft import LoraConfig, get_peft_model

        adapter, body = self.config.adapter, self.loaded.model
        self.layers = target_modules(body, adapter.targets)
        shapes = {}
        for name in self.layers:
            module = body.get_submodule(name)
            rows_columns = linear_shape(module)
            assert rows_columns is not None
            shapes[name] = (rows_columns[1], rows_columns[0])
            if type(module).__name__ == "Conv1D":
                self.conv1d = (*self.conv1d, name)
        settings = LoraConfig(
            task_type="CAUSAL_LM" if self.loaded.kind == "causal-lm" else "SEQ_CLS",
            base_model_name_or_path=self.loaded.source,
            r=adapter.rank,
            lora_alpha=adapter.scaling_alpha,  # type: ignore[arg-type]  # any number goes
            lora_dropout=adapter.dropout,
            use_rslora=adapter.rslora,
            use_dora=adapter.dora,
            init_lora_weights=True if adapter.init == "default" else adapter.init,
            target_modules=list(self.layers),
            fan_in_fan_out=bool(self.conv1d),
            modules_to_save=list(head_modules(body, self.loaded.kind)) or None,
        )
        # only quantised layers are wrapped by its means
        is_quantised = getattr(body, "is_quantized", False)
        with nullcontext() if is_quantised else without_bitsandbytes():
            self.model = get_peft_model(body, settings)
        if adapter.init == "default":
            seed = derive(self.config.seed, "adapter")
            start = initial(shapes, adapter.rank, adapter.scaling, seed)
            with torch.no_grad():
                for layer in self.layers:
                    own = self.body.get_submodule(layer).lora_A["default"].weight
                    own.copy_(start[name_a(layer)])


def autocast(config: CentralConfig, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype of the arithmetic where it is not that of the weights.

    Args:
        config: The checked configuration.
        dtype: In which the model is held.
    """
    match config.training.precision:
        case "bfloat16":
            return torch.bfloat16
        case "float16":
            return torch.float16
        case "auto" if dtype in (torch.bfloat16, torch.float16):
            return dtype
        case _:
            return None


def _unchanged(layer: nn.Module, mode: bool = True) -> nn.Module:
    return layer


def chosen_layers(model: Any, kind: Kind, count: int) -> list[tuple[str, nn.Module]]:
    """Return the layers that `freeze` trains, and the head of a reward model.

    Args:
        model: A transformers model.
        kind: What it does.
        count: How many of the last layers; a negative number means the first ones.

    Raises:
        ModelError: If it has no list of layers, or too short a one.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    name, layers = max(lists, key=lambda item: len(item[1]), default=("", nn.ModuleList()))
    if abs(count) > len(layers):
        raise ModelError(
            f"adapter.freeze_layers: {count}, but {type(model).__name__} has {len(layers)} layers"
            " in a list. Give fewer, or choose adapter.method: lora or full"
        )
    numbers = range(len(layers))[-count:] if count > 0 else range(-count)
    heads = head_modules(model, kind)
    return [
        *((f"{name}.{i}", layers[i]) for i in numbers),
        *((head, model.get_submodule(head)) for head in heads),
    ]


def _train(parts: Iterable[nn.Module]) -> None:
    """Let weights be trained, in fp32: steps of the optimiser are lost in fewer bits."""
    for part in parts:
        for parameter in part.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _make_differentiable(model: Any) -> None:
    """Undo what inference wants: a cache of keys and values, and packed 4-bit weights."""
    model.config.use_cache = False
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            # outside of training mode bitsandbytes repacks a CPU weight for inference, for good,
            # and the layer is then no longer differentiable; evaluations leave that mode
            layer.train = partial(_unchanged, layer)


def stage_kind(stage: str) -> Kind:
    """Return what the model of a stage does, as `fedllm.models` calls it."""
    return "sequence-classification" if STAGES[stage].trainer == "Reward" else "causal-lm"
