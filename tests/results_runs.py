"""Made-up runs, in the shapes the composition root writes, for the tests of the results layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.config import dump, validate
from fedllm.results.run_dir import RunDir
from fedllm.seeding import rng


def config_yaml(**sections: Any) -> str:
    config, problems = validate(sections)
    assert config is not None, problems
    return dump(config)


def learned(
    path: Path, *, num_clients: int = 8, rounds: int = 10, groups: int = 8, personal: bool = False
) -> RunDir:
    """A run that learns: evaluated every second round, two metrics above loss and perplexity."""
    text = config_yaml(algorithm="fedit", federation={"num_clients": num_clients, "rounds": rounds})
    run = RunDir.create(path, text)
    up = 16384 * num_clients
    for number in range(rounds + 1):
        record: dict[str, Any] = {"round": number, "virtual_time_s": 0.0}
        record["main_metric"] = "exact_match"
        record["bytes"] = {
            "up": up if number else 0,
            "down": 2 * up if number else 0,
            "up_total": number * up,
            "down_total": number * 2 * up,
        }
        if number:
            record["train"] = _training(number, num_clients)
            entries = [
                {"round": number, "client": c, "down_bytes": 32768, "up_bytes": 16384}
                for c in range(num_clients)
            ]
            run.append("ledger", entries)
        if number % 2 == 0 or number == rounds:
            record["eval"] = _evaluation(number, num_clients, personal)
        run.append("metrics", [record])
        run.append("timing", [{"round": number, "wall_s": 1.5}])
    counts = rng(0, "counts").dirichlet([0.4] * groups, num_clients) * 120
    names = [f"category {i}" for i in range(groups)]
    split = {"group_names": names, "counts": counts.round().astype(int).tolist()}
    run.write("heterogeneity.json", json.dumps(split))
    return run


def _training(number: int, num_clients: int) -> dict[str, Any]:
    draws = rng(1, "train", number).normal(0, 0.25, num_clients)
    losses = 0.4 + 2.4 * np.exp(-number / 3) + draws * np.exp(-number / 12)
    rows = [
        {"client": c, "loss": float(abs(x)), "steps": 10, "samples": 80}
        for c, x in enumerate(losses)
    ]
    return {"loss": float(losses.mean()), "tokens": 9000, "clients": rows}


def _evaluation(number: int, num_clients: int, personal: bool) -> dict[str, Any]:
    skill = 0.8 * (1 - float(np.exp(-number / 3)))
    result: dict[str, Any] = {"global": _metrics(skill), "clients": _views(skill, num_clients, 2)}
    if personal:
        result["personal"] = _views(min(skill * 1.15, 1.0), num_clients, 3)
    return result


def _views(skill: float, num_clients: int, stream: int) -> dict[str, Any]:
    spread = rng(stream, "views").uniform(0.6, 1.15, num_clients)
    clients = {str(c): _metrics(min(skill * float(x), 1.0)) for c, x in enumerate(spread)}
    worst = float(np.sort(spread)[: max(num_clients // 10, 1)].mean())
    return {
        "mean": _metrics(skill * float(spread.mean())),
        "worst_10": _metrics(skill * worst),
        "by_client": clients,
    }


def _metrics(skill: float) -> dict[str, float]:
    loss = 2.6 - 2.2 * skill
    return {
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "token_accuracy": 0.2 + 0.7 * skill,
        "exact_match": 0.9 * skill,
    }
