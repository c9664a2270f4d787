"""`fedllm serve`: a trained model behind OpenAI's HTTP interface."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from fedllm.cli.errors import reported
from fedllm.errors import FedLLMError
from fedllm.starting import import_transformers

if TYPE_CHECKING:
    from fedllm.serving import Source

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL",
        help="A run directory, an adapter folder, a model folder, a hub id or builtin:tiny.",
    ),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=DIR", help="One more adapter on the same base."),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...; default as recorded."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    typer.Option(help="Number format of the base; default as recorded."),
]
HostOption = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file", metavar="FILE", help="Lines of name:key; else FEDLLM_API_KEYS is read."
    ),
]
NoAuth = Annotated[bool, typer.Option("--no-auth", help="Serve a public address without keys.")]
MaxBatch = Annotated[int, typer.Option("--max-batch", min=1, help="Answers written together.")]
MaxQueue = Annotated[int, typer.Option("--max-queue", min=1, help="Answers that may wait.")]
KVMemory = Annotated[
    int,
    typer.Option(
        "--kv-memory-mb", min=0, help="For keys and values; 0 takes half of what is free."
    ),
]
MaxBody = Annotated[int, typer.Option("--max-body-kb", min=1, help="Largest body of a request.")]
Grace = Annotated[
    int, typer.Option("--grace-s", min=0, help="How long running answers may take to end.")
]
EngineOption = Annotated[
    Literal["fedllm", "vllm"], typer.Option("--engine", help="What writes the answers.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No line for each request.")]
_MIB = 2**20


def serve(
    source: SourceArgument,
    adapter: AdapterOption = None,
    host: HostOption = "127.0.0.1",
    port: Port = 8000,
    api_key_file: KeyFile = None,
    no_auth: NoAuth = False,
    device: Device = None,
    dtype: Dtype = None,
    max_batch: MaxBatch = 32,
    max_queue: MaxQueue = 128,
    kv_memory_mb: KVMemory = 0,
    max_body_kb: MaxBody = 2048,
    grace_s: Grace = 30,
    engine: EngineOption = "fedllm",
    quiet: Quiet = False,
) -> None:
    """Serve a model and all its adapters over HTTP, as OpenAI does."""
    with reported():
        from fedllm.serving.keys import ENVIRONMENT, read_keys
        from fedllm.serving.server import Address, Terms
        from fedllm.serving.server import serve as start
        from fedllm.serving.vllm import launch

        keys = read_keys(api_key_file, os.environ.get(ENVIRONMENT))
        address = Address(host, port, keys, no_auth)
        address.check()
        found = resolve(source, adapter, device, dtype)
        import_transformers()
        from fedllm.serving.scheduler import Limits

        if engine == "vllm":
            launch(found, address)
        _log_to_stderr(is_quiet=quiet)
        limits = Limits(max_batch=max_batch, max_queue=max_queue, kv_bytes=kv_memory_mb * _MIB)
        terms = Terms(max_body_kb * 1024, grace_s)
        start(found, address, limits, terms, ready=_ready)


def resolve(
    source: str, adapters: Sequence[str] | None, device: str | None, dtype: str | None
) -> Source:
    """Find what is served, and see that its base is there, before anything large is imported.

    Raises:
        FedLLMError: If it cannot be, or a word is not NAME=DIR.
    """
    from fedllm.models.sources import locate
    from fedllm.serving import find_source, with_adapters

    words = {}
    for word in adapters or ():
        name, equals, folder = word.partition("=")
        if not equals or not name or not folder:
            raise FedLLMError(f"--adapter '{word}': write NAME=DIR, such as mine=runs/x/adapter")
        words[name] = Path(folder).expanduser()
    found = with_adapters(find_source(source, {"device": device, "dtype": dtype}), words)
    locate(found.model, weights=False)
    return found


def _ready(names: Sequence[str], url: str) -> None:
    console = Console()
    shown = ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "")
    console.print(f"models: {shown}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"ready: {url}/v1 (Ctrl-C stops)", soft_wrap=True, highlight=False, markup=False)


def _log_to_stderr(*, is_quiet: bool) -> None:
    """Show a line for each request; prompts and answers are never in one."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("fedllm.serving")
    log.addHandler(handler)
    log.setLevel(logging.WARNING if is_quiet else logging.INFO)
    log.propagate = False
