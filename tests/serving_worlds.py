"""Servers for tests: a tiny model with four adapters, live on a free port."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizers import tiny_tokenizer
from torch import Tensor

from fedllm.adapters import Adapter, is_b
from fedllm.adapters.peft_format import save_peft
from fedllm.config import ModelConfig
from fedllm.engine import Resident
from fedllm.models import load_model
from fedllm.models.quiet import quiet
from fedllm.serving.app import Bounds, make_app
from fedllm.serving.figures import Figures
from fedllm.serving.generation import Generation, Piece
from fedllm.serving.host import Host, Wish
from fedllm.serving.keys import Keys
from fedllm.serving.scheduler import Limits
from fedllm.serving.sources import Source

TINY = ModelConfig(path="builtin:tiny", dtype="float32", device="cpu")
LIMITS = Limits(max_batch=16, max_queue=128, kv_bytes=2**28)
QUESTION = "Sort these numbers: 9 2 5"


def write_adapters(folder: Path, model: ModelConfig = TINY, count: int = 4) -> dict[str, Path]:
    """Write adapters of unequal ranks that change what the model says."""
    with quiet():
        loaded = load_model(model, kind="causal-lm")
    words = {"base_hash": loaded.base_hash}
    resident = Resident(loaded, layout="padded")
    found = {}
    for i in range(count):
        found[f"client-{i}"] = folder / f"client-{i}"
        save_peft(
            disturbed(resident.initial_adapter(2 + 2 * i, 2.0, seed=i), i),
            found[f"client-{i}"],
            base_model=model.path,
            task_type="CAUSAL_LM",
            metadata=words,
        )
    return found


def disturbed(adapter: Adapter, seed: int, spread: float = 0.1) -> Adapter:
    """Return an adapter whose B is no longer zero."""
    drawn = torch.Generator().manual_seed(seed)
    changed = {
        name: spread * torch.randn(tensor.shape, generator=drawn)
        for name, tensor in adapter.tensors.items()
        if is_b(name)
    }
    return adapter.overlaid(changed)


def write_speaker(folder: Path, family: str) -> ModelConfig:
    """Write a tiny random model with the tokenizer and template of a family."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(family)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng([]), quiet():
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return ModelConfig(path=str(folder), dtype="float32", device="cpu")


def say(host: Host, text: str) -> None:
    """Make the model say this and end, whatever it is asked."""
    ids = [*host.tokenizer(text, add_special_tokens=False)["input_ids"]]
    ids.append(min(host.scheduler._ends))
    batch = host.scheduler._batch

    def logits(rows: Sequence[Generation]) -> Tensor:
        found = torch.zeros(len(rows), host.vocabulary)
        for i, row in enumerate(rows):
            found[i, ids[min(len(row.tokens), len(ids) - 1)]] = 30.0
        return found

    prefill, step = type(batch).prefill, type(batch).step
    batch.prefill = lambda rows: (logits(rows), prefill(batch, rows)[1])  # type: ignore[method-assign]

    def scripted() -> Tensor:
        step(batch)
        return logits(batch.rows)

    batch.step = scripted  # type: ignore[method-assign]


@contextmanager
def live(
    host: Host,
    keys: dict[str, str] | None = None,
    figures: Figures | None = None,
    bounds: Bounds | None = None,
) -> Iterator[str]:
    """Serve on a free port, in a thread; give the address."""
    import uvicorn

    app = make_app(host, Keys(keys or {}), figures or Figures(), bounds)
    config = uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)


@contextmanager
def running(host: Host) -> Iterator[Host]:
    """Run the engine without a server."""
    host.scheduler.start()
    try:
        yield host
    finally:
        host.scheduler.close()


class Reply:
    """One answer of the engine, read when it is there."""

    def __init__(self, host: Host, name: str, prompt: Sequence[int], **wish: Any) -> None:
        self.box: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.one = host.generation(name, prompt, Wish(**wish), self.box.put)
        host.scheduler.submit([self.one])

    def pieces(self) -> list[Piece]:
        """Wait for the end; return everything."""
        found = []
        while not found or not found[-1].is_last:
            found.append(self.box.get(timeout=30))
        return found

    def text(self) -> str:
        """Wait for the end; return the text."""
        found = self.pieces()
        assert found[-1].error is None, found[-1].error
        return "".join(piece.text for piece in found)


def prompt_of(host: Host, text: str) -> list[int]:
    """Return the prompt of one question."""
    from fedllm.data.rows import Message

    return host.prompt([Message("user", text)], ())


def host_of(folder: Path, limits: Limits = LIMITS) -> Host:
    """Return a host of the tiny model with four adapters."""
    return Host(Source(TINY, write_adapters(folder)), limits)
