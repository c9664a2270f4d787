"""Checkpoints survive kills, damage and full disks."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors.torch
import torch

from fedllm.errors import RunError
from fedllm.results import RunDir, latest_checkpoint, load_checkpoint, save_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "one", "name: one\n")


def save(run: RunDir, version: int, keep: int = 2) -> Path:
    state = {"version": version}
    return save_checkpoint(run, version, state, {"x": torch.full((3,), version)}, keep=keep)


def saved(run: RunDir) -> set[str]:
    return {path.name for path in (run.path / "checkpoints").iterdir()}


def version_of(path: Path | None) -> int:
    assert path is not None
    tree, tensors = load_checkpoint(path)
    assert tensors["x"].tolist() == [tree["version"]] * 3
    return int(tree["version"])


def test_trees_and_tensors_come_back_as_they_were(run: RunDir) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 6, generator=generator)
    tensors = {
        "whole": wide,
        "row view": wide[1],
        "transposed": wide.T,
        "same": wide,
        "half": wide.to(torch.bfloat16),
        "flags": wide > 0,
        "bytes": torch.arange(5, dtype=torch.uint8),
        "long": torch.tensor(2**40),
        "empty": torch.zeros(0, 3),
        "trained": wide.clone().requires_grad_(),
    }
    tree = {"clock_s": float("inf"), "parts": [1, None, "ä"], "lengths": {"metrics": 7}}
    path = save_checkpoint(run, 3, tree, tensors, keep=1)
    found, loaded = load_checkpoint(path)
    assert found == tree
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_state_without_tensors_can_be_saved(run: RunDir) -> None:
    assert load_checkpoint(save_checkpoint(run, 0, [], {}, keep=1)) == ([], {})


def test_a_run_without_checkpoints_has_no_latest(run: RunDir) -> None:
    assert latest_checkpoint(run) is None


def test_the_newest_are_kept_by_number_not_by_letter(run: RunDir) -> None:
    for version in (8, 9, 10, 11):
        save(run, version)
    assert saved(run) == {"10", "11"}
    assert version_of(latest_checkpoint(run)) == 11


def test_a_taken_back_future_is_deleted_and_the_past_kept(run: RunDir) -> None:
    for version in (4, 5, 6):
        save(run, version, keep=3)
    save(run, 5)
    assert saved(run) == {"4", "5"}


def test_saving_a_version_again_replaces_it(run: RunDir) -> None:
    save(run, 1, keep=1)
    save_checkpoint(run, 1, {"version": 7}, {"x": torch.full((3,), 7)}, keep=1)
    assert saved(run) == {"1"}
    assert version_of(latest_checkpoint(run)) == 7


def test_files_of_the_caller_are_part_of_the_checkpoint(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_text("w")

    save(run, 1)
    path = save_checkpoint(run, 2, {}, {}, keep=2, write=write)
    assert latest_checkpoint(run) == path
    (path / "adapter" / "weights").write_text("W")
    with caplog.at_level(logging.WARNING):
        assert version_of(latest_checkpoint(run)) == 1
    assert "adapter/weights has changed" in caplog.text


def _tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "sha256.json"])
@pytest.mark.parametrize("damage", [_tear, Path.unlink, _flip])
def test_a_damaged_newest_is_passed_over_with_a_warning(
    name: str, damage: Any, run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, 1)
    newest = save(run, 2)
    damage(newest / name)
    with caplog.at_level(logging.WARNING):
        assert version_of(latest_checkpoint(run)) == 1
    assert "Checkpoint 2 is damaged" in caplog.text
    with pytest.raises(RunError, match="damaged"):
        load_checkpoint(newest)


def test_if_all_are_damaged_the_run_says_so(run: RunDir) -> None:
    for version in (1, 2):
        _tear(save(run, version) / "state.safetensors")
    with pytest.raises(RunError, match=r"All checkpoints in .* are damaged"):
        latest_checkpoint(run)


def test_half_written_folders_are_not_seen_and_then_cleared(run: RunDir) -> None:
    save(run, 1)
    for name in (".tmp-2", ".tmp-2-old", ".tmp-3"):
        folder = run.path / "checkpoints" / name
        folder.mkdir()
        (folder / "state.json").write_text('{"vers')
    assert version_of(latest_checkpoint(run)) == 1
    save(run, 2)
    assert saved(run) == {"1", "2"}


class TornError(Exception):
    pass


def test_an_interrupted_save_leaves_the_one_before(run: RunDir) -> None:
    save(run, 1, keep=1)

    def write(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise TornError

    with pytest.raises(TornError):
        save_checkpoint(run, 2, {}, {}, keep=1, write=write)
    assert saved(run) == {"1"}


def test_a_full_disk_is_one_message_and_the_one_before_is_safe(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 1, keep=1)

    def full(*_: Any) -> NoReturn:
        # how safetensors tells it: not as an OSError
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(RunError, match=r"checkpoints/2: no space is left.*--resume"):
            save(run, 2, keep=1)
    assert saved(run) == {"1"}
    assert version_of(latest_checkpoint(run)) == 1


def test_a_disk_that_fails_to_sync_loses_nothing(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 1, keep=1)

    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="no space is left"):
            save(run, 2, keep=1)
    assert saved(run) == {"1"}


def test_a_run_locked_by_another_cannot_be_saved_to(run: RunDir) -> None:
    with pytest.raises(RunError, match="another process"):
        save(RunDir.open(run.path), 1)


SAVER = """
import sys, torch
from pathlib import Path
from fedllm.results import RunDir, save_checkpoint
run = RunDir.open(Path(sys.argv[1]))
for version in range(int(sys.argv[2]), 10**6):
    tensors = {"x": torch.full((3,), version), "bulk": torch.ones(200_000)}
    save_checkpoint(run, version, {"version": version}, tensors, keep=1)
    print(version, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_last_or_the_next_checkpoint(run: RunDir) -> None:
    run.close()
    reported = 0
    for wait_s in (0.0, 0.003, 0.011, 0.037):
        command = [sys.executable, "-c", SAVER, str(run.path), str(reported + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as saver:
            assert saver.stdout is not None
            lines = [saver.stdout.readline()]
            time.sleep(wait_s)
            saver.send_signal(signal.SIGKILL)
            lines += saver.stdout.readlines()
        reported = int([line for line in lines if line.endswith("\n")][-1])
        found = version_of(latest_checkpoint(run))
        assert found in (reported, reported + 1)
        reported = found
