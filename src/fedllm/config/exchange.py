"""What happens to messages: how they are packed, and what is done to updates that arrive."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat

from fedllm.config.section import Section


class Named(BaseModel):
    """A row of a table by its name, with settings of its own beside the name."""

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)

    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """The keys beside the name; checked by the table's own `problems`."""
        return dict(self.model_extra or {})


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Choice = Annotated[Named, BeforeValidator(_named)]
"""A name alone, or a mapping with the name and settings."""


class CommunicationConfig(Section):
    """How tensors travel; both what arrives and the bytes follow from it."""

    uplink: Choice = Field(default_factory=lambda: Named(name="fp32"))
    """`fp32`, `fp16`, `bf16`, `int8`, `nf4`, or `{name: topk, share: 0.1}`: the largest entries of
    each change, with error feedback. See `fedllm list codecs`."""
    downlink: Choice = Field(default_factory=lambda: Named(name="fp32"))
    """The same for what clients download; `topk` is for changes, so not possible here."""


class PrivacyConfig(Section):
    """Client-level differential privacy: clip each client's change, add noise to the mean."""

    clip: PositiveFloat
    """Largest Frobenius norm of a client's change, all shared tensors as one vector."""
    noise_multiplier: Annotated[float, Field(ge=0.0)]
    """Standard deviation of the noise on the sum of changes, in units of `clip`."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-5
    """Probability with which the guarantee may fail."""


class UpdatesConfig(Section):
    """What is done to updates between their arrival and the aggregation."""

    max_norm: PositiveFloat | None = None
    """Reject an update whose change against the download is larger than this."""
    robust: Choice = Field(default_factory=lambda: Named(name="mean"))
    """`mean`, `median`, `{name: trimmed-mean, share: 0.1}`, `{name: krum, byzantine: 1}`,
    `{name: multi-krum, byzantine: 1, keep: 3}` or `{name: norm-bound, bound: 1.0}`. See
    `fedllm list robust`."""
    privacy: PrivacyConfig | None = None
    """Client-level differential privacy; absent: none."""
