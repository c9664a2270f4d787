"""What lets a model be talked to as it was trained: template, tokens that end, positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedllm.data.render import make_renderer
from fedllm.errors import DataError


@dataclass(frozen=True)
class Speech:
    """How an exported model is talked to; every format is written from these facts."""

    template: str | None
    """Jinja source of the chat template that training used; None where there was none."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer, the end of a turn first."""
    stops: tuple[str, ...]
    """The same as text."""
    positions: int | None
    """Longest sequence in tokens, as the model's config says."""


def speech_of(model: Any, tokenizer: Any, template: str | None) -> Speech:
    """Collect what tokenizer, model and template say.

    Args:
        model: Its config and generation config are read.
        tokenizer: Not modified.
        template: The chat template that training used, if any.
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    if template is not None and (end := _end_of_turn(tokenizer, template)) is not None:
        found.insert(0, tokenizer.convert_tokens_to_ids(end))
    ids = tuple(dict.fromkeys(int(token) for token in found if token is not None))
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return Speech(
        template,
        ids,
        tuple(str(tokenizer.convert_ids_to_tokens(token)) for token in ids),
        int(positions) if positions else None,
    )


def settle(model: Any | None, tokenizer: Any, speech: Speech) -> None:
    """Put the facts into the model's generation config and into the tokenizer.

    Args:
        model: Its generation config ends at every stop token, not only at the base model's.
        tokenizer: Gets the template.
    """
    if speech.template is not None:
        tokenizer.chat_template = speech.template
    generation = getattr(model, "generation_config", None)
    if generation is not None and speech.stop_ids:
        ids = list(speech.stop_ids)
        generation.eos_token_id = ids if len(ids) > 1 else ids[0]
        generation.pad_token_id = tokenizer.pad_token_id


def _end_of_turn(tokenizer: Any, template: str) -> str | None:
    try:
        return make_renderer(tokenizer, template).end_of_turn
    except DataError:  # a template that needs more than a question and an answer
        return None
