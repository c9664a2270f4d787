"""What makes a start quick must leave no trace."""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedllm.starting import uncollected, without_bitsandbytes
from fedllm.starting.imports import Distributions
from fedllm.starting.index import indexing
from fedllm.starting.patterns import BUILD, MAPPING, RULES, Pattern, compile_when_asked

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install 'fedllm[quant]')",
)


def _failing() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()  # the outer block goes on
        raise ValueError("x")


def test_garbage_is_collected_again_afterwards_even_after_an_error() -> None:
    assert gc.isenabled()
    with pytest.raises(ValueError, match="x"):
        _failing()
    assert gc.isenabled()


def test_a_package_that_is_imported_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", gc)
    with without_bitsandbytes():
        assert sys.modules["bitsandbytes"] is gc
    assert sys.modules["bitsandbytes"] is gc


@pytest.mark.slow
@needs_bitsandbytes
def test_bitsandbytes_is_not_imported_with_peft_but_found_afterwards() -> None:
    code = """
import sys
from fedllm.starting import import_peft, without_bitsandbytes
import_peft()
from peft.import_utils import is_bnb_available
with without_bitsandbytes():
    assert not is_bnb_available()
    try:
        import bitsandbytes
    except ImportError:
        pass
    else:
        raise AssertionError
assert "bitsandbytes" not in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
assert is_bnb_available()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.slow
def test_transformers_knows_all_its_models_by_the_index(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from fedllm.starting import import_transformers, import_trl
import_transformers()
assert "scipy" not in sys.modules
import transformers.models as told
from transformers.utils.import_utils import _LazyModule, create_import_structure_from_path
from transformers.utils.import_utils import is_scipy_available, spread_import_structure
folder = Path(told.__file__).parent
read = spread_import_structure(create_import_structure_from_path(str(folder)))
found = _LazyModule(told.__name__, str(folder / "__init__.py"), read)
for name in ("_modules", "_class_to_module", "_object_missing_backend"):
    assert getattr(found, name) == getattr(told, name), name
one, other = ({k: sorted(v) for k, v in m._import_structure.items()} for m in (found, told))
assert one == other
assert set(found.__all__) == set(told.__all__) and len(found.__all__) > 1000
assert is_scipy_available()
from transformers import LlamaForCausalLM
from transformers.models.gpt2 import GPT2Config
import_trl()
import importlib.metadata
assert "numpy" in importlib.metadata.packages_distributions()
assert importlib.metadata.packages_distributions.__module__ == "importlib.metadata"
assert not any("fedllm" in type(finder).__module__ for finder in sys.meta_path)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for _ in range(2):  # the files are read, then the index
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)
        assert len(list((tmp_path / "fedllm" / "transformers").iterdir())) == 1


@dataclass
class Files:
    """Stands for transformers, which reads its files."""

    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def __call__(
        self, path: str | Path, prefix: str | None = None
    ) -> dict[frozenset[str], dict[str, set[str]]]:
        self.asked.append((str(path), prefix))
        return {frozenset(["torch"]): {"a.b": {"B", "C"}}, frozenset(): {"a.c": {"D"}}}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder of a transformers without models, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "transformers" / "models"
    folder.mkdir(parents=True)
    return folder


def test_files_are_read_once_for_all_starts(models: Path) -> None:
    first, second = Files(), Files()
    expected = {frozenset(["torch"]): {"m.a.b": {"B", "C"}}, frozenset(): {"m.a.c": {"D"}}}
    found = indexing(first)(models, prefix="m")
    assert found == expected
    found[frozenset()]["added"] = {"E"}  # as transformers does
    assert indexing(first)(str(models / "__init__.py")) == Files()("x")
    assert indexing(second)(models, prefix="m") == expected
    assert [path for path, _ in first.asked] == [str(models)]
    assert second.asked == []


def test_other_folders_are_asked_for_as_ever(tmp_path: Path) -> None:
    files = Files()
    indexing(files)("transformers/models/llama/__init__.py")
    indexing(files)(tmp_path, "x")
    assert files.asked == [("transformers/models/llama/__init__.py", None), (str(tmp_path), "x")]


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[[1, 2]]", "not json"])
def test_a_damaged_index_is_made_anew(models: Path, text: str) -> None:
    indexing(Files())(models)
    (file,) = (Path(os.environ["XDG_CACHE_HOME"]) / "fedllm" / "transformers").iterdir()
    whole = file.read_text()
    file.write_text(text)
    files = Files()
    assert indexing(files)(models) == Files()("x")
    assert len(files.asked) == 1
    assert file.read_text() == whole


def test_another_version_has_another_index(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indexing(Files())(models)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1")
    files = Files()
    indexing(files)(models)
    assert files.asked


def test_a_version_under_work_has_none(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.0.dev0")
    files = Files()
    indexing(files)(models)
    indexing(files)(models)
    assert len(files.asked) == 2
    assert not (Path(os.environ["XDG_CACHE_HOME"]) / "fedllm").exists()


def test_a_cache_that_cannot_be_written_is_not_needed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        files = Files()
        assert indexing(files)(models) == Files()("x")
        assert files.asked


def test_distributions_are_those_that_python_finds() -> None:
    found = Distributions(importlib.metadata.packages_distributions)
    everything = importlib.metadata.packages_distributions()
    for package in ("torch", "peft", "yaml"):
        assert found[package][:1] == everything[package][:1]
    with pytest.raises(KeyError, match="no_such_package"):
        found["no_such_package"]


def test_a_pattern_is_compiled_when_it_is_asked() -> None:
    pattern = copy.deepcopy(Pattern("(?P<g0>layers)|(?P<g1>[0-9]+)"))
    assert pattern.groupindex == {"g0": 1, "g1": 2}
    assert pattern.search("x.layers.7").group() == "layers"
    with pytest.raises(re.error):
        Pattern("(").search("x")


def test_rules_of_all_architectures_are_those_of_transformers() -> None:
    mapping, rules = importlib.import_module(MAPPING), importlib.import_module(RULES)
    compile_when_asked()
    patient = getattr(mapping, BUILD)
    inside = dict(zip(patient.__code__.co_freevars, patient.__closure__, strict=True))
    plain, lazy = inside["build"].cell_contents(), patient()
    assert rules.re is re
    assert list(plain) == list(lazy)
    pairs = [pair for kind in plain for pair in zip(plain[kind], lazy[kind], strict=True)]
    kinds = [(type(a.compiled_sources), type(b.compiled_sources)) for a, b in pairs]
    assert set(kinds) == {(re.Pattern, Pattern)}
    for ours, theirs in pairs:
        assert theirs.compiled_sources.pattern == ours.compiled_sources.pattern
        assert theirs.compiled_sources.groupindex == ours.compiled_sources.groupindex
        assert theirs.target_patterns == ours.target_patterns


def test_a_version_that_builds_its_rules_in_another_way_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mapping = importlib.import_module(MAPPING)
    monkeypatch.delattr(mapping, BUILD)
    compile_when_asked()
    assert not hasattr(mapping, BUILD)
