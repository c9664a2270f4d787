"""The models that come with the package, and the families the tests load. No torch here."""

from __future__ import annotations

from fedllm.registry import Entry, Table

BUILTIN_PREFIX = "builtin:"

BUILTIN_MODELS = Table(
    kind="built-in model",
    entries={
        "tiny": Entry(
            target="fedllm.models:builtin/tiny",
            summary="small Llama with its own tokenizer, pretrained on text the project generates",
        ),
    },
)
"""Name after `builtin:` to `package:folder`; the folder is in Hugging Face layout."""

TESTED_FAMILIES = (
    "llama",
    "mistral",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi",
    "bert",
    "roberta",
    "distilbert",
)
"""Hugging Face `model_type`s that the test suite loads; others work when transformers has them."""
