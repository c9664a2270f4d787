"""Verification, pushing and what a path is: by hand, without the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_world import call, fails, write_config
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import causal
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm.errors import ModelError, RunError
from fedllm.experiment.trained import open_trained
from fedllm.models import base_hash
from fedllm.models.quiet import quiet
from fedllm.results import find_artifact
from fedllm.results.export_push import check_push, push
from fedllm.results.export_verify import check_base, check_changed, compare

TinyModel = Callable[[str], Path]


# verification


def test_equal_logits_verify_and_the_figures_are_told() -> None:
    base, adapted = [torch.zeros(2, 3)], [torch.ones(2, 3) * 4]
    found = compare(adapted, [adapted[0] + 1e-5], base, dtype="float32", modules=7)
    assert found.effect == 4.0
    assert found.difference == pytest.approx(1e-5, rel=0.1)
    assert found.share == pytest.approx(2.5e-6, rel=0.1)
    assert (found.prompts, found.modules) == (1, 7)


@pytest.mark.parametrize(
    ("exported", "dtype", "told"),
    [
        (torch.full((2, 3), 4.1), "float32", "differ from the adapter's by 0.1, 2.5%"),
        (torch.full((2, 3), float("nan")), "bfloat16", "differ from the adapter's by nan"),
        (torch.full((2, 3), 3.93), "bfloat16", "would behave like the base model"),
    ],
)
def test_other_logits_fail(exported: torch.Tensor, dtype: str, told: str) -> None:
    adapted, base = [torch.full((2, 3), 4.0)], [torch.full((2, 3), 3.9)]
    with pytest.raises(ModelError, match=told):
        compare(adapted, [exported], base, dtype=dtype, modules=1)


def test_a_layer_that_has_not_changed_fails() -> None:
    before = {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}
    after = {"a": torch.ones(2, 2) + 1e-4, "b": torch.ones(2, 2)}
    with pytest.raises(ModelError, match=r"1 of 2 targeted layers .*\(b\)"):
        check_changed(before, after.__getitem__, torch.float32)
    rounded = {name: weight.bfloat16() for name, weight in after.items()}
    with pytest.raises(ModelError, match=r"2 of 2 .* bfloat16 is too coarse"):
        check_changed(before, rounded.__getitem__, torch.bfloat16)


def test_another_base_is_refused_and_the_same_in_another_format_is_not(
    tiny_model: TinyModel,
) -> None:
    model = causal(tiny_model("llama")).model
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_base(model, "causal-lm", base_hash(model, "causal-lm", dtype), "x")
    check_base(model, "causal-lm", None, "x")
    other = base_hash(causal(tiny_model("mistral")).model)
    with pytest.raises(ModelError, match="'x' is not the base model that the adapter was trained"):
        check_base(model, "causal-lm", other, "x")


# whole commands


@pytest.fixture(scope="module")
def world(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    words = ("training.local_steps=4", "training.learning_rate=0.05")
    code, text = call("run", write_config(folder, tiny_model("llama"), *words), "-q")
    assert code == 0, text
    return folder


def logits_in(folder: Path) -> torch.Tensor:
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found: torch.Tensor = model(input_ids=torch.arange(3, 27).view(2, 12)).logits
        return found


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (("--merged", "--dtype", "float32"), {"model.safetensors", "Modelfile"}),
        (
            ("--format", "merged", "--dtype", "bfloat16", "--max-shard-size", "50KB"),
            {"model.safetensors.index.json", "generation_config.json", "chat_template.jinja"},
        ),
        (("--format", "gguf", "--dtype", "q8_0"), {"model.gguf", "Modelfile"}),
        ((), {"adapter_model.safetensors", "fedllm.json", "chat_template.jinja"}),
    ],
)
def test_every_format_of_a_run_verifies(
    words: tuple[str, ...], files: set[str], world: Path, tmp_path: Path
) -> None:
    code, text = call("export", world / "runs" / "one", "--to", tmp_path / "x", *words, "--verify")
    assert code == 0, text
    assert files <= {file.name for file in (tmp_path / "x").iterdir()}
    assert "verified on 4 prompts" in text
    assert "all 4 targeted layers changed" in text.replace("\n", " ")


def test_an_adapter_exports_to_what_its_run_exports_to(world: Path, tmp_path: Path) -> None:
    run, to = world / "runs" / "one", ("--dtype", "float32", "--merged", "--to")
    assert call("export", run, "--to", tmp_path / "adapter")[0] == 0
    for source, name in ((run, "a"), (tmp_path / "adapter", "b")):
        code, text = call("export", source, *to, tmp_path / name, "--verify")
        assert code == 0, text
    torch.testing.assert_close(logits_in(tmp_path / "a"), logits_in(tmp_path / "b"))


def test_a_base_that_is_not_the_recorded_one_is_refused(
    world: Path, tiny_model: TinyModel, tiny_copy: TinyModel, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    assert call("export", world / "runs" / "one", "--to", adapter)[0] == 0
    other = tiny_copy("llama")

    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    text = fails("export", adapter, "--to", tmp_path / "x", "--merged", "--base", other)
    assert "is not the base model that the adapter was trained on" in text
    assert not (tmp_path / "x").exists()
    assert call("export", adapter, "--to", tmp_path / "x", "--merged", "--base",
                tiny_model("llama"))[0] == 0  # fmt: skip


def test_a_failed_verification_leaves_nothing(world: Path, tmp_path: Path) -> None:
    folder, weak = world / "runs" / "one", tmp_path / "weak"
    assert call("export", folder, "--to", weak)[0] == 0

    tensors = {n: t * 1e-4 for n, t in load_file(weak / "adapter_model.safetensors").items()}
    save_file(tensors, weak / "adapter_model.safetensors", {"format": "pt"})
    words = ("--to", tmp_path / "x", "--merged", "--dtype", "bfloat16", "--verify")
    text = fails("export", weak, *words)
    assert "verification failed: 4 of 4 targeted layers have the base's weights" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weak"]


def test_an_adapter_of_peft_itself_exports(tiny_model: TinyModel, tmp_path: Path) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = causal(tiny_model("qwen3")).model
        config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, use_dora=True,
                            target_modules=["q_proj", "down_proj"],
                            init_lora_weights=False)  # fmt: skip
        wrapped = get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = str(tiny_model("qwen3"))
    wrapped.save_pretrained(tmp_path / "dora")
    code, text = call("export", tmp_path / "dora", "--to", tmp_path / "m", "--merged",
                      "--dtype", "float32", "--verify")  # fmt: skip
    assert code == 0, text
    tokens = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(causal(tiny_model("qwen3")).model, tmp_path / "dora")
        want = expected.eval()(input_ids=tokens).logits
    torch.testing.assert_close(logits_in(tmp_path / "m"), want, atol=1e-4, rtol=1e-4)


def test_an_adapter_on_a_tied_output_leaves_the_input_embedding(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = causal(tiny_model("qwen3")).model
    embedding = model.get_input_embeddings().weight.detach().clone()
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        wrapped = get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = str(tiny_model("qwen3"))
    wrapped.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    whole = open_trained(tmp_path / "head").whole(dtype="float32", device="cpu").model
    assert torch.equal(whole.get_input_embeddings().weight, embedding)
    assert not torch.equal(whole.get_output_embeddings().weight, embedding)


def central(folder: Path, model: Path, result: str) -> Path:
    """Lay out what a central run leaves."""
    folder.mkdir()
    tree = {"stage": "sft", "model": {"path": str(model), "dtype": "float32", "device": "cpu"}}
    (folder / "config.yaml").write_text(json.dumps(tree))
    (folder / result).mkdir()
    return folder / result


def test_a_central_run_of_whole_weights_exports(tiny_model: TinyModel, tmp_path: Path) -> None:
    place = central(tmp_path / "full", tiny_model("llama"), "model")
    for file in tiny_model("llama").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    text = fails("export", tmp_path / "full", "--to", tmp_path / "x")
    assert "whole weights and no adapter" in text
    words = ("--merged", "--dtype", "float32", "--verify")
    code, text = call("export", tmp_path / "full", "--to", tmp_path / "x", *words)
    assert code == 0, text
    assert torch.equal(logits_in(tmp_path / "x"), logits_in(place))


def test_a_central_adapter_exports_with_the_template_beside_it(
    world: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    assert call("export", world / "runs" / "one", "--to", tmp_path / "adapter")[0] == 0
    place = central(tmp_path / "lora", tiny_model("llama"), "adapter")
    for file in (tmp_path / "adapter").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    template = (place / "chat_template.jinja").read_text() + "{# mine #}"
    (place / "chat_template.jinja").write_text(template)
    code, text = call("export", tmp_path / "lora", "--to", tmp_path / "x", "--merged")
    assert code == 0, text
    assert AutoTokenizer.from_pretrained(tmp_path / "x").chat_template == template


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--merged", "--format", "gguf"), "contradict each other"),
        (("--dtype", "float16"), "an adapter is always float32"),
        (("--merged", "--dtype", "q8_0"), "add --format gguf"),
        (("--merged", "--max-shard-size", "5 apples"), "give a size such as 5GB"),
        (("--private",), "--private goes with --push"),
        (("--base", "builtin:tiny"), "names its base model itself"),
        (("--push", "a/b/c"), "no repository's name"),
    ],
)
def test_words_that_mean_nothing_are_refused_before_anything_is_loaded(
    words: tuple[str, ...], told: str, world: Path, tmp_path: Path
) -> None:
    assert told in fails("export", world / "runs" / "one", "--to", tmp_path / "x", *words)
    assert not (tmp_path / "x").exists()


# what a path is


def test_a_path_is_told_apart(world: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    run = find_artifact(world / "runs" / "one")
    assert (run.kind, run.model.path) == ("federated", str(tiny_model("llama")))
    assert run.adapter is not None
    assert find_artifact(run.adapter).kind == "adapter"
    assert find_artifact(run.adapter).model.path == str(tiny_model("llama"))
    assert find_artifact(tiny_model("llama")).kind == "model"
    assert find_artifact("builtin:tiny").kind == "model"
    assert not find_artifact(tiny_model("llama")).is_classifier
    with pytest.raises(ModelError, match=r"no run .* no adapter .* no model"):
        find_artifact(tmp_path)
    with pytest.raises(ModelError, match="--base is for adapters"):
        find_artifact(tiny_model("llama"), "x")
    with pytest.raises(RunError, match="no adapter of client 7"):
        run.adapter_of(7)


def test_a_central_run_that_is_not_done_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("stage: sft\n")
    with pytest.raises(RunError, match="fedllm train --resume"):
        find_artifact(tmp_path)


# the hub


class FakeHub:
    """Takes down what it is asked; raises what it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error = error

    def whoami(self) -> Any:
        if self.error is not None:
            raise self.error
        return {"name": "me"}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", repo_id, folder_path))


def test_a_push_makes_the_repository_and_uploads_one_commit(tmp_path: Path) -> None:
    hub = FakeHub()
    check_push("me/mine", hub)
    assert hub.calls == []
    push(tmp_path, "me/mine", is_private=True, hub=hub)
    assert hub.calls == [("create", "me/mine", True, True), ("upload", "me/mine", str(tmp_path))]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LocalTokenNotFoundError("none"), "hf auth login"),
        (OSError("no route"), "cannot be reached to push me/mine: no route"),
        (HfHubHTTPError.__new__(HfHubHTTPError), "The hub refuses to take me/mine"),
    ],
)
def test_a_push_that_fails_is_told_and_the_export_stays(
    error: Exception, told: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=told):
        check_push("me/mine", FakeHub(error))
    with pytest.raises(RunError, match=f"{told}.*The export itself is in {tmp_path}"):
        push(tmp_path, "me/mine", is_private=False, hub=FakeHub(error))


def test_a_command_pushes_what_it_wrote(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    monkeypatch.setattr("fedllm.results.export_push.own_hub", lambda: hub)
    words = ("--to", tmp_path / "x", "--push", "me/mine", "--private")
    code, text = call("export", world / "runs" / "one", *words)
    assert code == 0, text
    assert "pushed to https://huggingface.co/me/mine" in text
    assert hub.calls[-1] == ("upload", "me/mine", str(tmp_path / "x"))
