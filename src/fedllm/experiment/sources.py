"""Where an export takes its parts from: a federated run restored, or files as they lie there."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.adapters.reading import origin_of
from fedllm.errors import FedLLMError
from fedllm.experiment.evaluate import check_client
from fedllm.experiment.outputs import view_of, write_adapter
from fedllm.experiment.run import restored
from fedllm.experiment.trained import Trained
from fedllm.results import find_artifact, merge_into

if TYPE_CHECKING:
    from fedllm.experiment.parts import Parts
    from fedllm.federation import Payload
    from fedllm.models import LoadedModel
    from fedllm.results import Artifact

_ADAPTER_FILES = ("adapter_*", "fedllm*.json", "fedllm*.safetensors", "README.md")
_NUM_PROMPTS, _MAX_PROMPT = 4, 256


@dataclass(frozen=True)
class Source:
    """What is exported, opened and checked."""

    trained: Trained
    """Its `adapter` is what would be written: of a federated run, the view that was asked for."""
    loaded: LoadedModel
    """The base as it was held in training; of a federated run, with adapter layers in it."""
    tokenizer: Any
    template: str | None
    """The chat template that training used; None where there was none."""
    prompts: Sequence[Sequence[int]]
    """Token ids to verify on."""
    payload: Payload | None = None
    """Of a federated run: the view itself."""

    def copy_adapter(self, folder: Path) -> None:
        """Copy the adapter's own files."""
        assert self.trained.adapter is not None
        for pattern in _ADAPTER_FILES:
            for file in self.trained.adapter.glob(pattern):
                shutil.copy2(file, folder / file.name)

    def merged(self, dtype: str) -> Any:
        """Return a fresh model on the CPU with the training in its weights.

        Raises:
            ModelError: If the adapter cannot be merged.
        """
        from fedllm.results.export_merge import merge_adapter

        model = self.trained.base(dtype=dtype, device="cpu").model
        if self.payload is not None:
            merge_into(model, self.payload.adapter, self.payload.base)
        elif self.trained.adapter is not None:
            model = merge_adapter(model, self.trained.adapter)
        return model


def source_of(
    path: Path,
    client: int | None,
    base: str | None,
    scratch: Path,
    say: Callable[[str], None],
) -> Source:
    """Open what is at a path for export.

    Args:
        path: A run, an adapter or a model.
        client: Whose view, of a federated run.
        base: The base model of an adapter, if not the one that it names.
        scratch: An empty folder for files on the way.
        say: Told what is being done.

    Raises:
        FedLLMError: If something is missing, damaged, or does not belong together.
    """
    artifact = find_artifact(path, base)
    if artifact.kind == "federated":
        return _federated(artifact, client, scratch, say)
    if client is not None:
        raise FedLLMError(f"--client is for federated runs, and {path} is none; leave it out")
    say("loading the model")
    if artifact.kind != "central" and artifact.model.dtype == "auto":
        stored = {"dtype": _stored_dtype(artifact)}
        artifact = replace(artifact, model=artifact.model.model_copy(update=stored))
    trained = Trained(artifact, artifact.adapter)
    loaded = trained.base(device="cpu")
    trained.check_base(loaded)
    tokenizer = trained.tokenizer(loaded)
    return Source(trained, loaded, tokenizer, _template(artifact, tokenizer), _built_in(tokenizer))


def _federated(
    artifact: Artifact, client: int | None, scratch: Path, say: Callable[[str], None]
) -> Source:
    """Restore a run: a client's view is put together from what the checkpoint holds."""
    from fedllm.data import chat_template
    from fedllm.results.export_verify import check_base

    parts, _ = restored(artifact.path, say)
    if client is not None:
        check_client(parts, client)
    assert artifact.adapter is not None
    recorded = origin_of(artifact.adapter).get("base_hash")
    if recorded is not None and recorded != parts.loaded.base_hash:
        plain = Trained(artifact, artifact.adapter, parts.dataset.label_names).base(device="cpu")
        check_base(plain.model, plain.kind, recorded, plain.source)
    write_adapter(parts, scratch / "adapter", client)
    has_talk = parts.kind == "causal-lm" and parts.dataset.task != "text"
    tokenizer: Any = parts.loaded.tokenizer
    return Source(
        trained=Trained(artifact, scratch / "adapter", parts.dataset.label_names),
        loaded=parts.loaded,
        tokenizer=tokenizer,
        template=chat_template(tokenizer, parts.config.model.chat_template) if has_talk else None,
        prompts=_prompts(parts),
        payload=view_of(parts, client),
    )


def _prompts(parts: Parts) -> list[list[int]]:
    """Return what the first test rows ask."""
    tokens = parts.dataset.test
    found = []
    for row in range(min(_NUM_PROMPTS, len(tokens))):
        ids, _ = tokens.row(row)
        length = int(tokens.prompt_lengths[row]) or len(ids)
        found.append(ids[: min(length, _MAX_PROMPT)].tolist())
    return found


def _stored_dtype(artifact: Artifact) -> str:
    """Return how most of the base's tensors are stored: an export keeps that."""
    from fedllm.models.sources import locate, stored_weights

    kinds = Counter(tensor.dtype for tensor in stored_weights(locate(artifact.model)).values())
    names = {"BF16": "bfloat16", "F16": "float16"}
    return names.get(kinds.most_common(1)[0][0] if kinds else "F32", "float32")


def _built_in(tokenizer: Any) -> list[list[int]]:
    from fedllm.results.export_verify import PROMPTS

    return [list(tokenizer(text)["input_ids"]) for text in PROMPTS]


def _template(artifact: Artifact, tokenizer: Any) -> str | None:
    """Return the template of the training: the one beside it, or as the run's file says."""
    from fedllm.data import chat_template

    if artifact.is_classifier:
        return None
    named = artifact.model.chat_template
    if named == "auto" and not tokenizer.chat_template:
        return None
    return chat_template(tokenizer, named)
