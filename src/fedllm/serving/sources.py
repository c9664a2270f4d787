"""What a path given to `fedllm serve` or `fedllm chat` is: a base model and named adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedllm.adapters.native_format import CONFIG_FILE as NATIVE_CONFIG
from fedllm.adapters.peft_check import CONFIG_FILE as PEFT_CONFIG
from fedllm.adapters.peft_format import ORIGIN_FILE
from fedllm.config import ModelConfig, read
from fedllm.errors import ModelError, RunError
from fedllm.results import RunDir, latest_checkpoint

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
    folder = Path(path).expanduser()
    if (folder / "config.yaml").is_file():
        source = _run(folder)
    elif _is_adapter(folder):
        source = _adapter(folder)
    else:
        source = Source(ModelConfig(path=path))
    update = {key: value for key, value in (changes or {}).items() if value is not None}
    model = ModelConfig.model_validate(source.model.model_dump() | update)
    if model.kind == "sequence-classification":
        raise RunError(f"{path} is a classifier: it labels texts and cannot write any")
    return replace(source, model=model)


def with_adapters(source: Source, words: Mapping[str, Path]) -> Source:
    """Return the source with more adapters on the same base.

    Raises:
        ModelError: If a name is taken or a folder holds no adapter.
    """
    for name, folder in words.items():
        if name in source.names:
            raise ModelError(f"two models are called '{name}'; choose another name for {folder}")
        if not _is_adapter(folder):
            raise ModelError(f"{folder} holds no adapter: it has no {PEFT_CONFIG}")
    return replace(source, adapters={**source.adapters, **words})


def _run(folder: Path) -> Source:
    tree = read(folder / "config.yaml")
    model = _model_config(tree, folder)
    return _central(folder, model) if "stage" in tree else _federated(folder, model)


def _central(folder: Path, model: ModelConfig) -> Source:
    if _is_adapter(folder / "adapter"):
        adapter = folder / "adapter"
        return Source(model, {GLOBAL: adapter}, tokenizer=_tokenizer_in(adapter))
    if (folder / "model" / "config.json").is_file():
        whole = model.model_copy(update={"path": str(folder / "model"), "revision": None})
        return Source(whole, plain=GLOBAL)
    raise RunError(
        f"{folder} has no adapter/ and no model/ yet: its training has not ended. Finish it with:"
        f" fedllm train --resume {folder}"
    )


def _federated(folder: Path, model: ModelConfig) -> Source:
    checkpoint = latest_checkpoint(RunDir.open(folder))
    if checkpoint is None or not _is_adapter(checkpoint / "adapter"):
        raise RunError(
            f"{folder} has no checkpoint to serve. Continue it with: fedllm run --resume {folder}"
        )
    adapters = {GLOBAL: checkpoint / "adapter"}
    clients = [p for p in (checkpoint / "clients").glob("*") if _is_adapter(p / "adapter")]
    for client in sorted(clients, key=lambda p: (len(p.name), p.name)):
        adapters[f"client-{client.name}"] = client / "adapter"
    return Source(model, adapters)


def _adapter(folder: Path) -> Source:
    """Take the base from the run that an adapter lies in, else from what the adapter says."""
    run = next((p for p in folder.resolve().parents[:5] if (p / "config.yaml").is_file()), None)
    origin = _json(folder / ORIGIN_FILE) if (folder / ORIGIN_FILE).is_file() else {}
    client = str(origin.get("client", GLOBAL))
    name = f"client-{client}" if client.isdigit() else GLOBAL
    if run is not None and {"adapter", "clients"} & {*folder.resolve().relative_to(run).parts}:
        return Source(_model_config(read(run / "config.yaml"), run), {name: folder})
    if (folder / NATIVE_CONFIG).is_file():
        base = _json(folder / NATIVE_CONFIG).get("base_model")
    else:
        base = _json(folder / PEFT_CONFIG).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{folder} does not say which base model it belongs to. Write its folder or hub id as"
            f" base_model_name_or_path into {PEFT_CONFIG}"
        )
    return Source(ModelConfig(path=str(base)), {name: folder}, tokenizer=_tokenizer_in(folder))


def _model_config(tree: Mapping[str, Any], folder: Path) -> ModelConfig:
    """Read a run's model section; central runs have more in theirs than we need."""
    section = tree.get("model") or {}
    known = {key: section[key] for key in section if key in ModelConfig.model_fields}
    try:
        return ModelConfig.model_validate(known)
    except ValidationError as error:
        raise RunError(f"{folder / 'config.yaml'} is damaged: {error}") from None


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (PEFT_CONFIG, NATIVE_CONFIG))


def _tokenizer_in(folder: Path) -> Path | None:
    return folder if (folder / "tokenizer_config.json").is_file() else None


def _json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{file} must hold a JSON object")
    return tree
