"""`fedllm chat`: a conversation in the terminal, or through a pipe."""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.cli.errors import reported, tell
from fedllm.cli.serve import AdapterOption, Device, Dtype, SourceArgument, resolve
from fedllm.starting import import_transformers

if TYPE_CHECKING:
    from fedllm.data.rows import Message
    from fedllm.serving.host import Host, Wish

HELP = """\
/reset            forget the conversation
/system TEXT      set what the model is told first, and forget the conversation
/adapter [NAME]   answer with another adapter, or list them
/help             show this
/exit             leave (or Ctrl-D)
Several lines: put them between \"\"\" and \"\"\", or end each but the last with a backslash.
Ctrl-C stops an answer."""


System = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="What the model is told first."),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="Which adapter answers at first."),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", min=0.0, max=2.0, help="Default as the model says; 0 takes the likeliest."
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, help="Longest answer; default as the model says."),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="The same seed gives the same answers."),
]


def chat(
    source: SourceArgument,
    adapter: AdapterOption = None,
    system: System = None,
    model: Model = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Talk to a model, and switch between its adapters."""
    with reported():
        found = resolve(source, adapter, device, dtype)
        import_transformers()
        from fedllm.errors import FedLLMError, unknown
        from fedllm.serving.host import Host, Wish
        from fedllm.serving.scheduler import Limits

        host = Host(found, Limits(max_batch=1, kv_bytes=0))
        if model is not None and model not in host.rows:
            raise FedLLMError(unknown("model", model, host.rows))
        wish = Wish(max_tokens=max_tokens, temperature=temperature, seed=seed)
        talk = Talk(host, wish, model or host.names[0], system)
        host.scheduler.start()
        try:
            _converse(talk)
        finally:
            host.scheduler.close()


@dataclass
class Talk:
    """A conversation so far."""

    host: Host
    wish: Wish
    name: str
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def command(self, line: str) -> str | None:
        """Carry out a line that begins with a slash; return what to say, None to leave."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        match word:
            case "/exit" | "/quit":
                return None
            case "/help":
                return HELP
            case "/reset":
                self.messages.clear()
                return "the conversation is forgotten"
            case "/system":
                self.system = rest or None
                self.messages.clear()
                return "the system prompt is set" if rest else "there is no system prompt now"
            case "/adapter":
                return self._choose(rest)
        from fedllm.errors import did_you_mean

        known = ("/adapter", "/exit", "/help", "/reset", "/system")
        return f"there is no command {word}.{did_you_mean(word, known)} /help names them"

    def _choose(self, name: str) -> str:
        from fedllm.errors import unknown

        if name and name not in self.host.rows:
            return unknown("adapter", name, self.host.rows)
        self.name = name or self.name
        marks = (f"* {n}" if n == self.name else f"  {n}" for n in self.host.names)
        return f"{name} answers now" if name else "\n".join(marks)

    def answer(self, text: str) -> Iterator[str]:
        """Say something; yield the answer piece by piece.

        Raises:
            Refusal: If it cannot be answered; the conversation is then as before.
        """
        from fedllm.data.rows import Message
        from fedllm.serving.generation import Piece

        asked = [*self.messages, Message("user", text)]
        first = [Message("system", self.system)] if self.system is not None else []
        prompt = self.host.prompt([*first, *asked], ())
        box: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        one = self.host.generation(self.name, prompt, self.wish, box.put)
        self.host.scheduler.submit([one])
        said = ""
        try:
            while True:
                piece = box.get()
                if piece.error is not None:
                    raise piece.error
                said += piece.text
                yield piece.text
                if piece.is_last:
                    break
        finally:
            one.cancel()
            if said:
                self.messages = [*asked, Message("assistant", said)]


def _converse(talk: Talk) -> None:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        typer.echo(f"{talk.name} answers. /help names the commands, Ctrl-D leaves.")
    read = _reader(is_terminal)
    while True:
        try:
            text = read_turn(read)
        except KeyboardInterrupt:  # at the prompt it clears the line
            typer.echo()
            continue
        if text is None:
            return
        if text.startswith("/") and "\n" not in text:
            reply = talk.command(text)
            if reply is None:
                return
            typer.echo(reply)
        elif text.strip():
            _say(talk, text)


def _say(talk: Talk, text: str) -> None:
    from fedllm.serving.refusals import Refusal

    try:
        for part in talk.answer(text):
            sys.stdout.write(part)
            sys.stdout.flush()
        sys.stdout.write("\n")
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        tell("stopped: the answer so far is kept", "yellow")
    except Refusal as refusal:
        tell(f"error: {refusal.message}")
    sys.stdout.flush()


def _reader(is_terminal: bool) -> Callable[[str], str | None]:
    """Return what reads a line: with a prompt and editing in a terminal, without in a pipe."""
    if is_terminal:
        import readline  # noqa: F401  # gives `input` its editing and history

    def read(prompt: str) -> str | None:
        try:
            if is_terminal:
                return input(prompt)
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        except EOFError:
            return None

    return read


def read_turn(read: Callable[[str], str | None]) -> str | None:
    """Read what the user says, of one line or several; None at the end.

    Args:
        read: Reads a line after a prompt; None at the end.
    """
    line = read("> ")
    if line is None:
        return None
    if line.lstrip().startswith('"""'):
        return _block(line.lstrip()[3:], read)
    lines = []
    while line is not None and line.endswith("\\"):
        lines.append(line[:-1])
        line = read("... ")
    return "\n".join([*lines, line or ""])


def _block(first: str, read: Callable[[str], str | None]) -> str:
    lines: list[str] = []
    line: str | None = first
    while line is not None:
        if line.rstrip().endswith('"""'):
            lines.append(line.rstrip()[:-3])
            break
        lines.append(line)
        line = read("... ")
    return "\n".join(lines).strip("\n")
