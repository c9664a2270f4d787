"""Make `builtin:tiny` from nothing: generate text, train a tokenizer, pretrain a small Llama.

    python scripts/pretrain_tiny.py --out src/fedllm/models/builtin/tiny

It runs on one CPU core in a quarter of an hour or so. The same seed gives the same tokenizer and
the same training data everywhere; the weights agree up to the rounding of the training machine.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tiny_corpus import Document, documents
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, SYSTEM, USER, ASSISTANT, END = (
    *("<|pad|>", "<|system|>", "<|user|>"),
    *("<|assistant|>", "<|end|>"),
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# One piece a word (with its space), one a digit, so that numbers are read digit by digit.
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
VOCABULARY = 1024
BLOCK = 256
ROWS_PER_STEP = 8


def main() -> None:
    """Run the whole recipe."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--tokens", type=float, default=6.5e6, help="how many tokens to train on")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--muon-learning-rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    sample = itertools.islice(documents(Random(args.seed + 1)), 20_000)
    tokenizer = train_tokenizer(plain(document) for document in sample)
    steps = int(args.tokens / BLOCK / ROWS_PER_STEP)
    torch.manual_seed(args.seed)  # only the initial weights depend on it
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {steps} steps")
    parts = optimizers(model, args.learning_rate, args.muon_learning_rate)
    train(model, batches(tokenizer, Random(args.seed)), steps, parts)
    save(model, tokenizer, args.out)


def plain(document: Document) -> str:
    """Write a document as text, chats as the chat template would."""
    if isinstance(document, str):
        return document + END
    return "".join(f"<|{turn['role']}|>{turn['content']}{END}" for turn in document)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that gives back any text as it was."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    specials = [
        AddedToken(text, special=True, normalized=False)
        for text in (PAD, SYSTEM, USER, ASSISTANT, END)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((_without_specials(text) for text in texts), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers' own gap
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )


def _without_specials(text: str) -> str:
    for special in (SYSTEM, USER, ASSISTANT, END):
        text = text.replace(special, "\n")
    return text


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama of about two million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, random: Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tokens, positions), both (rows, block); positions restart at each document."""
    stream = documents(random)
    tokens: list[int] = []
    positions: list[int] = []
    size = BLOCK * ROWS_PER_STEP
    while True:
        texts = [plain(document) for document in itertools.islice(stream, 512)]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            tokens += ids
            positions += range(len(ids))
        while len(tokens) >= size:
            shape = (ROWS_PER_STEP, BLOCK)
            yield (
                torch.tensor(tokens[:size]).view(shape),
                torch.tensor(positions[:size]).view(shape),
            )
            tokens, positions = tokens[size:], positions[size:]


def optimizers(
    model: LlamaForCausalLM, learning_rate: float, muon_learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices between layers, which halves the text needed, else AdamW."""
    hidden = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=muon_learning_rate, weight_decay=0.01, ns_steps=4),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0, fused=True),
    ]


def train(
    model: LlamaForCausalLM,
    data: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    parts: list[torch.optim.Optimizer],
) -> None:
    """Train on fresh text at every step; a document attends to nothing but itself."""
    warmup = max(1, steps // 50)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in parts]
    model.train()
    start = time.monotonic()
    for step, (tokens, positions) in enumerate(itertools.islice(data, steps), 1):
        with torch.autocast("cpu", torch.bfloat16):
            # A document's first token cannot be foreseen from the one before it.
            labels = tokens.masked_fill(positions == 0, -100)
            loss = model(input_ids=tokens, position_ids=positions, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(parts, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if step % 100 == 0 or step == steps:
            speed = step * tokens.numel() / (time.monotonic() - start)
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {speed:,.0f} tokens/s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights in bf16, configuration, tokenizer and chat template."""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
