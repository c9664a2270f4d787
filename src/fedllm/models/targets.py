"""Which modules of a model get an adapter, and which are a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedllm.errors import ModelError, did_you_mean

Kind = Literal["causal-lm", "sequence-classification"]
"""What a model does: write text, or put a text into a class."""

_QUERY_AND_VALUE = frozenset(
    {
        *("q_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, Phi, OPT, GPT-Neo, GPT-J
        *("q_b_proj", "kv_b_proj"),  # DeepSeek: query and value go through a narrow layer
        *("query", "value"),  # BERT, RoBERTa, ALBERT, ELECTRA
        *("query_proj", "value_proj"),  # DeBERTa-v2 and -v3
        *("q_lin", "v_lin"),  # DistilBERT, XLM
        *("q", "v"),  # T5
        # query, key and value in one layer
        *("query_key_value", "qkv_proj", "c_attn", "Wqkv", "in_proj", "att_proj"),
    }
)
_OTHER_SENSES = ("vision", "visual", "audio")
"""Parts of a multimodal model that text never passes through."""
_HEAD_ENDINGS = ("classifier", "score")


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear layer, None for any other module.

    Linear layers are `nn.Linear`, bitsandbytes' 4-bit and 8-bit layers (subclasses of it), and
    GPT-2's `Conv1D`, whose weight is stored (in, out) instead of (out, in).
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def target_modules(model: PreTrainedModel, targets: str | Sequence[str]) -> tuple[str, ...]:
    """Choose the linear layers that get an adapter.

    Args:
        model: Not modified.
        targets: `auto` (the query and value projections of attention), `all-linear` (every
            linear layer but the output embedding, the classification head and the pooler), or
            names, each the last part of a module's name or a longer dotted end of it. A
            classification head is trained in full and never gets an adapter.

    Returns:
        Full dotted module names, in model order.

    Raises:
        ModelError: If nothing matches, or a given name matches nothing.
    """
    linear = _adaptable(model)
    if targets == "auto":
        found = [
            name
            for name in linear
            if _last(name) in _QUERY_AND_VALUE
            and not any(part.startswith(_OTHER_SENSES) for part in name.split("."))
        ]
    elif targets == "all-linear":
        output = output_embedding(model)
        found = [name for name in linear if name != output and "pooler" not in name.split(".")]
    else:
        names = [targets] if isinstance(targets, str) else list(targets)
        _check_names(names, linear)
        found = [name for name in linear if any(_ends(name, wanted) for wanted in names)]
    if not found:
        raise ModelError(
            f"adapter.targets '{targets}' finds no layer in {type(model).__name__}. Name some of"
            f" its linear layers instead: {_listing(linear)}"
        )
    return tuple(found)


def head_modules(model: PreTrainedModel, kind: Kind) -> tuple[str, ...]:
    """Name the modules of a classification head, which are trained in full.

    These are the modules that PEFT trains for sequence classification (their names end in
    `classifier` or `score`), so that an exported adapter loads there. A causal LM has none.
    """
    if kind == "causal-lm":
        return ()
    return tuple(name for name, _ in model.named_modules() if name.endswith(_HEAD_ENDINGS))


def head_tensors(model: PreTrainedModel, kind: Kind) -> tuple[str, ...]:
    """Name the parameters of the classification head, in model order; none for a causal LM."""
    heads = tuple(name + "." for name in head_modules(model, kind))
    return tuple(name for name, _ in model.named_parameters() if name.startswith(heads))


def output_embedding(model: PreTrainedModel) -> str | None:
    """Name the layer that turns hidden states into logits over the vocabulary, if there is one."""
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return next((name for name, module in model.named_modules() if module is output), None)


def _adaptable(model: PreTrainedModel) -> list[str]:
    """Name all linear layers outside a classification head, in model order."""
    heads = head_modules(model, "sequence-classification")
    return [
        name
        for name, module in model.named_modules()
        if linear_shape(module) and not any(_within(name, head) for head in heads)
    ]


def _check_names(names: Sequence[str], linear: Sequence[str]) -> None:
    """Raise a `ModelError` for the names that match no layer, with a suggestion for each."""
    strangers = [wanted for wanted in names if not any(_ends(name, wanted) for name in linear)]
    if strangers:
        known = {_last(name) for name in linear} | set(linear)
        hints = "; ".join(f"'{name}'.{did_you_mean(name, known)}" for name in strangers)
        raise ModelError(
            f"adapter.targets names no linear layer of the model: {hints} Available:"
            f" {_listing(linear)}"
        )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _ends(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


def _listing(linear: Sequence[str]) -> str:
    """Return the last parts of the names, each once, in model order."""
    return ", ".join(dict.fromkeys(_last(name) for name in linear)) or "(it has none)"
