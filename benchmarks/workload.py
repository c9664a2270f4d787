"""What is measured on: random Llamas, and rows as long as GSM8K's."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fedllm.data import Partition, TokenSet
from fedllm.models import LoadedModel

CLIENTS, BATCH, RANK, STEPS = 8, 4, 8, 1
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Size:
    """A Llama of random weights."""

    hidden: int
    layers: int
    vocabulary: int


SIZES = {"S": Size(256, 4, 4096), "M": Size(512, 8, 8192)}


def model(size: Size, dtype: torch.dtype) -> PreTrainedModel:
    """Return a frozen model; the same weights at every call."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 64,
        max_position_embeddings=1024,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: Any = LlamaForCausalLM(config)
    made = made.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return cast(PreTrainedModel, made)


def loaded(size: Size, dtype: torch.dtype) -> LoadedModel:
    """Return the model as our engine takes it."""
    return LoadedModel(
        model=model(size, dtype), tokenizer=_tokenizer(), kind="causal-lm", source="random", base=()
    )


@cache
def _tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models

    empty = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    make: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerBase = make(
        tokenizer_object=empty, pad_token="<pad>", eos_token="<eos>"
    )
    return made


@cache
def gsm8k_lengths() -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of prompt and of answer of each GSM8K row, at 3.3 characters a token.

    Without the file, rows are drawn with the same median and spread.
    """
    folder = Path(os.environ.get("FEDLLM_REAL_DATA", _ROOT.parent / "shared" / "data"))
    path = folder / "gsm8k" / "train.jsonl"
    if path.is_file():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        prompt = np.array([len(row["question"]) for row in rows]) / 3.3 + 8
        answer = np.array([len(row["answer"]) for row in rows]) / 3.3 + 2
    else:
        stream = np.random.default_rng(0)
        prompt = stream.lognormal(np.log(76), 0.36, 7473)
        answer = stream.lognormal(np.log(84), 0.45, 7473)
    return prompt.clip(8, 250).astype(int), answer.clip(8, 250).astype(int)


def rows(count: int, vocabulary: int, seed: int = 0) -> TokenSet:
    """Return rows of random tokens with GSM8K's lengths; the answer is supervised."""
    prompts, answers = gsm8k_lengths()
    stream = np.random.default_rng(seed)
    chosen = stream.choice(len(prompts), count, replace=count > len(prompts))
    prompt, answer = prompts[chosen], answers[chosen]
    lengths = prompt + answer
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return TokenSet(
        tokens=stream.integers(2, vocabulary, offsets[-1]).astype(np.int32),
        supervised=place >= np.repeat(prompt, lengths),
        offsets=offsets,
        prompt_lengths=prompt.astype(np.int32),
        labels=None,
        groups=None,
        references=("",) * count,
    )


def partition(clients: int, each: int) -> Partition:
    """Give each client `each` consecutive rows, all of them for testing too."""
    offsets = np.arange(clients + 1, dtype=np.int64) * each
    everything = np.arange(clients * each, dtype=np.int32)
    return Partition(
        train_rows=everything,
        train_offsets=offsets,
        test_rows=everything,
        test_offsets=offsets,
    )
