"""From a model's name to a local folder whose files were checked before anything is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fedllm.config import ModelConfig
from fedllm.errors import FedLLMError, ModelError, unknown
from fedllm.models.catalog import BUILTIN_MODELS, BUILTIN_PREFIX
from fedllm.weights import PICKLES, Stored, read_header, read_index, refuse_integers

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")


def locate(config: ModelConfig, *, weights: bool = True) -> Path:
    """Find the model's folder, fetching it from the hub (or the hub's cache) if it is not local.

    Args:
        config: `path` is `builtin:NAME`, a folder, or a hub id; `revision` is for hub ids.
        weights: False fetches and checks only the small files, enough for a size estimate.

    Raises:
        ModelError: If there is no such model, the hub cannot be reached, or the folder lacks a
            `config.json` or safetensors weights.
    """
    path = config.path
    if path.startswith(BUILTIN_PREFIX):
        folder = _builtin(path.removeprefix(BUILTIN_PREFIX))
    elif Path(path).expanduser().is_dir():
        folder = Path(path).expanduser()
    elif Path(path).expanduser().is_file():
        raise ModelError(f"model.path '{path}' is a file. Give the folder that holds it.")
    elif path.startswith(("/", ".", "~")) or path.count("/") > 1 or "\\" in path:
        raise ModelError(f"There is no folder '{path}'. Check model.path.")
    else:
        folder = _download(config, weights=weights)
    _check_config(folder, path)
    if weights:
        _check_weights(folder, path)
    return folder


@contextmanager
def reported(doing: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises inside the block into one `ModelError`.

    The libraries raise everything from `KeyError` to bare `Exception` for a damaged file, so no
    narrower list of types would do; the cause stays attached.

    Args:
        doing: What was tried, after "Cannot".
        remedy: What to do about it, as a sentence.

    Raises:
        ModelError: In place of any exception that is not one of ours.
    """
    try:
        yield
    except FedLLMError:
        raise
    except Exception as error:
        raise ModelError(f"Cannot {doing}: {_brief(error)}. {remedy}") from error


def _builtin(name: str) -> Path:
    if name not in BUILTIN_MODELS:
        raise ModelError(unknown(BUILTIN_MODELS.kind, name, BUILTIN_MODELS))
    package, _, inside = BUILTIN_MODELS[name].target.partition(":")
    folder = Path(str(resources.files(package).joinpath(inside)))
    if not folder.is_dir():
        raise ModelError(
            f"The built-in model '{name}' is missing from this installation. Install fedllm again."
        )
    return folder


def _download(config: ModelConfig, *, weights: bool) -> Path:
    """Return the hub's snapshot folder; offline, the one that an earlier run left in the cache."""
    patterns = [*_SMALL_FILES, *(["model*.safetensors"] if weights else [])]
    name = f"'{config.path}'"
    at_revision = f" at revision '{config.revision}'" if config.revision else ""
    remedy = "Check model.path, or give a local folder."
    try:
        # files in subfolders are other formats (onnx, original) of the same weights
        folder = snapshot_download(
            config.path,
            revision=config.revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
        )
    except HFValidationError:
        raise ModelError(f"There is no folder {name}, and it is no hub id. {remedy}") from None
    except GatedRepoError:
        raise ModelError(
            f"The hub model {name} is gated. Ask for access on its page, then run `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"The hub model {name} has no revision '{config.revision}'. Check model.revision."
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"There is no folder and no hub model {name}. {remedy}"
            " If it is private, run `hf auth login`."
        ) from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"There is no folder {name}, and the Hugging Face hub cannot be reached to look for a"
            f" model of that name{at_revision}. Go online, or give a local folder."
        ) from None
    except Exception as error:
        raise ModelError(
            f"Cannot fetch {name} from the Hugging Face hub: {_brief(error)}. Try again, or give a"
            " local folder."
        ) from error
    return Path(folder)


def _check_config(folder: Path, source: str) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"'{source}' holds a PEFT adapter, not a model. Give the base model that its"
            " adapter_config.json names."
        )
    raise ModelError(
        f"'{source}' has no config.json, so it is no model in Hugging Face layout. Give a folder"
        " written by save_pretrained."
    )


def _check_weights(folder: Path, source: str) -> None:
    """Refuse a folder whose weights are absent, damaged, ambiguous, or only there as pickles."""
    found = stored_weights(folder)
    if found:
        if not _is_quantised(folder):
            refuse_integers(found)
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        loader = _architecture(folder)
        raise ModelError(
            f"'{source}' has its weights only as a pickle ({', '.join(pickles)}), which can run any"
            " code when it is read, so fedllm reads safetensors only. If you trust its origin,"
            f' convert it once: python -c "from transformers import {loader} as M;'
            f" M.from_pretrained(r'{folder}', use_safetensors=False).save_pretrained(r'{folder}')\""
        )
    raise ModelError(
        f"'{source}' has no safetensors weights: {WEIGHTS} is missing. Fetch the model again, or"
        " convert pickled weights with save_pretrained."
    )


def stored_weights(folder: Path) -> dict[str, Stored]:
    """Return what the safetensors of a model folder hold, by their headers; none if there are none.

    Raises:
        ModelError: If a file is damaged or missing, or a tensor stands in two files.
    """
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if (folder / WEIGHTS_INDEX).is_file():
        return read_index(folder / WEIGHTS_INDEX)
    return {}


def _is_quantised(folder: Path) -> bool:
    try:
        return "quantization_config" in json.loads((folder / "config.json").read_bytes())
    except (ValueError, TypeError):
        return True  # whoever reads the file next says what is wrong with it


def _architecture(folder: Path) -> str:
    with reported(f"read {folder / 'config.json'}", "It must be a JSON object."):
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str((names.get("architectures") or ["AutoModel"])[0])


def _brief(error: Exception) -> str:
    """Return the start of a library's message on one line, without its closing full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else text[:300] + "...").rstrip(".")
