"""A trained model leaves its run: as a PEFT adapter, or merged into the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm.adapters.native_format import CONFIG_FILE
from fedllm.errors import RunError
from fedllm.experiment.evaluate import check_client
from fedllm.experiment.outputs import view_of, write_adapter
from fedllm.experiment.parts import Parts, load_base
from fedllm.experiment.run import restored
from fedllm.results import export_merged, new_folder

if TYPE_CHECKING:
    from fedllm.models import LoadedModel


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    files: tuple[tuple[str, int], ...]
    """Name and bytes of each file."""
    base: Path
    """Folder or hub id of the base model, as transformers loads it."""
    auto_class: str
    """The class of transformers that loads it."""
    num_labels: int
    """Classes of a classifier; 0 for others."""
    is_merged: bool
    is_native: bool
    """Whether the adapter is in fedllm's own layout, which `fedllm.attach` reads."""


def export(
    path: Path,
    folder: Path,
    *,
    merged: bool = False,
    client: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write the last checkpoint's global view, or one client's own.

    Args:
        path: The run directory.
        folder: Must not exist.
        merged: Write whole weights instead of an adapter. A quantised base is loaded again
            unquantised for that.
        client: Whose view; None is the global one.
        say: Told what is being done.

    Raises:
        RunError: If there is no run, checkpoint or client, or the folder exists.
    """
    if folder.exists():
        raise RunError(f"{folder} exists and is not overwritten; choose another folder")
    parts, _ = restored(path, say)
    if client is not None:
        check_client(parts, client)
    say("writing")
    _write(parts, folder, merged, client)
    return _described(parts, folder, merged)


def _write(parts: Parts, folder: Path, merged: bool, client: int | None) -> None:
    from fedllm.models.quiet import quiet

    if merged:
        payload = view_of(parts, client)
        plain = _unwrapped(parts)
        with quiet():
            export_merged(plain.model, plain.tokenizer, payload.adapter, folder, base=payload.base)
    else:
        with new_folder(folder) as temporary:
            write_adapter(parts, temporary, client)
            parts.loaded.tokenizer.save_pretrained(temporary)


def _unwrapped(parts: Parts) -> LoadedModel:
    """Load the base once more: the one in the engine has adapter layers in it."""
    dtype = str(parts.engine.resident.dtype).removeprefix("torch.")
    plain = {"quantization": "none", "device": "cpu", "dtype": dtype}
    model = parts.config.model.model_copy(update=plain)
    return load_base(parts.config.model_copy(update={"model": model}), parts.dataset)


def _described(parts: Parts, folder: Path, merged: bool) -> Exported:
    from fedllm.models.sources import locate

    files = sorted(file for file in folder.iterdir() if file.is_file())
    causal = parts.kind == "causal-lm"
    return Exported(
        folder=folder,
        files=tuple((file.name, file.stat().st_size) for file in files),
        base=locate(parts.config.model, weights=False),
        auto_class="AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification",
        num_labels=0 if causal else len(parts.dataset.label_names),
        is_merged=merged,
        is_native=any(file.name == CONFIG_FILE for file in files),
    )
