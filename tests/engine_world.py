"""A small engine world for tests: random rows, clients, plain PEFT beside it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from fedllm.adapters import Adapter, name_a, name_b
from fedllm.config import ModelConfig, TrainingConfig
from fedllm.data import Partition, TokenSet
from fedllm.engine import CohortEngine, Resident
from fedllm.federation import Job, Payload, Plan
from fedllm.models import load_model


def token_set(
    rows: int, vocabulary: int, *, seed: int = 0, low: int = 5, high: int = 24, classes: int = 0
) -> TokenSet:
    """Random rows whose second half is supervised; ids below 8 (special tokens) do not occur."""
    stream = np.random.default_rng(seed)
    lengths = stream.integers(low, high, size=rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = stream.integers(8, vocabulary, size=offsets[-1]).astype(np.int32)
    supervised = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    if classes:
        supervised[:] = False
    return TokenSet(
        tokens=tokens,
        supervised=supervised,
        offsets=offsets,
        prompt_lengths=(lengths // 2).astype(np.int32),
        labels=stream.integers(0, classes, size=rows) if classes else None,
        groups=None,
        references=("",) * rows,
    )


def even_partition(sizes: Sequence[int]) -> Partition:
    """Give consecutive rows to clients."""
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Partition(
        train_rows=np.arange(offsets[-1]),
        train_offsets=offsets,
        test_rows=np.arange(0),
        test_offsets=np.zeros(len(sizes) + 1, dtype=np.int64),
    )


@dataclass
class World:
    """An engine over a tiny model, and what plain PEFT needs to do the same."""

    folder: Path
    kind: str
    classes: int
    engine: CohortEngine
    plan: Plan

    @property
    def resident(self) -> Resident:
        return self.engine.resident

    def job(self, cid: int, adapter: Adapter, steps: int, **rest: Any) -> Job:
        return Job(
            cid=cid,
            payload=Payload(0, adapter),
            seed=1000 + cid,
            steps=steps,
            learning_rate=self.plan.training.learning_rate,
            **rest,
        )

    def fresh_model(self) -> torch.nn.Module:
        return load_model(
            ModelConfig(path=str(self.folder), dtype="float32", device="cpu"),
            kind=self.kind,
            num_labels=self.classes,
        ).model


def make_world(
    folder: Path,
    *,
    kind: str = "causal-lm",
    classes: int = 0,
    sizes: Sequence[int] = (6, 3, 9, 1),
    training: TrainingConfig | None = None,
    targets: str | list[str] = "auto",
    dropout: float = 0.0,
    tokens_per_pass: int = 10_000,
    layout: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
) -> World:
    loaded = load_model(
        ModelConfig(path=str(folder), dtype=dtype, device="cpu"),
        kind=kind,
        num_labels=classes,
    )
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    plan = Plan(training or TrainingConfig(batch_size=4, max_grad_norm=0.0), rounds=10)
    resident = Resident(
        loaded, targets, dropout=dropout, tokens_per_pass=tokens_per_pass, layout=layout
    )
    data = token_set(sum(sizes), vocabulary, classes=classes, seed=seed)
    engine = CohortEngine(resident, data, even_partition(sizes), plan)
    return World(folder, kind, classes, engine, plan)


def random_adapter(world: World, *, rank: int = 4, scaling: float = 1.5, seed: int = 3) -> Adapter:
    """An adapter whose B is not zero, so that all gradients are alive."""
    adapter = world.resident.initial_adapter(rank, scaling, seed)
    stream = torch.Generator().manual_seed(seed)
    return adapter.overlaid(
        {
            n: torch.randn(t.shape, generator=stream) * 0.1
            for n, t in adapter.tensors.items()
            if n.endswith(".lora_B")
        }
    )


def peft_model(world: World, adapter: Adapter) -> Any:
    """The same adapter in PEFT, on a freshly loaded base."""
    base = world.fresh_model()
    ranks = {m: adapter.rank_of(m) for m in adapter.modules}
    rank = max(ranks.values())
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=adapter.scaling[adapter.modules[0]] * rank,
        target_modules=list(adapter.modules),
        fan_in_fan_out="gpt2" in type(base).__name__.lower(),
        bias="none",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    model.eval()
    state = dict(model.named_parameters())
    with torch.no_grad():
        for module in adapter.modules:
            prefix = f"base_model.model.{module}"
            state[f"{prefix}.lora_A.default.weight"].copy_(adapter[name_a(module)])
            state[f"{prefix}.lora_B.default.weight"].copy_(adapter[name_b(module)])
    for name in adapter.heads:
        parameter = state[f"base_model.model.{name}"]
        parameter.requires_grad_(True)
        with torch.no_grad():
            parameter.copy_(adapter[name])
    return model


def peft_name(name: str) -> str:
    """Our tensor's name in PEFT."""
    if name.endswith((".lora_A", ".lora_B")):
        return f"base_model.model.{name}.default.weight"
    return f"base_model.model.{name}"


def peft_loss(world: World, model: Any, rows: Sequence[int]) -> torch.Tensor:
    """The mean loss over supervised tokens (or sequences) of these rows, one row at a time."""
    data = world.engine.tokens
    total, count = torch.zeros(()), 0
    for row in rows:
        begin, end = data.offsets[row], data.offsets[row + 1]
        ids = torch.tensor(data.tokens[begin:end].astype(np.int64))[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if data.labels is not None:
            target = torch.tensor([int(data.labels[row])])
            total = total + torch.nn.functional.cross_entropy(logits, target, reduction="sum")
            count += 1
            continue
        flags = torch.tensor(data.supervised[begin:end])[1:]
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        total = total + losses[flags].sum()
        count += int(flags.sum())
    return total / max(count, 1)
