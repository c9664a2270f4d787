"""What makes a start quick must leave no trace."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys

import pytest

from fedllm.models.starting import uncollected, without_bitsandbytes

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
from fedllm.models.starting import import_peft, without_bitsandbytes
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
