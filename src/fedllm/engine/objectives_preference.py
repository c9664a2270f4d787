"""Losses of preferences (DPO) and of ratings (KTO), from the log-probabilities of whole answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedllm.config import TrainingConfig


def pair_losses(ratios: Tensor, counts: Tensor, training: TrainingConfig) -> Tensor:
    """Return the DPO loss of each pair, (n,).

    Paper: Rafailov et al., 2023 (arXiv:2305.18290), equation 7; hinge: Zhao et al., 2023
    (arXiv:2305.10425); ipo: Azar et al., 2024 (arXiv:2310.12036), equation 17, over means of
    tokens; robust: Chowdhury et al., 2024 (arXiv:2403.00409). All as TRL has them.

    Args:
        ratios: fp32 (n, 2): log(model / base) of the better and the worse answer.
        counts: (n, 2): tokens of each answer.
        training: `loss_type`, `beta` and `label_smoothing`.
    """
    margin = training.beta * (ratios[:, 0] - ratios[:, 1])
    match training.loss_type:
        case "sigmoid":
            return -F.logsigmoid(margin)
        case "hinge":
            return torch.relu(1.0 - margin)
        case "ipo":
            means = ratios / counts.clamp(min=1)
            return (means[:, 0] - means[:, 1] - 1.0 / (2.0 * training.beta)) ** 2
        case "robust":
            swapped = training.label_smoothing
            kept = (1.0 - swapped) * F.logsigmoid(margin) - swapped * F.logsigmoid(-margin)
            return -kept / (1.0 - 2.0 * swapped)


def rated_losses(
    ratios: Tensor, drift: Tensor, is_desirable: Tensor, training: TrainingConfig
) -> Tensor:
    """Return the KTO loss of each rated answer, (n,), as TRL has it.

    Paper: Ethayarajh et al., 2024 (arXiv:2402.01306), equation 7; `drift` is its z_0.

    Args:
        ratios: fp32 (n,): log(model / base) of the answer.
        drift: fp32 (n,): the estimate of KL(model, base) for the row's client; no gradient.
        is_desirable: bool (n,).
        training: `beta` and the two weights.
    """
    sign = torch.where(is_desirable, 1.0, -1.0)
    weight = torch.where(is_desirable, training.desirable_weight, training.undesirable_weight)
    return weight * (1.0 - torch.sigmoid(training.beta * sign * (ratios - drift)))
