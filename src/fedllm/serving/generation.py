"""One answer on its way: what was asked, what has been written, and who is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from fedllm.serving.refusals import Refusal
from fedllm.serving.sampling import Choice, Sampling
from fedllm.serving.writing import Writer

Finish = Literal["stop", "length"]


class Piece(NamedTuple):
    """News of an answer."""

    text: str = ""
    choices: tuple[Choice, ...] = ()
    """The tokens behind the text, where their log-probabilities were asked for."""
    finish: Finish | None = None
    """Why the answer ends here."""
    error: Refusal | None = None
    """Why there is no more."""

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Generation:
    """One sequence from its prompt to its end."""

    prompt: Sequence[int]
    """Token ids; at least one."""
    adapter: int
    """Row of the adapter among the active ones; -1 is the base."""
    sampling: Sampling
    max_new_tokens: int
    writer: Writer
    random: np.random.Generator
    tell: Callable[[Piece], None]
    """Called on the engine's thread; must be quick and must not raise."""
    ignores_end: bool = False
    """Whether to go on after the end of the turn."""
    tokens: list[int] = field(default_factory=list)
    asked_s: float = field(default_factory=time.perf_counter)
    """When it was asked."""
    first_s: float | None = None
    """When its first token was there."""
    is_cancelled: bool = False
    is_done: bool = False
    _unsent: list[Choice] = field(default_factory=list)

    @property
    def size(self) -> int:
        """The most tokens it can come to, prompt and answer."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def length(self) -> int:
        """Tokens in the cache: the prompt and all but the last of the answer."""
        return len(self.prompt) + max(len(self.tokens) - 1, 0)

    def cancel(self) -> None:
        """Ask for no more; the engine lets go of it before its next step."""
        self.is_cancelled = not self.is_done

    def take(self, choice: Choice, is_end: bool) -> None:
        """Add a token, and tell what is certain of the text."""
        if self.first_s is None:
            self.first_s = time.perf_counter()
        self.tokens.append(choice.token)
        text = ""
        if not is_end:
            text = self.writer.add(choice.token)
            if self.sampling.top_logprobs is not None:
                self._unsent.append(choice)
        finish: Finish | None = None
        if is_end or self.writer.is_stopped:
            finish = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            finish = "length"
        if finish is not None:
            text += self.writer.finish()
            finish = "stop" if self.writer.is_stopped else finish
            self.is_done = True
        if text or finish:
            choices, self._unsent = tuple(self._unsent), []
            self.tell(Piece(text, choices, finish))

    def fail(self, error: Refusal) -> None:
        """End without an answer."""
        self.is_done = True
        self.tell(Piece(error=error))
