"""Tokens to text as they come, up to a stop string, no part of which is ever written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Writer:
    """The text of one answer.

    Args:
        tokenizer: Of transformers.
        stop: Strings at which the answer ends.
        keeps_controls: Write control tokens, too (calls of tools are marked by some).
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), *, keeps_controls: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._skips = not keeps_controls
        self._ids: list[int] = []
        self._stream = None
        if getattr(tokenizer, "is_fast", False):
            self._stream = DecodeStream(skip_special_tokens=self._skips)
        self._decoded = ""
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Take a token; return the text that is certain by now."""
        self._ids.append(token)
        if self._stream is not None:
            fresh = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        else:
            whole = self._whole()
            is_open = whole.endswith("\ufffd") or not whole.startswith(self._decoded)
            fresh = "" if is_open else whole[len(self._decoded) :]
        self._decoded += fresh
        return self._passed(fresh) if fresh else ""

    def finish(self) -> str:
        """Return what was held back, now that no token follows."""
        if self.is_stopped:
            return ""
        whole = self._whole()
        fresh = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        self._decoded += fresh
        text = self._passed(fresh) if fresh else ""
        if not self.is_stopped:
            text, self._held = text + self._held, ""
        return text

    def _whole(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=self._skips))

    def _passed(self, fresh: str) -> str:
        """Return what cannot be part of a stop string any more."""
        if not self._stop:
            return fresh
        text = self._held + fresh
        # the one that is complete first counts, however the text is divided into tokens
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of a text may begin a stop string."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
