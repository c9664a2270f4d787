"""From a configuration to a frozen model with its tokenizer, on its device."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedllm.config import ModelConfig
from fedllm.errors import MissingExtraError, ModelError
from fedllm.models.architecture import AUTO_CLASSES, read_architecture, skeleton
from fedllm.models.hardware import resolve_device, resolve_dtype
from fedllm.models.quiet import quiet
from fedllm.models.sources import locate, reported
from fedllm.models.targets import Kind, head_modules, head_tensors, output_embedding
from fedllm.models.tokenizer import tokenizer_in
from fedllm.models.values import refuse_nonfinite, refuse_unexpected, told
from fedllm.seeding import rng
from fedllm.weights import few

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A frozen base model and its tokenizer."""

    model: PreTrainedModel
    """In evaluation mode, without gradients, on its device."""
    tokenizer: PreTrainedTokenizerBase
    """Has a padding token."""
    kind: Kind
    """What the model does."""
    source: str
    """`model.path` as it was given."""
    base: tuple[tuple[str, Tensor], ...] = field(repr=False)
    """Name and tensor of every base parameter as loaded, without a classification head."""

    @cached_property
    def base_hash(self) -> str:
        """Fingerprint of the base weights, the same before and after layers are wrapped.

        Reads every weight once when first asked for: about a second per gigabyte.
        """
        return _digest(self.base)


def load_model(
    config: ModelConfig,
    *,
    kind: Kind,
    num_labels: int = 0,
    label_names: Sequence[str] = (),
    seed: int = 0,
) -> LoadedModel:
    """Load the base model and its tokenizer; global random generators are left as they were.

    A classification head that the checkpoint has in the right size is kept. Otherwise a new one
    is drawn from (seed, tensor name): the same on every machine, up to rounding to the dtype.

    Args:
        config: Which model, and how to hold it.
        kind: What the model will do (see `resolve_kind`).
        num_labels: Number of classes of a classifier; 0 takes the number of names, else what
            the model's own config says.
        label_names: Name of each class, in the order of the class ids.
        seed: Root of the random streams for a new head.

    Raises:
        ModelError: If the model cannot be found, read or adapted, or does not fit `kind`.
        MissingExtraError: If quantisation is asked for and bitsandbytes is not installed.
        ValueError: If `num_labels` and `label_names` disagree.
    """
    if label_names and num_labels not in (0, len(label_names)):
        raise ValueError(f"{num_labels} labels but {len(label_names)} label names")
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    folder = locate(config)
    architecture = read_architecture(folder, config, kind, num_labels, label_names)
    extra = _quantization(architecture, config, kind, dtype, device)
    tokenizer = tokenizer_in(folder, config)
    model, fresh = _read_weights(folder, architecture, config, kind, {"dtype": dtype, **extra})
    _draw(model, fresh, seed)
    _check_vocabulary(model, tokenizer, config.path)
    model.config.pad_token_id = tokenizer.pad_token_id
    _freeze(model, config, device)
    return LoadedModel(model, tokenizer, kind, config.path, tuple(_base(model, kind)))


def _freeze(model: PreTrainedModel, config: ModelConfig, device: torch.device) -> None:
    """Turn training off and move the model to its device (quantised ones are there already)."""
    model.requires_grad_(False)
    model.train(False)
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            # outside of training mode bitsandbytes repacks a CPU weight for inference, for good,
            # and the layer is then no longer differentiable
            layer.train(True)
    if config.quantization == "none":
        with reported(f"move '{config.path}' to {device}", "Choose another model.device."):
            nn.Module.to(model, device)


def base_hash(
    model: PreTrainedModel, kind: Kind = "causal-lm", dtype: torch.dtype | None = None
) -> str:
    """Return the SHA-256 over names, shapes, dtypes and bytes of the base weights.

    A classification head does not count, tied weights count once. Layers must not be wrapped
    yet, since wrapping renames them; `LoadedModel.base_hash` may be asked for at any time. Reads
    every weight once: about a second per gigabyte.

    Args:
        model: Not modified.
        kind: Says which parameters are a head.
        dtype: Asks for the fingerprint of the same weights rounded to this format.
    """
    own = _base(model, kind)
    return _digest(own if dtype is None else ((name, t.to(dtype)) for name, t in own))


def _quantization(
    architecture: PreTrainedConfig,
    config: ModelConfig,
    kind: Kind,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Return the extra arguments that make transformers load a quantised base."""
    if config.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            "bitsandbytes", "quant", f"model.quantization '{config.quantization}'"
        )
    shape = skeleton(architecture, config, kind)
    kept = [*head_modules(shape, kind), output_embedding(shape)]
    bits: dict[str, Any] = {"load_in_8bit": True}
    if config.quantization == "4bit":
        bits = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
        }
    return {
        "quantization_config": BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            llm_int8_skip_modules=[name for name in kept if name], **bits
        ),
        "device_map": {"": device},
    }


def _read_weights(
    folder: Path,
    architecture: PreTrainedConfig,
    config: ModelConfig,
    kind: Kind,
    arguments: dict[str, Any],
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Read the safetensors; return the model and the parameters the checkpoint did not have."""
    remedy = (
        "If a file is damaged or incomplete, fetch the model again; if memory is short, choose a"
        " smaller model, model.dtype=bfloat16 or model.quantization."
    )
    # transformers fills what is missing from the global generators; they get their state back
    devices = [item for item in arguments.get("device_map", {}).values() if item.type == "cuda"]
    with quiet(), reported(f"load '{config.path}'", remedy), torch.random.fork_rng(devices):
        model, info = AUTO_CLASSES[kind].from_pretrained(
            folder,
            config=architecture,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=config.trust_remote_code,
            **arguments,
        )
    mismatched = [key[0] for key in info["mismatched_keys"]]
    fresh = {*info["missing_keys"], *mismatched}
    _check_fresh(model, kind, fresh, folder, config.path)
    refuse_unexpected(model, kind, info["unexpected_keys"], config.path)
    refuse_nonfinite(model, folder)
    return model, tuple(name for name, _ in model.named_parameters() if name in fresh)


def _check_fresh(
    model: PreTrainedModel, kind: Kind, fresh: set[str], folder: Path, source: str
) -> None:
    """Allow new tensors only in a classification head and the pooler before it."""
    heads = set(head_tensors(model, kind))
    if kind == "sequence-classification" and not heads:
        raise ModelError(
            f"'{source}' becomes a {type(model).__name__}, whose classification head has neither"
            " of the names that PEFT exports (classifier, score). Choose another model."
        )
    inside = model.base_model_prefix + "."
    body = {
        name
        for name in fresh - heads
        if kind == "causal-lm" or (name.startswith(inside) and "pooler" not in name.split("."))
    }
    if body:
        raise ModelError(
            f"The weights of '{source}' do not make a {type(model).__name__}: {len(body)} tensors"
            f" are missing or have another shape than config.json says"
            f" ({few([told(model, folder, name) for name in sorted(body)[:4]])}). Fetch the model"
            f" again, or choose one made for {kind}."
        )
    if frozen := sorted(fresh - heads):
        log.warning("%s has no %s: drawn from the seed, not trained", source, ", ".join(frozen))


def _draw(model: PreTrainedModel, fresh: Iterable[str], seed: int) -> None:
    """Fill new weight matrices from named streams; new vectors keep their constant values."""
    std = float(getattr(model.config.get_text_config(), "initializer_range", None) or 0.02)
    for name in fresh:
        parameter = model.get_parameter(name)
        if parameter.ndim >= 2:
            values = rng(seed, "head", name).normal(0.0, std, tuple(parameter.shape))
            parameter.data.copy_(torch.from_numpy(values))


def _check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str
) -> None:
    embedding = model.get_input_embeddings()
    needed = max(tokenizer.vocab_size, *(index + 1 for index in tokenizer.all_special_ids))
    if isinstance(embedding, nn.Embedding) and needed > embedding.num_embeddings:
        raise ModelError(
            f"The tokenizer of '{source}' has {needed} tokens, but the model has embeddings for"
            f" {embedding.num_embeddings}: they do not belong together. Use the tokenizer that the"
            " model was trained with."
        )


def _base(model: PreTrainedModel, kind: Kind) -> Iterable[tuple[str, Tensor]]:
    """Yield the base parameters, tied ones once."""
    heads = set(head_tensors(model, kind))
    return ((name, item) for name, item in model.named_parameters() if name not in heads)


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        # bitsandbytes' own tensor class does more than move bytes when it is moved
        flat = tensor.detach().as_subclass(Tensor).contiguous().reshape(-1).cpu()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
