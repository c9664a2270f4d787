"""A model as one GGUF file, for llama.cpp and what is built on it, through the `gguf` library.

Converted are the architectures below. llama.cpp stores query and key weights of Llama with the
two halves of each rotary pair side by side, so their rows are permuted; everything else is the
library's own table of names.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from fedllm.errors import MissingExtraError, ModelError
from fedllm.results.export_chat import Speech
from fedllm.results.export_gguf_words import check_words, write_words

if TYPE_CHECKING:
    from torch import Tensor

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
GGUF_FILE = "model.gguf"
ARCHITECTURES: Mapping[str, str] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`model_type` in config.json to the architecture's name in GGUF."""

_OTHER_WAY = (
    "Export it with --merged and convert that folder with llama.cpp's convert_hf_to_gguf.py"
)
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
Floats = npt.NDArray[np.float32]


def check_gguf(model_type: str, config: Any, tokenizer_folder: Path | None = None) -> None:
    """Refuse what cannot be converted correctly.

    Args:
        model_type: As config.json names it.
        config: The model's config.
        tokenizer_folder: Its tokenizer's files, if they are there already.

    Raises:
        MissingExtraError: If the gguf library is not installed.
        ModelError: For another architecture, scaling of positions or tokenizer.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf", "export to GGUF")
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"fedllm converts {', '.join(ARCHITECTURES)} to GGUF, and this is a {model_type} model."
            f" {_OTHER_WAY}"
        )
    rope = _rope(config)
    own_bias = model_type == "llama" and (config.attention_bias or config.mlp_bias)
    sliding = getattr(config, "use_sliding_window", False)
    if rope["rope_type"] not in ("default", "llama3") or own_bias or sliding:
        what = "biases" if own_bias else "sliding attention" if sliding else "scaling of positions"
        raise ModelError(f"fedllm does not convert this model's {what} to GGUF. {_OTHER_WAY}")
    if tokenizer_folder is not None:
        check_words(tokenizer_folder)


def write_gguf(
    model: Any, tokenizer_folder: Path, speech: Speech, file: Path, kind: GgufType
) -> None:
    """Write a model with its tokenizer and chat template.

    Args:
        model: A transformers model with everything merged into its weights.
        tokenizer_folder: Holds the tokenizer's files, written by `save_pretrained`.
        speech: Stop tokens and template.
        file: Must not exist.
        kind: How matrices are stored; vectors are always f32.

    Raises:
        MissingExtraError: If the gguf library is not installed.
        ModelError: For what cannot be converted.
    """
    check_gguf(model.config.model_type, model.config, tokenizer_folder)
    import gguf

    writer = gguf.GGUFWriter(file, ARCHITECTURES[model.config.model_type])
    try:
        _write_sizes(writer, model.config)
        writer.add_file_type(int(gguf.LlamaFileType[_FILE_TYPES[kind]]))
        rows = model.get_input_embeddings().num_embeddings
        write_words(writer, tokenizer_folder, speech, rows)
        for name, values in converted(model):
            stored = _stored_as(values, kind)
            writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def verify_gguf(model: Any, file: Path, kind: GgufType) -> float:
    """Read a GGUF file back and compare every tensor with the model's.

    Returns:
        The largest difference; what is lost in rounding to f16, bf16 or q8_0.

    Raises:
        ModelError: If a tensor is missing, or differs by more than its format rounds.
    """
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    largest = 0.0
    for name, values in converted(model):
        if name not in found:
            raise ModelError(f"{file} lacks the tensor '{name}'; this is a fault of the export")
        tensor = found.pop(name)
        back = gguf.dequantize(tensor.data, tensor.tensor_type)
        if back.shape != values.shape:
            raise ModelError(f"{file}: '{name}' has shape {back.shape}, not {values.shape}")
        away = np.abs(back - values)
        if not bool(np.all(away <= _allowed(values, _stored_as(values, kind)))):
            raise ModelError(
                f"{file}: '{name}' is off by {away.max():.3g}, more than {kind} rounds"
            )
        largest = max(largest, float(away.max()))
    if found:
        raise ModelError(f"{file} has tensors that the model lacks: {', '.join(sorted(found))}")
    return largest


def load_gguf(model: Any, file: Path) -> None:
    """Put the weights of a GGUF file into a transformers model of the same architecture.

    Args:
        model: Its weights are overwritten.
        file: Written by `write_gguf`.
    """
    import gguf
    import torch

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for own, name, tensor in _named(model):
        back = gguf.dequantize(found[name].data, found[name].tensor_type)
        values = _laid_out(own, back, model.config, is_back=True)
        tensor.copy_(torch.tensor(values))


def converted(model: Any) -> Iterator[tuple[str, Floats]]:
    """Yield GGUF's name and values (as llama.cpp lays them out) of every tensor of a model."""
    if _rope(model.config)["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_factors(model.config)
    for own, name, tensor in _named(model):
        values: Floats = tensor.detach().float().cpu().numpy()
        yield name, _laid_out(own, values, model.config)


def _named(model: Any) -> Iterator[tuple[str, str, Tensor]]:
    """Yield our name, GGUF's name and the tensor; an output tied to the embedding is left out."""
    import gguf

    config = model.config
    wanted = ARCHITECTURES[config.model_type]
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for own, tensor in model.state_dict().items():
        if own == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(f"GGUF has no name for the tensor '{own}'. {_OTHER_WAY}")
        yield own, name, tensor


def _laid_out(own: str, values: Floats, config: Any, *, is_back: bool = False) -> Floats:
    """Permute the rows of Llama's query and key weights as llama.cpp wants them, or back."""
    heads = {
        "q_proj.weight": config.num_attention_heads,
        "k_proj.weight": config.num_key_value_heads,
    }
    for ending, count in heads.items():
        if config.model_type == "llama" and own.endswith(ending):
            half = values.shape[0] // count // 2
            sizes = (count, half, 2) if is_back else (count, 2, half)
            parts = values.reshape(*sizes, *values.shape[1:])
            values = parts.swapaxes(1, 2).reshape(values.shape)
    return np.ascontiguousarray(values)


def _stored_as(values: Floats, kind: GgufType) -> Any:
    """Return the type of a tensor: vectors stay f32, as do rows that no block of q8_0 fills."""
    import gguf

    if values.ndim < 2 or (kind == "q8_0" and values.shape[-1] % 32):
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType[kind.upper()]


def _allowed(values: Floats, stored: Any) -> Floats:
    """Return how far rounding may take each value."""
    size = np.abs(values)
    match stored.name:
        case "F16":
            allowed = size * 2.0**-11 + 2.0**-25
        case "BF16":
            allowed = size * 2.0**-8 + 1e-38
        case "Q8_0":  # half a step of 1/127 of the block's largest, kept as f16
            blocks = size.reshape(-1, 32)
            step = blocks.max(axis=1, keepdims=True) / 127
            allowed = np.broadcast_to(0.5 * step + 127 * step * 2.0**-10 + 1e-7, blocks.shape)
            allowed = allowed.reshape(values.shape)
        case _:
            allowed = np.zeros_like(size)
    return np.asarray(allowed, dtype=np.float32)


def _write_sizes(writer: Any, config: Any) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config.vocab_size)


def _rope(config: Any) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = config.rope_parameters
    return rope


def _llama3_factors(config: Any) -> Floats:
    """Return by what each rotary frequency is divided, as Llama 3.1 stretches its positions."""
    rope = _rope(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    low, high, old = (
        rope[key]
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    share = np.clip((old / waves - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - share) / rope["factor"] + share), dtype=np.float32)
