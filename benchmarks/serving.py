"""A server with 16 streams over four adapters against one answer at a time.

`python -m benchmarks.serving`. Both write the same number of tokens after the same prompts: the
real `fedllm serve`, in a process of its own, through HTTP; and PEFT's `generate` in this process,
one request after another, its four adapters loaded beforehand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import PeftModel

from benchmarks.measure import interleaved, ratio, show, write
from fedllm.adapters import is_b
from fedllm.adapters.peft_format import save_peft
from fedllm.config import ModelConfig
from fedllm.engine import Resident
from fedllm.models import load_model
from fedllm.models.quiet import quiet

GOALS = {"vs_one_at_a_time": "4x", "vs_one_stream": "-"}
STREAMS, ADAPTERS, NEW, REQUESTS = 16, 4, 64, 32
MODEL = ModelConfig(path="builtin:tiny", dtype="float32")
PROMPT = "Tell me what you know about number {} and its neighbours, one after the other."


def write_adapters(folder: Path) -> dict[str, Path]:
    """Write adapters of rank 8 that change the model."""
    loaded = load_model(MODEL, kind="causal-lm")
    resident = Resident(loaded, layout="padded")
    drawn = torch.Generator().manual_seed(0)
    found = {}
    for i in range(ADAPTERS):
        adapter = resident.initial_adapter(8, 2.0, i)
        noise = {
            name: 0.05 * torch.randn(tensor.shape, generator=drawn)
            for name, tensor in adapter.tensors.items()
            if is_b(name)
        }
        found[f"client-{i}"] = folder / f"client-{i}"
        words: dict[str, Any] = {"base_model": MODEL.path, "task_type": "CAUSAL_LM"}
        save_peft(adapter.overlaid(noise), found[f"client-{i}"], **words)
    return found


@contextmanager
def server(adapters: dict[str, Path]) -> Iterator[httpx.Client]:
    """Start `fedllm serve`; give a client of it."""
    words = [f"--adapter={name}={folder}" for name, folder in adapters.items()]
    command = [sys.executable, "-m", "fedllm", "serve", MODEL.path, "--dtype", "float32", *words]
    process = subprocess.Popen(
        [*command, "--port", "0", "--quiet", "--max-batch", str(STREAMS)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    url = process.stdout.readline().removeprefix("ready: ").partition(" ")[0]
    try:
        with httpx.Client(base_url=url, timeout=120) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def asked(client: httpx.Client, i: int, first_s: list[float]) -> int:
    """Listen to one stream; return its tokens and note when the first one came."""
    body = {
        "model": f"client-{i % ADAPTERS}",
        "prompt": PROMPT.format(i),
        "max_tokens": NEW,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began_s, tokens, is_first = time.perf_counter(), 0, True
    with client.stream("POST", "/completions", json=body) as answer:
        for line in answer.iter_lines():
            if is_first and line:
                first_s.append(time.perf_counter() - began_s)
                is_first = False
            if '"usage": {' in line:
                tokens = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    return tokens


def streams(client: httpx.Client, count: int, first_s: list[float]) -> float:
    """Ask with so many streams at any time; return the tokens written."""
    requests = REQUESTS if count > 1 else 2
    with ThreadPoolExecutor(count) as pool:
        return float(sum(pool.map(lambda i: asked(client, i, first_s), range(requests))))


def one_at_a_time(model: Any, tokenizer: Any) -> float:
    """Generate for a few requests, one after another; return the tokens written."""
    total = 0
    for i in range(4):
        model.set_adapter(f"client-{i % ADAPTERS}")
        ids = tokenizer(PROMPT.format(i), return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
        )
        total += out.shape[1] - ids.shape[1]
    return float(total)


def peft_model(adapters: dict[str, Path]) -> tuple[Any, Any]:
    """Return PEFT's model with all adapters, and its tokenizer."""
    with quiet():
        loaded = load_model(MODEL, kind="causal-lm")
    (name, folder), *others = adapters.items()
    model = PeftModel.from_pretrained(loaded.model, str(folder), adapter_name=name)
    for name, folder in others:
        model.load_adapter(str(folder), adapter_name=name)
    return model.eval(), loaded.tokenizer


def main() -> None:
    """Measure, print and write `serving.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    first_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(Path(folder))
        model, tokenizer = peft_model(adapters)
        with server(adapters) as client:
            rates = interleaved(
                {
                    "server": lambda: streams(client, STREAMS, first_s),
                    "one stream": lambda: streams(client, 1, []),
                    "one at a time": lambda: one_at_a_time(model, tokenizer),
                },
                runs,
            )
    found: dict[str, Any] = {
        "vs_one_at_a_time": ratio(rates["server"], rates["one at a time"]),
        "vs_one_stream": ratio(rates["server"], rates["one stream"]),
    }
    first = statistics.quantiles(first_s, n=20)
    waited = {"median": round(statistics.median(first_s), 4), "p95": round(first[-1], 4)}
    write("serving", {**found, "time_to_first_token_under_load_s": waited})
    show(f"tokens a second, {STREAMS} streams over {ADAPTERS} adapters", found, GOALS)
    print(f"time to first token under load: {waited['median']} s, p95 {waited['p95']} s")


if __name__ == "__main__":
    main()
