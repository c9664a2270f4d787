"""The same models behind vLLM: its own server, started with our adapters as LoRA modules."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from fedllm.adapters.peft_check import CONFIG_FILE
from fedllm.adapters.reading import is_native
from fedllm.errors import FedLLMError, ModelError
from fedllm.models.sources import locate
from fedllm.serving.server import Address
from fedllm.serving.sources import Source

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks that vLLM knows."""


def launch(source: Source, address: Address) -> NoReturn:
    """Become vLLM's server.

    Raises:
        FedLLMError: If vLLM is not installed or cannot serve this.
    """
    if importlib.util.find_spec("vllm") is None:
        raise FedLLMError(
            "--engine vllm needs vLLM, which is not installed (it wants an environment of its own:"
            " pip install vllm). Without it, leave --engine out"
        )
    words = command(source, address)
    os.execve(sys.executable, [sys.executable, *words[1:]], environment(address))


def command(source: Source, address: Address) -> list[str]:
    """Return the command line of vLLM's server; keys are not in it.

    Raises:
        ModelError: If an adapter is no LoRA, or its rank is larger than vLLM takes.
    """
    model = source.model
    words = ["python", "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", str(locate(model)), "--served-model-name", source.plain]
    words += ["--host", address.host, "--port", str(address.port)]
    if model.dtype != "auto":
        words += ["--dtype", model.dtype]
    if source.tokenizer is not None:
        words += ["--tokenizer", str(source.tokenizer)]
    if model.chat_template.endswith(".jinja"):
        words += ["--chat-template", model.chat_template]
    elif model.chat_template != "auto":
        raise ModelError(
            f"vLLM does not know the chat template '{model.chat_template}'; serve with our own"
            " engine, or save the template as a .jinja file"
        )
    if source.adapters:
        rank = max(_rank(name, folder) for name, folder in source.adapters.items())
        room = next((known for known in _RANKS if known >= rank), None)
        if room is None:
            raise ModelError(f"vLLM takes adapters up to rank {_RANKS[-1]}, and one has {rank}")
        words += ["--enable-lora", "--max-lora-rank", str(room), "--lora-modules"]
        words += [f"{name}={folder}" for name, folder in source.adapters.items()]
    return words


def environment(address: Address) -> dict[str, str]:
    """Return vLLM's environment, with the key it asks for.

    Raises:
        FedLLMError: If there are several: vLLM takes one from its environment.
    """
    keys = address.keys.secrets()
    if len(keys) > 1:
        raise FedLLMError("vLLM takes one key from its environment; give one, or use our engine")
    found = {**os.environ, **({"VLLM_API_KEY": keys[0]} if keys else {})}
    return {name: value for name, value in found.items() if name != "FEDLLM_API_KEYS"}


def _rank(name: str, folder: Path) -> int:
    if is_native(folder):
        raise ModelError(f"adapter '{name}' is no LoRA, so vLLM cannot serve it; use our engine")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return int(max([config["r"], *(config.get("rank_pattern") or {}).values()]))
