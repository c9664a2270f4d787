"""Rewards of drawn answers: by name, or a function of the user's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.errors import FedLLMError, did_you_mean
from fedllm.evaluation.metrics import final_number, normalise

Reward = Callable[[str, str], float]
"""From an answer and its reference to a number; more is better."""


def exact(answer: str, reference: str) -> float:
    """Return 1 for the reference's words, whatever their case and punctuation, else 0."""
    return float(normalise(answer) == normalise(reference))


def same_final_number(answer: str, reference: str) -> float:
    """Return 1 if the last number of the answer is the reference's, else 0."""
    own, wanted = final_number(answer), final_number(reference)
    return float(own is not None and own == wanted)


def short(answer: str, reference: str) -> float:
    """Return 1 for an answer no longer than the reference, less the longer it is, 0 for none."""
    if not answer.strip():
        return 0.0
    return min(1.0, max(len(reference), 1) / len(answer))


REWARDS: Mapping[str, Reward] = {
    "exact": exact,
    "final_number": same_final_number,
    "short": short,
}


def reward_function(name: str) -> Callable[..., list[float]]:
    """Return a reward as TRL calls it: with lists of texts.

    Args:
        name: One of `REWARDS`, or `FILE.py:FUNCTION`, a function of an answer and its reference.

    Raises:
        FedLLMError: If there is no such file or function.
    """
    judge = REWARDS[name] if name in REWARDS else _own(name)

    def reward(completions: Sequence[str], reference: Sequence[str], **_: Any) -> list[float]:
        pairs = zip(completions, reference, strict=True)
        return [float(judge(answer.strip(), wanted)) for answer, wanted in pairs]

    reward.__name__ = name.rpartition(":")[2]
    return reward


def _own(name: str) -> Reward:
    """Import a function from a file."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise FedLLMError(f"objective.rewards: there is no file {file}; write FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"fedllm_rewards_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FedLLMError(f"objective.rewards: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise FedLLMError(
            f"objective.rewards: {file} has no function '{function}'."
            f"{did_you_mean(function, known)}"
        )
    own: Reward = found
    return own
