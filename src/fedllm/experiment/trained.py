"""A trained thing opened: its base loaded afresh, its adapter put onto it, its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.adapters.native_format import CONFIG_FILE as NATIVE_FILE
from fedllm.errors import FedLLMError
from fedllm.results import Artifact, find_artifact, origin_of
from fedllm.seeding import derive

if TYPE_CHECKING:
    from fedllm.models import Kind, LoadedModel


@dataclass(frozen=True)
class Trained:
    """A run, an adapter or a model, and which of its adapters is meant."""

    artifact: Artifact
    adapter: Path | None
    """Folder of the adapter; None for whole weights."""
    label_names: Sequence[str] = ()
    """Class names of a classifier, where they are known."""

    @property
    def kind(self) -> Kind:
        """What the model does."""
        return "sequence-classification" if self.artifact.is_classifier else "causal-lm"

    @property
    def recorded_hash(self) -> str | None:
        """The hash of the base weights that the adapter was trained on, if it says so."""
        return None if self.adapter is None else origin_of(self.adapter).get("base_hash")

    def base(self, **changes: Any) -> LoadedModel:
        """Load the base, without quantisation, on its device or as `changes` say.

        Args:
            changes: Fields of `ModelConfig`, such as `dtype="float32"`.

        Raises:
            ModelError: If it cannot be loaded.
        """
        from fedllm.models import load_model

        config = self.artifact.model.model_copy(update={"quantization": "none", **changes})
        return load_model(
            config,
            kind=self.kind,
            num_labels=self._num_labels(),
            label_names=self.label_names,
            seed=derive(int(self.artifact.config.get("seed", 0)), "head"),
        )

    def whole(self, **changes: Any) -> LoadedModel:
        """Load the base with the adapter at work in it, and the tokenizer of the training.

        Raises:
            ModelError: If either cannot be loaded, the base is another than the adapter was trained
                on, or they do not fit.
        """
        from fedllm.models.quiet import quiet

        loaded = self.base(**changes)
        self.check_base(loaded)
        with quiet():
            model = self._adapted(loaded.model)
        return replace(loaded, model=model.eval(), tokenizer=self.tokenizer(loaded))

    def check_base(self, loaded: LoadedModel) -> None:
        """Refuse a base that is not the one the adapter was trained on.

        Raises:
            ModelError: If its hash differs from the recorded one.
        """
        from fedllm.models import base_hash, load_model
        from fedllm.results.export_verify import check_base

        config, recorded = self.artifact.model, self.recorded_hash
        if recorded is None or base_hash(loaded.model, loaded.kind) == recorded:
            return
        if config.quantization != "none":
            # the hash is that of the packed weights, so they are packed again
            model = load_model(config, kind=self.kind, num_labels=self._num_labels()).model
        else:
            # from fp32 every format that the training may have held can be had exactly
            model = self.base(dtype="float32", device="cpu").model
        check_base(model, loaded.kind, recorded, loaded.source)

    def tokenizer(self, loaded: LoadedModel) -> Any:
        """Return the tokenizer that lies beside the adapter, else the base's."""
        from fedllm.models.tokenizer import tokenizer_in

        own = self.artifact.tokenizer if self.artifact.kind != "federated" else None
        if own is None:
            return loaded.tokenizer
        return tokenizer_in(own, self.artifact.model.model_copy(update={"path": str(own)}))

    def _adapted(self, model: Any) -> Any:
        from fedllm.results.export_merge import merge_adapter

        if self.adapter is None:
            return model
        if (self.adapter / NATIVE_FILE).is_file():
            from fedllm.engine import attach

            return attach(model, self.adapter)
        return merge_adapter(model, self.adapter)

    def _num_labels(self) -> int:
        from fedllm.results.export_merge import num_labels_of

        if self.label_names or self.adapter is None or self.kind == "causal-lm":
            return len(self.label_names)
        return 0 if (self.adapter / NATIVE_FILE).is_file() else num_labels_of(self.adapter)


def open_trained(
    path: str | Path, *, base: str | None = None, client: int | None = None
) -> Trained:
    """Find what is at a path.

    Args:
        path: A run directory, an adapter's folder, a model's folder or name.
        base: The base model of an adapter, if not the one that it names.
        client: Whose adapter, of a federated run; None is the global one.

    Raises:
        FedLLMError: If there is nothing of the kind, or nothing of that client.
    """
    artifact = find_artifact(path, base)
    if client is not None and artifact.kind != "federated":
        raise FedLLMError(f"--client is for federated runs, and {path} is none; leave it out")
    return Trained(artifact, artifact.adapter_of(client))
