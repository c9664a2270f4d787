"""The base model in memory, with adapter layers in place: loaded once, shared by all clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedllm.adapters import Adapter, initial
from fedllm.engine.forward import Forward
from fedllm.engine.lora import Active, ClientHead, LoRALinear, Slot, plain_weight
from fedllm.engine.norm import replace_rms_norms
from fedllm.models import LoadedModel, head_modules, linear_shape, target_modules

TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384}
"""On a CPU more gains nothing (measured, `benchmarks/passes.py`); on a GPU it fills the chip."""


class Resident:
    """A frozen model whose target layers apply whatever adapters are active.

    Args:
        loaded: The model; it is changed in place and must not be used elsewhere.
        targets: `auto`, `all-linear` or module names.
        dropout: Dropout of the low-rank path while training.
        tokens_per_pass: Most tokens in a pass, or `auto`.
        layout: `auto`, `packed` or `padded`.
        stop_ids: Tokens that end an answer, besides those the model itself names.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        targets: str | Sequence[str] = "auto",
        *,
        dropout: float = 0.0,
        tokens_per_pass: int | str = "auto",
        layout: str = "auto",
        stop_ids: Sequence[int] = (),
    ) -> None:
        model = loaded.model
        self.stop_ids = sorted({*stop_ids, *_own_stop_ids(loaded)})
        self.kind = loaded.kind
        self.model = model
        self.tokenizer = loaded.tokenizer
        self.device = model.device
        self.dtype = model.dtype
        self.dropout = dropout
        self.slot = Slot()
        self.is_wide = self.device.type == "cuda"
        self.tokens_per_pass = (
            TOKENS_PER_PASS.get(self.device.type, TOKENS_PER_PASS["cuda"])
            if isinstance(tokens_per_pass, str)
            else tokens_per_pass
        )
        self.heads = head_modules(model, loaded.kind)
        self.head_start = {
            f"{head}.{name}": parameter.detach().float().cpu().clone()
            for head in self.heads
            for name, parameter in model.get_submodule(head).named_parameters()
        }
        self.shapes: dict[str, tuple[int, int]] = {}
        self._wrap(target_modules(model, targets))
        pad_id = int(self.tokenizer.pad_token_id or 0)
        head = self.heads[0] if self.heads else None
        self.forward = Forward(model, loaded.kind, head, pad_id, layout)

    def _wrap(self, names: Sequence[str]) -> None:
        """Put the adapter layers in place of the target layers, heads and normalisations."""
        for index, name in enumerate(names):
            base = self.model.get_submodule(name)
            size = linear_shape(base)
            assert size is not None
            columns, rows = size
            self.shapes[name] = (rows, columns)
            replace_module(self.model, name, LoRALinear(base, name, self.slot, index))
        for head in self.heads:
            replace_module(
                self.model, head, ClientHead(self.model.get_submodule(head), head, self.slot)
            )
        replace_rms_norms(self.model)

    @property
    def is_packed(self) -> bool:
        """Whether passes are packed without padding."""
        return self.forward.is_packed

    def initial_adapter(self, rank: int, scaling: float, seed: int) -> Adapter:
        """Return the adapter all clients start from: the model's outputs are unchanged."""
        return initial(self.shapes, rank, scaling, seed, self.head_start)

    @property
    def conv1d_modules(self) -> tuple[str, ...]:
        """The target layers that store their weight as (in, out), as GPT-2's do."""
        layers = ((n, self.model.get_submodule(n)) for n in self.shapes)
        return tuple(n for n, m in layers if type(m.base).__name__ == "Conv1D")

    def base_weight(self, layer: str) -> Tensor:
        """Return the base weight (out, in) of an adapted layer in fp32, unpacked if quantised."""
        wrapped = self.model.get_submodule(layer)
        assert isinstance(wrapped, LoRALinear)
        base = wrapped.base
        weight, _ = plain_weight(base)
        if weight is not None:
            return weight.detach().float().cpu().contiguous()
        columns = self.shapes[layer][1]
        identity = torch.eye(columns, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            rows: Tensor = base(identity) - base(torch.zeros_like(identity))
        return rows.T.float().cpu().contiguous()

    @contextmanager
    def using(self, active: Active) -> Iterator[None]:
        """Apply these adapters inside the block."""
        self.slot.active = active
        try:
            yield
        finally:
            self.slot.active = None


def _own_stop_ids(loaded: LoadedModel) -> set[int]:
    """Return the tokens that end a text, as tokenizer and model say."""
    config = getattr(loaded.model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    found = [loaded.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return {int(token) for token in found if token is not None}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of one with this dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, last, module)
