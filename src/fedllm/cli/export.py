"""`fedllm export`: a trained model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from fedllm.cli.errors import reported
from fedllm.cli.figures import bytes_text
from fedllm.cli.inspect import new_table, print_line
from fedllm.errors import FedLLMError

if TYPE_CHECKING:
    from fedllm.experiment.export import Exported, Form
    from fedllm.results.export_verify import Verified


What = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run, a PEFT adapter, or a model's folder.")
]
To = Annotated[Path, typer.Option("--to", metavar="DIR", help="A folder that is not there.")]
Merged = Annotated[
    bool, typer.Option("--merged", help="Whole weights; the same as --format merged.")
]
Format = Annotated[
    Literal["peft", "merged", "gguf"] | None,
    typer.Option("--format", help="An adapter (default), whole weights, or a GGUF file."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "q8_0"] | None,
    typer.Option("--dtype", help="Of whole weights; default: as in training. q8_0 for GGUF."),
]
ShardSize = Annotated[
    str, typer.Option("--max-shard-size", metavar="SIZE", help="Of one file of weights.")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Compare logits with those of base and adapter.")
]
Client = Annotated[
    int | None,
    typer.Option(metavar="CID", help="This client's own view; default the global one."),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Of an adapter, if not the one it names."),
]
Push = Annotated[
    str | None,
    typer.Option("--push", metavar="REPO_ID", help="Upload the folder to the hub, too."),
]
Private = Annotated[
    bool, typer.Option("--private", help="With --push: a new repository is private.")
]


def export(
    path: What,
    to: To,
    merged: Merged = False,
    form: Format = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    verify: Verify = False,
    client: Client = None,
    base: Base = None,
    push: Push = None,
    private: Private = False,
) -> None:
    """Write a trained model: as a PEFT adapter, merged into its weights, or as GGUF."""
    console = Console()
    with reported():
        from fedllm.experiment.export import Wish
        from fedllm.experiment.export import export as write

        _check_push(push, private)
        wish = Wish(_form(merged, form), dtype, max_shard_size, client, base, verify)
        with console.status("looking") as status:
            found = write(path, to, wish, say=status.update)
        print_export(console, found)
        if push is not None:
            _push(console, found, push, private)


def print_export(console: Console, found: Exported) -> None:
    """Print what was written and three lines of Python that load it."""
    table = new_table("file", "size", title=f"written to {found.folder}")
    for name, size in found.files:
        table.add_row(name, bytes_text(size))
    console.print(table)
    for note in found.notes:
        print_line(console, f"note: {note}")
    if found.verified is not None:
        _print_verified(console, found.verified)
    print_line(console, "load it with:")
    for line in _loading(found):
        console.print(Text(f"  {line}", style="cyan"), soft_wrap=True)


def _loading(found: Exported) -> list[str]:
    """Return lines of Python, or of a shell, that load what was written."""
    base = f'base = {found.auto_class}.from_pretrained("{found.base}"{_labels(found)})'
    if found.form == "gguf":
        return [f"ollama create {found.folder.name} -f {found.folder}/Modelfile"]
    if found.form == "merged":
        return [
            f"from transformers import AutoTokenizer, {found.auto_class}",
            f'model = {found.auto_class}.from_pretrained("{found.folder}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{found.folder}")',
        ]
    if found.is_native:
        return [
            f"import fedllm; from transformers import {found.auto_class}",
            base,
            f'model = fedllm.attach(base, "{found.folder}")',
        ]
    return [
        f"from peft import PeftModel; from transformers import {found.auto_class}",
        base,
        f'model = PeftModel.from_pretrained(base, "{found.folder}")',
    ]


def _labels(found: Exported) -> str:
    return f", num_labels={found.num_labels}" if found.num_labels else ""


def _print_verified(console: Console, verified: Verified) -> None:
    trained = f"; training moved them by {verified.effect:.3g}" if verified.modules else ""
    changed = f"; all {verified.modules} targeted layers changed" if verified.modules else ""
    print_line(
        console,
        f"verified on {verified.prompts} prompts: logits differ by {verified.difference:.3g} at"
        f" most ({verified.share:.2g} of the largest){trained}{changed}",
    )


def _form(merged: bool, form: Form | None) -> Form:
    if merged and form not in (None, "merged"):
        raise FedLLMError(f"--merged and --format {form} contradict each other; give one of them")
    return "merged" if merged else form or "peft"


def _check_push(repo_id: str | None, is_private: bool) -> None:
    """Find out before the work begins whether a push can succeed."""
    if repo_id is None:
        if is_private:
            raise FedLLMError("--private goes with --push REPO_ID; give both or neither")
        return
    from fedllm.results.export_push import check_push, own_hub

    check_push(repo_id, own_hub())


def _push(console: Console, found: Exported, repo_id: str, is_private: bool) -> None:
    from fedllm.results.export_push import own_hub, push

    with console.status(f"uploading to {repo_id}"):
        push(found.folder, repo_id, is_private=is_private, hub=own_hub())
    print_line(console, f"pushed to https://huggingface.co/{repo_id}")
