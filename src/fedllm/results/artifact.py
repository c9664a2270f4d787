"""What a path is: a federated or central run, an adapter, or a model; and what it was made from.

The one place that answers this, for export, evaluation and serving. It imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from fedllm.adapters.peft_check import CONFIG_FILE as PEFT_FILE
from fedllm.adapters.reading import is_adapter, origin_of, settings_of
from fedllm.config import ModelConfig
from fedllm.errors import ModelError, RunError
from fedllm.results.checkpoint import latest_checkpoint
from fedllm.results.run_dir import CONFIG_FILE, RunDir

ArtifactKind = Literal["federated", "central", "adapter", "model"]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Artifact:
    """A trained thing on the disk, and where its parts lie."""

    path: Path
    """What was asked for."""
    kind: ArtifactKind
    model: ModelConfig
    """How the base is loaded; where all weights were trained, how the result is."""
    adapter: Path | None = None
    """Folder of the adapter (a federated run's global one); None for whole weights."""
    clients: Mapping[int, Path] = field(default_factory=dict)
    """Folders of clients' own adapters, as far as the last checkpoint holds them."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """A run's configuration as it stands in its file; empty for others."""

    @property
    def is_classifier(self) -> bool:
        """Whether it tells classes rather than writes text."""
        if self.adapter is not None:
            return settings_of(self.adapter).get("task_type") == "SEQ_CLS"
        names = _architectures(Path(self.model.path) / "config.json")
        return str(names[0]).endswith("ForSequenceClassification")

    @property
    def tokenizer(self) -> Path | None:
        """The folder with the tokenizer that came with the training; None: the base's own."""
        folder = self.adapter if self.adapter is not None else Path(self.model.path)
        return folder if any((folder / name).is_file() for name in _TOKENIZERS) else None

    def adapter_of(self, client: int | None) -> Path | None:
        """Return the folder of the global adapter, or of a client's own.

        Raises:
            RunError: If that client has none here.
        """
        if client is None:
            return self.adapter
        if client not in self.clients:
            known = ", ".join(map(str, sorted(self.clients)[:10])) or "none"
            raise RunError(
                f"{self.path} holds no adapter of client {client}. Clients with one: {known}. They"
                " are written at the end of a run whose clients keep something of their own"
            )
        return self.clients[client]


def find_artifact(path: str | Path, base: str | None = None) -> Artifact:
    """Tell what is at a path.

    Args:
        path: A run directory, an adapter's folder, a model's folder, `builtin:NAME` or a hub id.
        base: The base model of an adapter, if not the one that it names.

    Raises:
        RunError: If a run has no result yet.
        ModelError: If there is nothing of the kind, or an adapter's base is not known.
    """
    folder = Path(path).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return _run(folder, base)
    if is_adapter(folder):
        return Artifact(folder, "adapter", _base_of(folder, base), folder)
    if base is not None:
        raise ModelError(f"--base is for adapters, and '{path}' holds no adapter; leave it out")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is no run ({CONFIG_FILE}), no adapter ({PEFT_FILE}) and no model"
            " (config.json). Give the folder of one of these"
        )
    # sources.locate says what is wrong with a name that leads nowhere
    return Artifact(folder, "model", ModelConfig(path=str(path)))


def _run(folder: Path, base: str | None) -> Artifact:
    if base is not None:
        raise RunError(f"{folder} is a run, which names its base model itself; leave --base out")
    tree = _configuration(folder / CONFIG_FILE)
    model = _model_of(folder, tree)
    if "stage" in tree:
        return _central(folder, model, tree)
    run = RunDir.open(folder)
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise RunError(
            f"{folder} has no checkpoint yet; finish it with: fedllm run --resume {folder}"
        )
    own = {int(place.parent.name): place for place in checkpoint.glob("clients/*/adapter")}
    return Artifact(folder, "federated", model, checkpoint / "adapter", own, tree)


def _base_of(folder: Path, base: str | None) -> ModelConfig:
    """Return how an adapter's base is loaded: as the run says that it lies in, or as it says."""
    place = folder.resolve()
    run = next((p for p in place.parents[:5] if (p / CONFIG_FILE).is_file()), None)
    if (
        base is None
        and run is not None
        and {"adapter", "clients"} & {*place.relative_to(run).parts}
    ):
        return _model_of(run, _configuration(run / CONFIG_FILE))
    named = settings_of(folder)
    own = base or named.get("base_model_name_or_path") or named.get("base_model")
    if not own:
        raise ModelError(
            f"{folder} does not name its base model. Write its folder or hub id as"
            f" base_model_name_or_path into {PEFT_FILE}, or give it to eval and export with"
            " --base MODEL"
        )
    held = origin_of(folder).get("base_quantization", "none")
    return ModelConfig.model_validate({"path": str(own), "quantization": held})


def _model_of(folder: Path, tree: Mapping[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.model_validate(tree.get("model") or {})
    except ValidationError as error:
        raise RunError(f"{folder / CONFIG_FILE}: model: {error.errors()[0]['msg']}") from None


def _central(folder: Path, model: ModelConfig, tree: Mapping[str, Any]) -> Artifact:
    if is_adapter(folder / "adapter"):
        return Artifact(folder, "central", model, folder / "adapter", config=tree)
    if (folder / "model").is_dir():
        whole = {"path": str(folder / "model"), "revision": None, "quantization": "none"}
        return Artifact(folder, "central", model.model_copy(update=whole), config=tree)
    raise RunError(
        f"{folder} has neither adapter/ nor model/, so its training has not ended; finish it with:"
        f" fedllm train --resume {folder}"
    )


def _configuration(file: Path) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RunError(f"{file} is not YAML: {error}. Restore it from a copy") from None
    return tree if isinstance(tree, dict) else {}


def _architectures(file: Path) -> list[str]:
    """Return the classes that a model's file names; whoever loads it says what is wrong."""
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["architectures"]) or [""]
    except (OSError, ValueError, LookupError, TypeError):
        return [""]
