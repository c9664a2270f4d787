"""The run directory: nothing is overwritten, nothing torn is read, one process writes."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm.errors import RunError
from fedllm.results.run_dir import RunDir
from fedllm.results.storage import explained, strict_json

RECORDS = st.lists(
    st.dictionaries(
        st.text(max_size=5), st.none() | st.integers() | st.floats() | st.text(max_size=5)
    ),
    max_size=6,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "runs" / "one", "name: one\n")


def test_a_new_run_holds_its_configuration_and_environment(run: RunDir) -> None:
    assert (run.path / "config.yaml").read_text() == "name: one\n"
    told = json.loads((run.path / "environment.json").read_text())
    assert told["packages"]["torch"]
    assert told["num_cores"] >= 1
    host = os.uname().nodename
    assert host not in (told["platform"], told["cpu_model"])


def test_nothing_else_is_left_beside_a_new_run(run: RunDir) -> None:
    assert list(run.path.parent.iterdir()) == [run.path]


def test_an_existing_run_is_refused_and_untouched(run: RunDir) -> None:
    with pytest.raises(RunError, match=r"never overwritten.*name=.*--resume"):
        RunDir.create(run.path, "name: two\n")
    assert (run.path / "config.yaml").read_text() == "name: one\n"


def test_a_file_in_the_way_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match="a file, not a folder"):
        RunDir.create(tmp_path / "runs" / "one", "")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None])
def test_a_folder_without_a_configuration_is_no_run(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(RunError, match="not a run directory"):
        RunDir.open(tmp_path / "x")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(RECORDS, max_size=3))
def test_what_is_appended_is_read_back_with_null_for_what_json_lacks(
    batches: list[list[dict[str, Any]]], run: RunDir
) -> None:
    run.truncate({})
    for batch in batches:
        run.append("metrics", batch)
    flat = [record for batch in batches for record in batch]
    assert run.read("metrics") == [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()}
        for r in flat
    ]


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
        lambda inner: st.one_of(
            st.lists(inner), st.dictionaries(st.one_of(st.text(), st.integers()), inner)
        ),
    )
)
def test_strict_json_is_json_of_what_it_can_hold(value: Any) -> None:
    def held(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): held(item) for key, item in value.items()}
        if isinstance(value, list):
            return [held(item) for item in value]
        return value if not isinstance(value, float) or math.isfinite(value) else None

    assert strict_json(value) == json.dumps(held(value), sort_keys=True, ensure_ascii=False)


def test_the_files_hold_strict_json_with_sorted_keys(run: RunDir) -> None:
    run.append("ledger", [{"b": float("nan"), "a": [1, float("-inf")]}])
    text = (run.path / "ledger.jsonl").read_text()
    assert text == '{"a": [1, null], "b": null}\n'


def test_a_torn_last_line_is_not_read(run: RunDir) -> None:
    run.append("events", [{"n": 1}, {"n": 2}])
    path = run.path / "events.jsonl"
    for cut in range(1, len('{"n": 2}\n') + 1):
        os.truncate(path, path.stat().st_size - 1)
        assert run.read("events") == [{"n": 1}], cut


def test_a_damaged_line_before_the_last_is_named(run: RunDir) -> None:
    (run.path / "events.jsonl").write_text('{"n": 1}\n{"n":\n{"n": 3}\n')
    with pytest.raises(RunError, match=r"events\.jsonl, line 2"):
        run.read("events")


def test_truncating_goes_back_to_a_checkpoint_bit_for_bit(run: RunDir) -> None:
    run.append("metrics", [{"round": 1}])
    run.append("ledger", [{"client": 1}])
    lengths = run.lengths()
    before = {path.name: path.read_bytes() for path in run.path.glob("*.jsonl")}
    run.append("metrics", [{"round": 2}])
    run.append("events", [{"n": 1}])
    with (run.path / "ledger.jsonl").open("a") as file:
        file.write('{"client": 2')
    run.truncate(lengths)
    after = {path.name: path.read_bytes() for path in run.path.glob("*.jsonl")}
    assert after == {**before, "events.jsonl": b""}


def test_missing_records_are_noticed_on_resume(run: RunDir) -> None:
    run.append("metrics", [{"round": 1}])
    lengths = run.lengths()
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match=r"metrics\.jsonl holds 0 bytes"):
        run.truncate(lengths)


def test_only_one_may_write_but_all_may_read(run: RunDir) -> None:
    run.append("metrics", [{"round": 1}])
    other = RunDir.open(run.path)
    assert other.read("metrics") == [{"round": 1}]
    for write in (other.lock, lambda: other.append("metrics", []), lambda: other.truncate({})):
        with pytest.raises(RunError, match="another process"):
            write()
    run.close()
    with other:
        other.append("metrics", [{"round": 2}])
    run.lock()
    assert run.read("metrics") == [{"round": 1}, {"round": 2}]


def test_a_killed_process_leaves_no_lock(run: RunDir) -> None:
    run.close()
    script = (
        "import sys, time; from pathlib import Path; from fedllm.results.run_dir import RunDir\n"
        "run = RunDir.open(Path(sys.argv[1])); run.lock(); print('held', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process"):
            run.lock()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    run.append("metrics", [{"round": 1}])


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "no space is left"),
        (errno.EACCES, "permission"),
        (errno.EROFS, "read-only"),
    ],
)
def test_a_failure_to_append_says_where_why_and_what_is_safe(
    number: int, told: str, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(RunError, match=rf"metrics\.jsonl: .*{told}.*--resume"):
        run.append("metrics", [{"round": 1}])


def test_a_full_disk_at_the_start_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(RunError, match="no space is left"):
        RunDir.create(tmp_path / "one", "")
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_no_storage_failure_passes(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), explained(tmp_path, ""):
        _ = 1 / 0


def test_a_whole_file_is_replaced_or_left(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.write("predictions/3.jsonl", "old\n")

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(RunError, match="no space is left"):
            run.write("predictions/3.jsonl", "new\n")
    assert path.read_text() == "old\n"
    assert list(path.parent.iterdir()) == [path]
    run.write("predictions/3.jsonl", "new\n")
    assert path.read_text() == "new\n"
