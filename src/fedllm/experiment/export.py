"""A trained model leaves its run: as a PEFT adapter, merged into the weights, or as GGUF."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedllm.adapters.reading import is_native
from fedllm.errors import FedLLMError, RunError
from fedllm.experiment.sources import Source, source_of
from fedllm.experiment.verification import verify
from fedllm.results import new_folder, write_model

if TYPE_CHECKING:
    from fedllm.results.export_chat import Speech
    from fedllm.results.export_verify import Verified

Form = Literal["peft", "merged", "gguf"]
Dtype = Literal["float32", "bfloat16", "float16", "q8_0"]
_GGUF_TYPES: dict[str, Any] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
MODELFILE = "Modelfile"


@dataclass(frozen=True)
class Wish:
    """What is to be written."""

    form: Form = "peft"
    dtype: Dtype | None = None
    """Of merged weights; None: as the training held them. `q8_0` is for GGUF alone."""
    max_shard_size: str = "5GB"
    client: int | None = None
    """Whose view, of a federated run; None is the global one."""
    base: str | None = None
    """The base model of an adapter, if not the one that it names."""
    is_verified: bool = False
    """Compare what was written with what was trained, before it is put in place."""


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
    form: Form
    is_native: bool
    """Whether the adapter is in fedllm's own layout, which `fedllm.attach` reads."""
    notes: tuple[str, ...] = ()
    """What could not be written."""
    verified: Verified | None = None


def export(
    path: Path,
    folder: Path,
    wish: Wish = Wish(),
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write what was trained into a new folder, whole or not at all.

    Args:
        path: A federated or central run, a PEFT adapter, or a model.
        folder: Must not exist.
        wish: What is to be written.
        say: Told what is being done.

    Raises:
        RunError: If there is no run, checkpoint or client, or the folder exists.
        ModelError: If a model or adapter is damaged, does not fit, cannot be converted, or the
            verification fails.
        MissingExtraError: If GGUF is asked for and the library is not installed.
    """
    if folder.exists():
        raise RunError(f"{folder} exists and is not overwritten; choose another folder")
    _check(wish)
    with tempfile.TemporaryDirectory(prefix="fedllm-export-") as scratch:
        source = source_of(path, wish.client, wish.base, Path(scratch), say)
        _check_source(source, wish)
        say("writing")
        with new_folder(folder) as temporary:
            notes = _write(source, temporary, wish)
            verified = None
            if wish.is_verified:
                say("verifying")
                verified = verify(source, temporary, wish.form, _dtype(source, wish))
        return _described(source, folder, wish, notes, verified)


def _check(wish: Wish) -> None:
    """Refuse wishes that contradict each other."""
    if wish.dtype is not None and wish.form == "peft":
        raise FedLLMError(
            "--dtype is for whole weights; an adapter is always float32. Add --merged, or leave"
            " --dtype out"
        )
    if wish.dtype == "q8_0" and wish.form != "gguf":
        raise FedLLMError("--dtype q8_0 is a format of GGUF; add --format gguf")
    if not re.fullmatch(r"[1-9][0-9]*(\.[0-9]+)? ?[KMGT]?B", wish.max_shard_size):
        raise FedLLMError(
            f"--max-shard-size {wish.max_shard_size}: give a size such as 5GB or 200MB"
        )


def _check_source(source: Source, wish: Wish) -> None:
    """Refuse, before anything is written, what has no such form."""
    whole = source.trained.adapter is None
    if whole and wish.form == "peft":
        raise FedLLMError(
            f"{source.trained.artifact.path} has whole weights and no adapter; export them with"
            " --merged or --format gguf"
        )
    if wish.form == "gguf":
        from fedllm.results.export_gguf import check_gguf

        check_gguf(source.loaded.model.config.model_type, source.loaded.model.config)


def _write(source: Source, folder: Path, wish: Wish) -> tuple[str, ...]:
    """Write the files; return what could not be written."""
    from fedllm.models.quiet import quiet
    from fedllm.results.export_chat import settle, speech_of

    tokenizer = source.tokenizer
    if wish.form == "peft":
        source.copy_adapter(folder)
        settle(None, tokenizer, speech_of(source.loaded.model, tokenizer, source.template))
        tokenizer.save_pretrained(folder)
        return ()
    with quiet():
        model = source.merged(_held(source, wish))
        speech = speech_of(model, tokenizer, source.template)
        settle(model, tokenizer, speech)
        if wish.form == "merged":
            write_model(model, tokenizer, folder, max_shard_size=wish.max_shard_size)
        else:
            _write_gguf(source, model, speech, folder, wish)
    if source.trained.kind != "causal-lm":
        return ()
    return _write_modelfile(tokenizer, speech, folder, wish)


def _write_gguf(source: Source, model: Any, speech: Speech, folder: Path, wish: Wish) -> None:
    from fedllm.results.export_gguf import GGUF_FILE, verify_gguf, write_gguf

    dtype = _dtype(source, wish)
    kind = _GGUF_TYPES.get(dtype, dtype)
    with tempfile.TemporaryDirectory(prefix="fedllm-tokenizer-") as words:
        source.tokenizer.save_pretrained(words)
        write_gguf(model, Path(words), speech, folder / GGUF_FILE, kind)
    if wish.is_verified:
        verify_gguf(model, folder / GGUF_FILE, kind)


def _write_modelfile(tokenizer: Any, speech: Speech, folder: Path, wish: Wish) -> tuple[str, ...]:
    from fedllm.results.export_gguf import GGUF_FILE
    from fedllm.results.export_ollama import modelfile

    text, note = modelfile(tokenizer, speech, "." if wish.form == "merged" else f"./{GGUF_FILE}")
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    return () if note is None else (note,)


def _dtype(source: Source, wish: Wish) -> str:
    """Return how the weights are stored."""
    if wish.form == "peft":
        return "float32"
    return wish.dtype or str(source.loaded.model.dtype).removeprefix("torch.")


def _held(source: Source, wish: Wish) -> str:
    """Return how the weights are held while they are merged: what q8_0 is made from is float32."""
    dtype = _dtype(source, wish)
    return "float32" if dtype == "q8_0" else dtype


def _described(
    source: Source, folder: Path, wish: Wish, notes: tuple[str, ...], verified: Verified | None
) -> Exported:
    from fedllm.models.sources import locate

    files = sorted(file for file in folder.iterdir() if file.is_file())
    causal = source.trained.kind == "causal-lm"
    return Exported(
        folder=folder,
        files=tuple((file.name, file.stat().st_size) for file in files),
        base=locate(source.trained.artifact.model, weights=False),
        auto_class="AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification",
        num_labels=0 if causal else int(source.loaded.model.config.num_labels or 0),
        form=wish.form,
        is_native=is_native(folder),
        notes=notes,
        verified=verified,
    )
