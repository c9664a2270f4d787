"""The base of every part of the configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """A frozen part of the tree that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
