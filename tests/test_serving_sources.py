"""What can be served: runs, adapters of any writer, whole models; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_worlds import LIMITS, QUESTION, TINY, Reply, prompt_of, running, write_adapters
from small_runs import Silent, small_config, write_questions

from fedllm.config import ModelConfig
from fedllm.errors import ModelError, RunError
from fedllm.experiment.run import run
from fedllm.models import load_model
from fedllm.models.quiet import quiet
from fedllm.serving import Source, find_source, with_adapters
from fedllm.serving.adapters import read_adapter
from fedllm.serving.host import Host
from fedllm.serving.keys import Keys
from fedllm.serving.server import Address
from fedllm.serving.vllm import command, environment


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


def carried_out(folder: Path, model: Path, *words: str) -> Path:
    """Carry out a run of a second or two; return its folder."""
    config = small_config(folder, model, write_questions(folder / "data.jsonl"), *words)
    return run(config, Silent()).path  # type: ignore[arg-type]


# runs


@pytest.mark.slow
def test_a_personalised_run_serves_its_global_view_and_each_clients(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    path = carried_out(tmp_path, tiny_model("llama"), "algorithm=ditto", "federation.cohort_size=3")
    source = find_source(str(path))
    assert source.names == ("global", "client-0", "client-1", "client-2", "base")
    assert source.model.path == str(tiny_model("llama"))
    with running(Host(source, LIMITS)) as host:
        prompt = prompt_of(host, "3 + 4")
        for name in host.names:
            Reply(host, name, prompt, max_tokens=3).text()
    folder = find_source(str(source.adapters["client-1"]))
    assert folder.names == ("client-1", "base")
    assert folder.model == source.model


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedlease", "fedalt"])
def test_adapters_with_routers_say_what_attach_says(
    algorithm: str, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    import fedllm

    path = carried_out(tmp_path, tiny_model("llama"), f"algorithm={algorithm}")
    source = find_source(str(path))
    with running(Host(source, LIMITS)) as host:
        prompt = prompt_of(host, "3 + 4")
        replies = {name: Reply(host, name, prompt, max_tokens=8) for name in host.names}
        for name, reply in replies.items():
            reply.text()
            with quiet():
                model: Any = load_model(source.model, kind="causal-lm").model
            if name != "base":
                fedllm.attach(model, source.adapters[name])
            ids = torch.tensor([prompt])
            words = {"max_new_tokens": 8, "do_sample": False}
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **words)
            assert reply.one.tokens == out[0, len(prompt) :].tolist(), name


def test_a_central_run_serves_its_adapter_or_its_whole_model(
    tmp_path: Path, adapters: dict[str, Path], tiny_model: Callable[[str], Path]
) -> None:
    run_folder = tmp_path / "central"
    run_folder.mkdir()
    (run_folder / "config.yaml").write_text(
        "stage: sft\nmodel: {path: 'builtin:tiny', chat_template: chatml}\n"
    )
    with pytest.raises(RunError, match="has not ended"):
        find_source(str(run_folder))
    shutil.copytree(adapters["client-0"], run_folder / "adapter")
    source = find_source(str(run_folder))
    assert source.names == ("global", "base")
    assert (source.model.path, source.model.chat_template) == ("builtin:tiny", "chatml")
    shutil.rmtree(run_folder / "adapter")
    shutil.copytree(tiny_model("llama"), run_folder / "model")
    whole = find_source(str(run_folder))
    assert whole.names == ("global",)
    assert whole.model.path == str(run_folder / "model")


def test_the_prompt_is_written_by_the_template_of_the_run(
    tmp_path: Path, adapters: dict[str, Path]
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    model = TINY.model_copy(update={"chat_template": str(template)})
    host = Host(Source(model, adapters), LIMITS)
    assert host.tokenizer.decode(prompt_of(host, QUESTION)) == f"[user] {QUESTION}\n[assistant] "


def test_a_classifier_a_run_without_a_checkpoint_and_nothing_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: {path: 'builtin:tiny', kind: sequence-classification}\nstage: sft\n")
    shutil.copytree(write_adapters(tmp_path, count=1)["client-0"], tmp_path / "adapter")
    with pytest.raises(RunError, match="classifier"):
        find_source(str(tmp_path))
    config.write_text("model: {path: 'builtin:tiny'}\n")
    with pytest.raises(RunError, match="no checkpoint"):
        find_source(str(tmp_path))
    with pytest.raises(ModelError, match="no folder"):
        Host(find_source(str(tmp_path / "nowhere" / "at" / "all")), LIMITS)


# adapters


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 40}}])
def test_an_adapter_that_peft_wrote_says_what_peft_says(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    with quiet():
        base: Any = load_model(TINY, kind="causal-lm").model
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 2},
        task_type="CAUSAL_LM",
        **settings,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(4)
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    model.peft_config["default"].base_model_name_or_path = "builtin:tiny"
    model.save_pretrained(str(tmp_path / "mine"), save_embedding_layers=False)
    source = find_source(str(tmp_path / "mine"), {"dtype": "float32", "device": "cpu"})
    assert source.names == ("global", "base")
    with running(Host(source, LIMITS)) as host:
        prompt = prompt_of(host, QUESTION)
        reply = Reply(host, "global", prompt, max_tokens=16)
        plain = Reply(host, "base", prompt, max_tokens=16)
        reply.text()
        plain.text()
    with quiet():
        fresh: Any = load_model(TINY, kind="causal-lm").model
    tuned = PeftModel.from_pretrained(fresh, str(tmp_path / "mine"))
    ids = torch.tensor([prompt])
    words = {"max_new_tokens": 16, "do_sample": False}
    out = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **words)
    assert reply.one.tokens == out[0, len(prompt) :].tolist() != plain.one.tokens


def test_adapters_of_different_layers_share_a_batch(tmp_path: Path) -> None:
    one = write_adapters(tmp_path / "a", count=1)["client-0"]
    stored = load_file(one / "adapter_model.safetensors")
    halves = {"q": "q_proj", "v": "v_proj"}
    folders = {}
    for name, part in halves.items():
        folders[name] = Path(shutil.copytree(one, tmp_path / name))
        own = {key: tensor for key, tensor in stored.items() if part in key}
        save_file(own, folders[name] / "adapter_model.safetensors")
        listed = json.loads((one / "adapter_config.json").read_text())["target_modules"]
        damage(folders[name], target_modules=[module for module in listed if part in module])
    with running(Host(Source(TINY, {"both": one, **folders}), LIMITS)) as host:
        prompt = prompt_of(host, QUESTION)
        together = [Reply(host, n, prompt, max_tokens=12) for n in ("both", "q", "v", "base")]
        texts = [reply.text() for reply in together]
    for name, text in zip(("both", "q", "v"), texts, strict=False):
        folder = one if name == "both" else folders[name]
        with running(Host(Source(TINY, {name: folder}), LIMITS)) as host:
            assert Reply(host, name, prompt, max_tokens=12).text() == text


def test_an_adapter_of_another_base_is_refused(
    adapters: dict[str, Path], tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    folder = Path(shutil.copytree(adapters["client-0"], tmp_path / "other"))
    origin = json.loads((folder / "fedllm.json").read_text())
    (folder / "fedllm.json").write_text(json.dumps({**origin, "base_hash": "0" * 64}))
    with pytest.raises(ModelError, match=r"adapter 'mine': .* is not the base model"):
        Host(Source(TINY, {"mine": folder}), LIMITS)
    (folder / "fedllm.json").unlink()  # nothing is recorded: shapes and names decide
    other = ModelConfig(path=str(tiny_model("llama")), dtype="float32", device="cpu")
    with pytest.raises(ModelError, match=r"has no|finds no|no linear"):
        Host(Source(other, {"mine": folder}), LIMITS)


def test_the_base_may_be_loaded_in_another_dtype(adapters: dict[str, Path]) -> None:
    model = TINY.model_copy(update={"dtype": "bfloat16"})
    with running(Host(Source(model, adapters), LIMITS)) as host:
        assert Reply(host, "client-0", prompt_of(host, QUESTION), max_tokens=3).pieces()


def damage(folder: Path, **changes: Any) -> None:
    """Change an adapter's settings."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change an adapter's tensors."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: damage(f, use_dora=True), "no plain LoRA"),
        (lambda f: damage(f, peft_type="IA3"), "kind 'IA3'"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"nonsense"), "is damaged"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickle"),
        (lambda f: spoil(f, lambda t: t[first(t)].fill_(float("nan"))), "NaN or infinite"),
        (lambda f: spoil(f, lambda t: t.pop(first(t))), r"is there and .* is missing"),
        (lambda f: spoil(f, lambda t: t.update(strange=torch.ones(1))), "unexpected tensor"),
    ],
)
def test_a_damaged_adapter_is_a_clear_error(
    break_it: Callable[[Path], Any], words: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["client-0"], tmp_path / "broken"))
    read_adapter(folder)
    break_it(folder)
    with pytest.raises(ModelError, match=words):
        read_adapter(folder)


def test_an_adapter_of_another_shape_is_refused(adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapters["client-0"], tmp_path / "narrow"))

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        name = next(key for key in tensors if "lora_A" in key)
        tensors[name] = tensors[name][:, :50].contiguous()

    spoil(folder, narrow)
    with pytest.raises(ModelError, match=r"Serve it on the base it was trained on"):
        Host(Source(TINY, {"mine": folder}), LIMITS)


def test_names_are_taken_once(adapters: dict[str, Path]) -> None:
    source = with_adapters(Source(TINY), {"mine": adapters["client-0"]})
    assert source.names == ("mine", "base")
    with pytest.raises(ModelError, match="two models are called 'mine'"):
        with_adapters(source, {"mine": adapters["client-1"]})
    with pytest.raises(ModelError, match="holds no adapter"):
        with_adapters(source, {"other": Path("/nowhere")})


# vLLM


def test_vllm_is_started_with_every_adapter_and_no_key_on_its_command_line(
    adapters: dict[str, Path],
) -> None:
    address = Address("127.0.0.1", 9000, Keys({"ann": "a" * 16}))
    words = command(Source(TINY, adapters), address)
    at = words.index("--lora-modules") + 1
    assert words[at:] == [f"{name}={folder}" for name, folder in adapters.items()]
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert Path(words[words.index("--model") + 1], "config.json").is_file()
    assert "a" * 16 not in " ".join(words)
    assert environment(address)["VLLM_API_KEY"] == "a" * 16
    with pytest.raises(ModelError, match="chat template 'chatml'"):
        command(Source(TINY.model_copy(update={"chat_template": "chatml"})), address)
