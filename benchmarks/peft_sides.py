"""The other sides: PEFT as the published reference uses it, and PEFT done well."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import torch
from torch.nn import functional as F

from benchmarks.workload import BATCH, RANK, STEPS
from fedllm.data import TokenSet

_PAD_TO = 512


def adapted(model: torch.nn.Module) -> Any:
    """Return the model with PEFT's LoRA on query and value."""
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(model, config)


def batch(data: TokenSet, chosen: np.ndarray, length: int | None) -> dict[str, torch.Tensor]:
    """Return padded ids, mask and labels of these rows: to `length`, or to the longest."""
    lengths = data.lengths[chosen]
    width = length or int(lengths.max())
    ids = np.zeros((len(chosen), width), dtype=np.int64)
    labels = np.full(ids.shape, -100, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(chosen):
        tokens, supervised = data.row(int(row))
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
        labels[i, : len(tokens)] = np.where(supervised, tokens, -100)
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
    }


def train(model: Any, data: TokenSet, clients: int, *, padded_to_512: bool) -> float:
    """Train one client after another; return the useful tokens."""
    device = next(model.parameters()).device
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    start = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    useful = 0
    for client in range(clients):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        for step in range(STEPS):
            chosen = np.arange(BATCH) + (client * STEPS + step) * BATCH
            inputs = batch(data, chosen, _PAD_TO if padded_to_512 else None)
            loss = model(**{k: v.to(device) for k, v in inputs.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            useful += int(data.lengths[chosen].sum())
    return float(useful)


@torch.no_grad()
def evaluate(model: Any, data: TokenSet, count: int) -> float:
    """Score rows one at a time, padded to 512, as the reference does; return the useful tokens."""
    device = next(model.parameters()).device
    model.eval()
    for row in range(count):
        inputs = {k: v.to(device) for k, v in batch(data, np.array([row]), _PAD_TO).items()}
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
        targets = inputs["labels"][0, 1:]
        float(F.cross_entropy(logits[0, :-1].float(), targets, ignore_index=-100))
    return float(data.lengths[:count].sum())
