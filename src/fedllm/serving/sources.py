"""What a path given to `fedllm serve` or `fedllm chat` is: a base model and named adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedllm.adapters.peft_check import CONFIG_FILE
from fedllm.adapters.reading import is_adapter, origin_of
from fedllm.config import ModelConfig
from fedllm.errors import ModelError, RunError
from fedllm.results import Artifact, find_artifact

BASE, GLOBAL = "base", "global"
"""Names of the base model as it is, and of what was trained."""


@dataclass(frozen=True)
class Source:
    """A base model, and the adapters that are served on it."""

    model: ModelConfig
    """The base, and the chat template that the adapters were trained with."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Name by which requests choose an adapter, to its folder."""
    plain: str = BASE
    """Name of the model without any adapter."""
    tokenizer: Path | None = None
    """A folder with the tokenizer, if it is not the base's."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the one that answers by default first."""
        return (*self.adapters, self.plain)


def find_source(path: str, changes: Mapping[str, Any] | None = None) -> Source:
    """Find out what a path stands for; of weights nothing is read.

    Args:
        path: A run directory, an adapter folder, a model folder, a hub id or `builtin:NAME`.
        changes: Fields of `ModelConfig` to set over what was recorded (`device`, say).

    Raises:
        RunError: If a run has nothing that can be served.
        ModelError: If an adapter folder does not name its base.
    """
    artifact = find_artifact(path)
    if artifact.is_classifier or artifact.model.kind == "sequence-classification":
        raise RunError(
            f"{path} is a classifier or a reward model: it judges texts and cannot write any."
            " Export it with --merged to use it elsewhere"
        )
    update = {key: value for key, value in (changes or {}).items() if value is not None}
    model = ModelConfig.model_validate(artifact.model.model_dump() | update)
    if artifact.adapter is None:
        return Source(model, plain=GLOBAL if artifact.kind == "central" else BASE)
    return Source(model, _adapters(artifact), tokenizer=artifact.tokenizer)


def with_adapters(source: Source, words: Mapping[str, Path]) -> Source:
    """Return the source with more adapters on the same base.

    Raises:
        ModelError: If a name is taken or a folder holds no adapter.
    """
    for name, folder in words.items():
        if name in source.names:
            raise ModelError(f"two models are called '{name}'; choose another name for {folder}")
        if not is_adapter(folder):
            raise ModelError(f"{folder} holds no adapter: it has no {CONFIG_FILE}")
    return replace(source, adapters={**source.adapters, **words})


def _adapters(artifact: Artifact) -> dict[str, Path]:
    """Return the adapters by name, clients' own after the global one."""
    assert artifact.adapter is not None
    client = str(origin_of(artifact.adapter).get("client", GLOBAL))
    named = {f"client-{client}" if client.isdigit() else GLOBAL: artifact.adapter}
    own = sorted(artifact.clients.items())
    return named | {f"client-{cid}": folder for cid, folder in own}
