"""Which chat template writes conversations: the tokenizer's own, a fallback's, or a file's."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from fedllm.errors import DataError, unknown

FALLBACKS = ("plain", "chatml", "alpaca", "llama3")
"""Templates for tokenizers that have none, beside this file in `templates/`."""


# Some templates (Llama 3.2) write today's date, which would make a run depend on the day.
FIXED = {"date_string": "26 Jul 2024"}
"""What templates are given beside messages and tools."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer; none of it changes the tokenizer."""

    chat_template: Any
    eos_token_id: Any
    added_tokens_decoder: Any
    special_tokens_map: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenise texts."""

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Write conversations."""

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Write tokens as text."""

    def convert_tokens_to_ids(self, *args: Any, **kwargs: Any) -> Any:
        """Look tokens up in the vocabulary."""


def chat_template(tokenizer: Tokenizer, name: str = "auto") -> str:
    """Return the Jinja source of a chat template.

    Args:
        tokenizer: Its own template is taken for `auto`, if it has one, else `plain`.
        name: `auto`, one of `FALLBACKS`, or the path of a `.jinja` file.

    Raises:
        DataError: If there is no such template.
    """
    if name == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):  # several templates under names
            own = _by_tools(own)
        if own:
            return str(own)
        name = "plain"
    if name in FALLBACKS:
        file = resources.files("fedllm.data") / "templates" / f"{name}.jinja"
        return file.read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if path.suffix != ".jinja":
        raise DataError(unknown("chat template", name, ("auto", *FALLBACKS, "FILE.jinja")))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"model.chat_template: {path} cannot be read: {error}") from None


def _by_tools(named: Mapping[str, str]) -> str | None:
    """Return the template called default, which gives way to `tool_use` where there are tools.

    transformers chooses so at each call; as one template the choice is the same everywhere. The
    empty expressions keep white space beside the choice from being trimmed.
    """
    plain, tools = named.get("default"), named.get("tool_use")
    if not plain or not tools or plain == tools:
        return plain
    # of a whole template one newline at the end does not count
    tools, plain = tools.removesuffix("\n"), plain.removesuffix("\n")
    nothing = "{{ '' }}"
    return nothing.join(["{% if tools %}", tools, "{% else %}", plain, "{% endif %}"])
