"""Worker processes: order, equality, failures, and that nothing is left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_runs import Silent, small_config, write_questions
from workers_stub import Stub

from fedllm.adapters import Adapter
from fedllm.errors import RunError, TrainingError
from fedllm.executors import WorkerExecutor
from fedllm.executors.workers import divided, packed, unpacked
from fedllm.experiment.run import run
from fedllm.federation import Job, Payload


def job(cid: int, steps: int = 2) -> Job:
    return Job(cid, Payload(0, Adapter({"x": torch.full((3,), float(cid))})), steps=steps,
               num_samples=4)  # fmt: skip


@contextlib.contextmanager
def workers(what: str = "double", count: int = 2, **options: Any) -> Any:
    executor = WorkerExecutor(Stub(what), count, **options)
    try:
        yield executor
    finally:
        executor.close()
        assert not [p for p in psutil.Process().children(recursive=True) if is_worker(p)]


def is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "spawn_main" in " ".join(process.cmdline())
    return False


def test_updates_come_in_the_order_of_jobs_whoever_is_faster() -> None:
    with workers("slow first") as executor:
        jobs = [job(cid) for cid in (5, 2, 9, 4, 1)]
        updates = executor.run(jobs)
        assert [update.cid for update in updates] == [5, 2, 9, 4, 1]
        assert [float(u.adapter["x"][0]) for u in updates] == [10, 4, 18, 8, 2]
        assert [u.metrics["worker"] for u in updates] == sorted(
            u.metrics["worker"] for u in updates
        )
        assert len({u.metrics["worker"] for u in updates}) == 2
        again = executor.run(jobs)
        assert [u.metrics["pid"] for u in again] == [u.metrics["pid"] for u in updates]
        assert executor.run([]) == []


def test_threads_are_divided_or_as_set() -> None:
    with workers(threads=1) as executor:
        assert {u.metrics["threads"] for u in executor.run([job(0), job(1)])} == {1.0}


def test_progress_reaches_the_main_process() -> None:
    told: list[tuple[int, int, int]] = []
    with workers(progress=lambda *step: told.append(step)) as executor:
        executor.run([job(cid) for cid in range(4)])
    assert sorted(told) == [(cid, 1, 2) for cid in range(4)]


def test_a_worker_that_is_killed_is_told_and_leaves_nothing() -> None:
    with workers("die") as executor:
        with pytest.raises(RunError, match=r"worker 1 of 2 died .*SIGKILL.*--resume"):
            executor.run([job(cid) for cid in range(4)])
        assert executor._processes == []


def test_an_error_of_ours_comes_through_as_it_is() -> None:
    with workers("ours") as executor, pytest.raises(TrainingError, match="client 3 has no loss"):
        executor.run([job(cid) for cid in range(4)])
    with workers("cannot start") as executor, pytest.raises(TrainingError, match="not there"):
        executor.run([job(0)])


def test_another_error_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with workers("theirs") as executor, pytest.raises(RunError, match="nothing left"):
        executor.run([job(cid) for cid in range(4)])
    assert "Traceback" in caplog.text


def test_what_cannot_be_pickled_is_refused() -> None:
    with pytest.raises(RunError, match=r"must be picklable.*workers: 0"):
        packed(lambda: None)
    executor = WorkerExecutor(lambda progress, worker: None, 1)  # type: ignore[arg-type, return-value]
    with pytest.raises(RunError, match="must be picklable"):
        executor.run([job(0)])


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64]),
       st.lists(st.integers(0, 3), max_size=3))  # fmt: skip
def test_tensors_come_back_as_they_were(dtype: torch.dtype, shape: list[int]) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    again = unpacked(packed({"a": tensor, "b": [tensor]}))
    assert torch.equal(again["a"], tensor)
    assert again["b"][0].dtype == dtype


def test_no_descriptor_is_held_by_what_was_sent() -> None:
    process = psutil.Process()
    with workers() as executor:
        executor.run([job(0), job(1)])
        before = process.num_fds()
        kept = [executor.run([job(cid) for cid in range(20)]) for _ in range(10)]
        assert process.num_fds() <= before + 1
    assert len(kept) == 10


@given(st.lists(st.floats(0.0, 9.0), max_size=12), st.integers(1, 5))
def test_work_is_divided_into_neighbours_without_loss(work: list[float], count: int) -> None:
    shares = divided(work, count)
    assert len(shares) == count
    assert [index for share in shares for index in share] == list(range(len(work)))
    most = max((sum(work[i] for i in share) for share in shares), default=0.0)
    assert most <= sum(work) / count + max(work, default=0.0) + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedit", "scaffold", "ditto", "slora"])
def test_a_run_on_workers_is_the_run_of_one_process(
    tmp_path: Path, tiny_model: Callable[[str], Path], algorithm: str
) -> None:
    data, found = write_questions(tmp_path / "questions.jsonl"), {}
    for count in (0, 2):
        words = (f"name=w{count}", f"algorithm={algorithm}", f"execution.workers={count}",
                 "federation.rounds=3", "model.dtype=float32")  # fmt: skip
        config = small_config(tmp_path, tiny_model("llama"), data, *words)
        found[count] = run(config, Silent())
    files = ("events.jsonl", "ledger.jsonl")
    for name in files:
        texts = [(found[count].path / name).read_text() for count in (0, 2)]
        assert texts[0] == texts[1]
    adapters = [
        load_file(next((found[count].path / "checkpoints").glob("3/adapter/*.safetensors")))
        for count in (0, 2)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=1e-6, rtol=1e-5)
