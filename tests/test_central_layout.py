"""Batches of central runs: laid end to end, or in rows, they teach the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from central_runs import answers, central, run_dir, weights

from fedllm.central import packed
from fedllm.central.packed import FlatCollator, layout
from fedllm.central.parts import build
from fedllm.central.trainers import _on_one_device

pytestmark = pytest.mark.filterwarnings("ignore")  # as `fedllm` itself does

ONE_STEP = ("training.max_steps=1", "training.shuffle=false", "training.optimizer=sgd",
            "training.learning_rate=1.0", "training.max_grad_norm=0",
            "training.batch_size=9")  # fmt: skip


def test_examples_lie_end_to_end_short_ones_first() -> None:
    batch = FlatCollator()(
        [
            {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "seq_lengths": [3, 2]},
            {"input_ids": [6, 7, 8], "labels": [-100, 7, 8]},
        ]
    )
    assert batch["lengths"] == [2, 3, 3]
    assert batch["input_ids"].tolist() == [[4, 5, 1, 2, 3, 6, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 5, -100, 2, 3, -100, 7, 8]]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("training.gradient_checkpointing=true",),
                                  ("training.packing=true",)])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_rows_end_to_end_teach_what_rows_below_one_another_do(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    more: tuple[str, ...],
) -> None:
    data = answers(tmp_path / "answers.jsonl")
    words = (*ONE_STEP, *more, f"model.path={tiny_model(family)}", "adapter.targets=all-linear")
    laid: list[bool] = []

    def noted(*given: object) -> object:
        found = layout(*given)  # type: ignore[arg-type]  # handed through
        laid.append(found is not None)
        return found

    monkeypatch.setattr(packed, "layout", noted)
    flat = weights(run_dir(central(tmp_path, data, "sft", *words, "name=flat")))
    monkeypatch.setattr(packed, "_flat", lambda config, tuned: None)
    rows = weights(run_dir(central(tmp_path, data, "sft", *words, "name=rows")))
    assert laid == [True, False]
    assert any(tensor.abs().max() > 1e-3 for name, tensor in flat.items() if "lora_B" in name)
    for name in rows:
        torch.testing.assert_close(flat[name], rows[name], atol=1e-5, rtol=1e-3)


def test_rows_stay_apart_where_one_row_would_change_what_is_learned(tmp_path: Path) -> None:
    data = answers(tmp_path / "answers.jsonl")

    def is_flat(*words: str, stage: str = "sft") -> bool:
        config = central(tmp_path, data, stage, *words)
        return layout(config, build(config).tuned) is not None

    assert is_flat()
    assert is_flat("training.packing=true")
    assert not is_flat("training.neftune_alpha=5")


def test_a_model_that_would_mix_examples_gets_them_in_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = central(tmp_path, answers(tmp_path / "answers.jsonl"), "sft")
    tuned = build(config).tuned
    own = tuned.body.forward
    monkeypatch.setattr(
        tuned.body,
        "forward",
        lambda position_ids=None, packing=None, **rest: own(**rest),
    )
    assert layout(config, tuned) is None


def test_one_process_trains_on_one_gpu() -> None:
    assert _on_one_device(SimpleNamespace(n_gpu=2, _n_gpu=2))._n_gpu == 1
    assert _on_one_device(SimpleNamespace(n_gpu=0, _n_gpu=0))._n_gpu == 0
