"""A trained thing opened: its base loaded afresh, its adapter put onto it, its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.adapters.reading import is_native, origin_of
from fedllm.errors import FedLLMError
from fedllm.results import Artifact, find_artifact
from fedllm.seeding import derive

if TYPE_CHECKING:
    from fedllm.config import ModelConfig
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
        if self.adapter is not None:
            require_base(self.adapter, self.artifact.model, loaded, self._num_labels())

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
        if is_native(self.adapter):
            from fedllm.engine.attach import attach

            return attach(model, self.adapter)
        return merge_adapter(model, self.adapter)

    def _num_labels(self) -> int:
        from fedllm.results.export_merge import num_labels_of

        if self.label_names or self.adapter is None or self.kind == "causal-lm":
            return len(self.label_names)
        return 0 if is_native(self.adapter) else num_labels_of(self.adapter)


def require_base(
    adapter: Path, config: ModelConfig, loaded: LoadedModel, num_labels: int = 0
) -> None:
    """Refuse a base that is not the one an adapter was trained on, however it is held now.

    Args:
        adapter: Its folder; one that records no hash goes with every base.
        config: Where the base comes from.
        loaded: The base.
        num_labels: Classes of a classifier.

    Raises:
        ModelError: If its hash differs from the recorded one.
    """
    from fedllm.models import load_model
    from fedllm.results.export_verify import check_base

    origin = origin_of(adapter)
    recorded, held = origin.get("base_hash"), origin.get("base_quantization", config.quantization)
    if recorded is None or loaded.base_hash == recorded:
        return
    # packed weights are packed again; from fp32 every format of others can be had exactly
    dtypes = ["float32"] if held == "none" else [config.dtype, "bfloat16", "float16", "float32"]
    for dtype in dict.fromkeys(dtypes):
        update = {"quantization": held, "dtype": dtype}
        update |= {"device": "cpu"} if held == "none" else {}
        again = load_model(
            config.model_copy(update=update), kind=loaded.kind, num_labels=num_labels
        )
        if again.base_hash == recorded:
            return
    check_base(again.model, loaded.kind, recorded, loaded.source)


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
