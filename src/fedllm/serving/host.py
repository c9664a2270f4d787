"""A base model in memory with its adapters, its prompts and its engine: what chat and API share."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedllm.data.render import Renderer, make_renderer
from fedllm.data.rows import Message
from fedllm.data.template import chat_template
from fedllm.engine import Resident
from fedllm.errors import DataError, ModelError, unknown
from fedllm.experiment.trained import require_base
from fedllm.models import LoadedModel, load_model, position_limit
from fedllm.models.tokenizer import tokenizer_in
from fedllm.seeding import rng
from fedllm.serving.adapters import (
    activate,
    check_shapes,
    read_adapter,
    together,
)
from fedllm.serving.batch import Batch
from fedllm.serving.generation import Generation, Piece
from fedllm.serving.refusals import Refusal
from fedllm.serving.sampling import Sampling
from fedllm.serving.scheduler import Limits, Scheduler
from fedllm.serving.sources import Source
from fedllm.serving.writing import Writer

_MEMORY_SHARE = 0.5
"""Of the memory that is free once the model is loaded, how much keys and values may take."""


@dataclass(frozen=True)
class Wish:
    """How an answer is to be generated; None takes the model's own default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    keeps_controls: bool = False
    """Whether control tokens are written, too."""
    ignores_end: bool = False
    """Whether an answer goes on after the end of its turn."""


class Host:
    """What answers: one base, any number of adapters on it, one engine thread.

    Args:
        source: What is served.
        limits: How much is taken on at once; `kv_bytes` of 0 takes half of the free memory.
        told: Called with each sequence that is over, on the engine's thread.

    Raises:
        ModelError: If an adapter is damaged, does not fit the base, or was trained on another.
    """

    def __init__(
        self,
        source: Source,
        limits: Limits,
        told: Callable[[Generation], None] = lambda one: None,
    ) -> None:
        self.source = source
        self._reading = threading.Lock()  # fast tokenizers do not like to be set up twice at once
        loaded = load_model(source.model, kind="causal-lm")
        adapters = {name: read_adapter(path) for name, path in source.adapters.items()}
        _check_bases(source, loaded)
        self.limit = _context(loaded)
        config = getattr(loaded.model, "generation_config", None)
        self.defaults: Mapping[str, Any] = {} if config is None else config.to_dict()
        resident, active = _resident(loaded, source, adapters)
        tokenizer: Any = loaded.tokenizer
        if source.tokenizer is not None:
            tokenizer = tokenizer_in(source.tokenizer, source.model)
        self.tokenizer = tokenizer
        self.renderer = make_renderer(
            tokenizer, chat_template(tokenizer, source.model.chat_template)
        )
        self.rows = {name: row for row, name in enumerate(source.adapters)} | {source.plain: -1}
        batch = Batch(resident, active)
        self.vocabulary = int(resident.model.config.get_text_config().vocab_size)
        if not limits.kv_bytes:
            limits = replace(limits, kv_bytes=_free_bytes(resident.device))
        ends = [*resident.stop_ids, *_turn_ends(self.renderer, tokenizer)]
        self.scheduler = Scheduler(batch, ends, limits, told)
        self.token_bytes = batch.token_bytes

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all that can be asked, the default first."""
        return self.source.names

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the prompt of a conversation, as training sees it.

        Raises:
            Refusal: If the chat template refuses it.
        """
        try:
            with self._reading:
                return list(self.renderer.prompt_ids(messages, tuple(tools), where="messages"))
        except DataError as error:
            raise Refusal(400, str(error), param="messages") from None

    def text_prompt(self, text: str) -> list[int]:
        """Return the tokens of a text that is to be continued."""
        with self._reading:
            return [int(token) for token in self.tokenizer(text)["input_ids"]]

    def spell(self, token: int) -> str:
        """Return the text of one token."""
        return str(self.tokenizer.decode([token]))

    def generation(
        self,
        name: str,
        prompt: Sequence[int],
        wish: Wish,
        tell: Callable[[Piece], None],
        i: int = 0,
    ) -> Generation:
        """Return the i-th of the answers that a request asks for, not yet submitted.

        Raises:
            Refusal: If there is no such model, or the prompt does not fit.
        """
        if name not in self.rows:
            message = unknown("model", name, self.rows)
            raise Refusal(404, message, code="model_not_found", param="model")
        if not prompt:
            raise Refusal(400, "the prompt is empty: it has no token", param="prompt")
        seed = secrets.randbits(62) if wish.seed is None else wish.seed
        return Generation(
            prompt=prompt,
            adapter=self.rows[name],
            sampling=self._sampling(wish),
            max_new_tokens=self._room(len(prompt), wish.max_tokens),
            writer=Writer(self.tokenizer, wish.stop, keeps_controls=wish.keeps_controls),
            random=rng(seed, "choice", i),
            tell=tell,
            ignores_end=wish.ignores_end,
        )

    def _sampling(self, wish: Wish) -> Sampling:
        own = self.defaults
        drawn = bool(own.get("do_sample"))
        temperature = wish.temperature
        if temperature is None:
            temperature = float(_given(own.get("temperature"), 1.0)) if drawn else 0.0
        top_p = wish.top_p
        if top_p is None:
            top_p = float(_given(own.get("top_p"), 1.0)) if drawn else 1.0
        top_k = wish.top_k
        if top_k is None:
            top_k = int(_given(own.get("top_k"), 0)) if drawn else 0
        strange = [token for token in wish.logit_bias if not 0 <= token < self.vocabulary]
        if strange:
            raise Refusal(
                400,
                f"logit_bias: there is no token {strange[0]}; the last is {self.vocabulary - 1}",
                param="logit_bias",
            )
        return Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            presence_penalty=wish.presence_penalty,
            frequency_penalty=wish.frequency_penalty,
            repetition_penalty=float(_given(own.get("repetition_penalty"), 1.0)),
            logit_bias=wish.logit_bias,
            top_logprobs=wish.top_logprobs,
        )

    def _room(self, prompt: int, wanted: int | None) -> int:
        """Return the most tokens an answer may have."""
        room = self.limit - prompt
        if room < 1 or (wanted is not None and wanted > room):
            asked = "" if wanted is None else f" and {wanted} new ones"
            raise Refusal(
                400,
                f"this model has room for {self.limit} tokens, and the prompt has"
                f" {prompt}{asked}; shorten the prompt or lower max_tokens",
                code="context_length_exceeded",
                param="messages",
            )
        default = self.defaults.get("max_new_tokens")
        return wanted if wanted is not None else min(room, int(_given(default, 1024)))


def _resident(
    loaded: LoadedModel, source: Source, adapters: Mapping[str, Any]
) -> tuple[Resident, Any]:
    """Wrap the layers that any adapter changes."""
    if not adapters:
        return Resident(loaded, "all-linear", layout="padded"), None
    layers = list(dict.fromkeys(layer for adapter in adapters.values() for layer in adapter.layers))
    resident = Resident(loaded, layers, layout="padded")
    for name, adapter in adapters.items():
        missing = [layer for layer in adapter.layers if layer not in resident.shapes]
        if missing:
            raise ModelError(f"adapter '{name}': {source.model.path} has no layer {missing[0]}")
        check_shapes(name, adapter, resident.shapes, source.model.path)
    return resident, activate(resident, together(adapters))


def _check_bases(source: Source, loaded: LoadedModel) -> None:
    """Refuse adapters that were trained on other weights than those that are loaded.

    Raises:
        ModelError: Naming the adapter.
    """
    for name, folder in source.adapters.items():
        try:
            require_base(folder, source.model, loaded)
        except ModelError as error:
            raise ModelError(f"adapter '{name}': {error}") from None


def _turn_ends(renderer: Renderer, tokenizer: Any) -> list[int]:
    """Return the token that the chat template ends an answer with."""
    if renderer.end_of_turn is None:
        return []
    token = tokenizer.convert_tokens_to_ids(renderer.end_of_turn)
    return [] if token is None else [int(token)]


def _context(loaded: LoadedModel) -> int:
    """Return how many tokens the model has positions for."""
    fixed = position_limit(loaded.model)
    config = loaded.model.config.get_text_config()
    said = getattr(config, "max_position_embeddings", None)
    return int(fixed or said or 2**20)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):  # not every system tells
            free = 2**31
    return max(int(free * _MEMORY_SHARE), 2**26)


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
