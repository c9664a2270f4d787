"""Preference and rated rows for tests, and what they are worth by plain PEFT, a row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from engine_world import World, even_partition, make_world
from preference_worker import Sides, rows_of, side
from torch.nn import functional as F

from fedllm.config import TrainingConfig
from fedllm.data import TokenSet
from fedllm.engine import CohortEngine


def random_sides(rows: int, vocabulary: int, seed: int = 0) -> list[tuple[Sides, Sides]]:
    """Random prompts with two random answers each."""
    stream = np.random.default_rng(seed)

    def some(low: int, high: int) -> list[int]:
        return stream.integers(8, vocabulary, size=stream.integers(low, high)).tolist()

    found = []
    for _ in range(rows):
        prompt = some(3, 9)
        found.append(((prompt, some(2, 12)), (prompt, some(2, 12))))
    return found


def pair_set(rows: int, vocabulary: int, seed: int = 0) -> TokenSet:
    sides = random_sides(rows, vocabulary, seed)
    return replace(rows_of([a for a, _ in sides]), rejected=rows_of([b for _, b in sides]))


def rated_set(rows: int, vocabulary: int, seed: int = 0) -> TokenSet:
    sides = random_sides(rows, vocabulary, seed)
    stream = np.random.default_rng(seed + 1)
    return rows_of([a for a, _ in sides], (stream.random(rows) < 0.5).tolist())


def preference_world(
    folder: Path,
    kind: Literal["dpo", "kto"],
    *,
    sizes: Sequence[int] = (6, 3, 5),
    training: TrainingConfig | None = None,
    seed: int = 0,
    **rest: Any,
) -> World:
    """An engine whose clients hold random pairs, or random rated answers."""
    training = training or TrainingConfig(batch_size=4, max_grad_norm=0.0, learning_rate=1e-2)
    world = make_world(folder, sizes=sizes, training=training, **rest)
    vocabulary = world.resident.model.get_input_embeddings().weight.shape[0]
    make = pair_set if kind == "dpo" else rated_set
    data = make(sum(sizes), vocabulary, seed)
    world.engine = CohortEngine(world.resident, data, even_partition(sizes), world.plan)
    return world


def logp(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """The log-probability of an answer, by an ordinary forward pass."""
    ids = torch.tensor([*prompt, *answer], dtype=torch.long)[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
    each = F.log_softmax(logits.float(), dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return each[len(prompt) - 1 :].sum()


def plain_loss(model: Any, base: Any, tokens: TokenSet, rows: Sequence[int], beta: float) -> Any:
    """The mean sigmoid DPO loss of pairs, or KTO loss of rated rows, as in the papers."""
    with torch.no_grad():
        under_base = [logp(base, *side(tokens, row)) for row in rows]
    ratios = [logp(model, *side(tokens, r)) - b for r, b in zip(rows, under_base, strict=True)]
    if tokens.rejected is not None:
        worse = tokens.rejected
        for i, row in enumerate(rows):
            with torch.no_grad():
                under = logp(base, *side(worse, row))
            ratios[i] = ratios[i] - (logp(model, *side(worse, row)) - under)
        return torch.stack([-F.logsigmoid(beta * ratio) for ratio in ratios]).mean()
    assert tokens.desirable is not None
    prompts, answers = zip(*[side(tokens, row) for row in rows], strict=True)
    longest = int(tokens.lengths.max())
    crossed = zip(prompts, [answers[-1], *answers[:-1]], strict=True)
    cut = [(prompt, answer[: longest - len(prompt)]) for prompt, answer in crossed]
    with torch.no_grad():
        moved = [logp(model, p, a) - logp(base, p, a) for p, a in cut if a]
        drift = (torch.stack(moved).sum() / len(rows)).clamp(min=0)
    signs = [1.0 if tokens.desirable[row] else -1.0 for row in rows]
    return torch.stack(
        [
            1 - torch.sigmoid(beta * s * (ratio - drift))
            for s, ratio in zip(signs, ratios, strict=True)
        ]
    ).mean()
