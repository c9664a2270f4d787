"""`export --verify`: what was written does what was trained, and is no other model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.adapters.reading import is_native
from fedllm.config import ModelConfig
from fedllm.errors import ModelError
from fedllm.experiment.sources import Source

if TYPE_CHECKING:
    from torch import Tensor

    from fedllm.results.export_verify import Verified


def verify(source: Source, folder: Path, form: str, dtype: str) -> Verified:
    """Compare base and adapter with the export, in fp32 on the CPU.

    Merged weights and GGUF are read again from their files; an adapter is merged in memory.

    Args:
        source: What was exported.
        folder: Where it was written.
        form: `peft`, `merged` or `gguf`.
        dtype: In which the weights are stored.

    Raises:
        ModelError: If logits differ by more than rounding, or a layer has not changed.
    """
    import torch

    from fedllm.models.quiet import quiet
    from fedllm.results.export_merge import targeted, with_adapter
    from fedllm.results.export_verify import check_changed, compare, logits_of

    adapter = source.trained.adapter
    if adapter is not None and is_native(adapter):
        raise ModelError(
            "--verify compares with PEFT, which has no layout for this algorithm's adapter (see"
            " `fedllm.attach`). Export it without --verify"
        )
    with quiet():
        base = source.trained.base(dtype="float32", device="cpu").model
        layers = targeted(adapter) if adapter is not None else ()
        before = {name: _weight(base, name) for name in layers}
        plain = logits_of(base, source.prompts) if adapter is not None else None
        whole = base if adapter is None else with_adapter(base, adapter)
        adapted = logits_of(whole, source.prompts)
        exported = _exported(source, folder, form)
        rounded = torch.float32 if dtype == "q8_0" else getattr(torch, dtype)
        check_changed(before, lambda name: _weight(exported, name), rounded)
        found = logits_of(exported, source.prompts)
        return compare(adapted, found, plain, dtype=dtype, modules=len(layers))


def _weight(model: Any, layer: str) -> Tensor:
    weight: Tensor = model.get_submodule(layer).weight
    return weight


def _exported(source: Source, folder: Path, form: str) -> Any:
    from fedllm.models import load_model
    from fedllm.results.export_merge import merge_adapter

    if form == "peft":
        return merge_adapter(source.trained.base(dtype="float32", device="cpu").model, folder)
    if form == "gguf":
        from fedllm.results.export_gguf import GGUF_FILE, load_gguf

        model = source.merged("float32")
        load_gguf(model, folder / GGUF_FILE)
        return model
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu")
    return load_model(config, kind=source.trained.kind).model
