"""RMS normalisation as one autograd node instead of six."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """y = gain * x / sqrt(mean(x^2) + eps), with a frozen gain."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """Normalise over the last axis in fp32."""
        wide = x.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, rstd, gain)
        return (wide * rstd).to(x.dtype).mul_(gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the input."""
        x, rstd, gain = ctx.saved_tensors
        d = (grads[0] * gain).float()
        unit = x * rstd
        d.addcmul_(unit, (d * unit).mean(-1, keepdim=True), value=-1.0)
        return d.mul_(rstd).to(x.dtype), None, None


class FrozenRMSNorm(nn.Module):
    """Stands in for a model's RMS normalisation while its gain is frozen."""

    def __init__(self, gain: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("gain", gain, persistent=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last axis."""
        gain: Tensor = self.gain  # type: ignore[assignment]  # registered by its name
        if not (torch.is_grad_enabled() and x.requires_grad):
            return torch.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * gain
        out: Tensor = _RMSNorm.apply(x, gain, self.eps)  # type: ignore[no-untyped-call]  # untyped in torch
        return out


def replace_rms_norms(model: nn.Module) -> int:
    """Replace every RMS normalisation that one of our two formulas reproduces; return how many.

    Models write it in their own classes, with the gain as `weight` or as `1 + weight`. A layer is
    only replaced if, on a random input, the result is the same.
    """
    count = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not type(layer).__name__.endswith("RMSNorm"):
                continue
            found = _equivalent(layer)
            if found is not None:
                setattr(parent, name, found)
                count += 1
    return count


def _equivalent(layer: nn.Module) -> FrozenRMSNorm | None:
    weight = getattr(layer, "weight", None)
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[0], generator=stream).to(weight)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    for gain in (weight.detach(), (1.0 + weight.detach().float()).to(weight.dtype)):
        candidate = FrozenRMSNorm(gain, eps)
        with torch.no_grad():
            if torch.allclose(candidate(x), layer(x), rtol=tolerance, atol=tolerance):
                return candidate
    return None
