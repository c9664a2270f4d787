"""What makes a start quick must leave no trace."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.starting import Distributions, structure_once, uncollected, without_bitsandbytes

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
def test_transformers_knows_all_its_models_though_it_looked_for_them_only_once() -> None:
    code = """
import sys
from pathlib import Path
from fedllm.starting import import_transformers, import_trl
import_transformers()
assert "scipy" not in sys.modules
import transformers.models as told
from transformers.utils.import_utils import _LazyModule, define_import_structure
from transformers.utils import is_scipy_available
file = str(Path(told.__file__))
found = _LazyModule(told.__name__, file, define_import_structure(file))
for name in ("_modules", "_class_to_module", "_import_structure", "_object_missing_backend"):
    assert getattr(found, name) == getattr(told, name), name
assert set(found.__all__) == set(told.__all__) and len(found.__all__) > 1000
assert is_scipy_available()
import_trl()
import importlib.metadata
assert "numpy" in importlib.metadata.packages_distributions()
assert importlib.metadata.packages_distributions.__module__ == "importlib.metadata"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_structure_without_its_first_answer_is_looked_for() -> None:
    asked = []

    def define(path: str | Path, prefix: str | None = None) -> dict[frozenset[str], dict[str, set]]:
        asked.append((str(path), prefix))
        return {frozenset(): {f"{prefix}.a.b": {"B"}, "trainer": {"T"}}}

    known = structure_once(define)
    assert known("x/models/__init__.py") == {frozenset(): {"a.b": {"B"}}}
    assert known("x/other/__init__.py") == {frozenset(): {"None.a.b": {"B"}, "trainer": {"T"}}}
    assert known("x/models/__init__.py", "p")[frozenset()].keys() == {"p.a.b", "trainer"}
    assert asked == [
        ("x/models", "models"),
        ("x/other/__init__.py", None),
        ("x/models/__init__.py", "p"),
    ]


def test_distributions_are_those_that_python_finds() -> None:
    found = Distributions(importlib.metadata.packages_distributions)
    everything = importlib.metadata.packages_distributions()
    for package in ("torch", "peft", "yaml"):
        assert found[package][:1] == everything[package][:1]
    with pytest.raises(KeyError, match="no_such_package"):
        found["no_such_package"]
