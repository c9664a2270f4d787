"""`fedllm train` against LLaMA-Factory's; `python -m benchmarks.central --llamafactory BIN`.

Both fine-tune the built-in model on the same rows with the same settings, each started as a user
starts it. BIN is `llamafactory-cli` in an environment of its own (its pins are not ours). A side's
first step is over when the first line is in its `trainer_log.jsonl`, which both write alike; tokens
a second are those of the rows, over the time from the first line to the last.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from benchmarks.measure import ratio, show, write

GOALS = {"time_to_first_step_vs_llamafactory": "2x", "tokens_per_s_vs_llamafactory": "1x"}
ROWS, LENGTH = 240, 512
BATCH, PACKS = 16, 4
"""Rows, or packs of `LENGTH` tokens, in a step."""
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Timing:
    """What one run took."""

    first_step_s: float
    rows_per_s: float


def timed(command: list[str], log: Path) -> Timing:
    """Start a command and watch its log grow until it ends.

    Raises:
        RuntimeError: If it fails or writes no two lines.
    """
    begin = time.perf_counter()
    seen: list[float] = []
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(command, stdout=words, stderr=words)
        while process.poll() is None and time.perf_counter() - begin < PATIENCE_S:
            seen += [time.perf_counter()] * (_lines(log) - len(seen))
            time.sleep(0.005)
        if process.poll() != 0 or len(seen) < 2:
            process.kill()
            words.seek(0)
            raise RuntimeError(f"no timing from {command}:\n{words.read()[-2000:]}")
    later = 1 - 1 / len(seen)  # share of the rows that come after the first step
    return Timing(seen[0] - begin, later * ROWS * 0.9 / (seen[-1] - seen[0]))


def _lines(log: Path) -> int:
    if not log.exists():
        return 0
    return sum('"loss"' in line for line in log.read_text(encoding="utf-8").splitlines())


def rows_file(folder: Path) -> Path:
    """Write the rows both sides learn from, in the alpaca layout, long and short ones mixed."""
    rng = random.Random(0)
    words = [
        "river",
        "stone",
        "market",
        "window",
        "garden",
        "letter",
        "bridge",
        "morning",
        "paper",
        "engine",
    ]

    def text(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(4, most)))

    rows = [{"instruction": text(40), "input": "", "output": text(60)} for _ in range(ROWS)]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": path.name}}))
    return path


def model_folder(folder: Path) -> Path:
    """Copy the built-in model, as float32: LLaMA-Factory takes the dtype from its config.json."""
    path = folder / "model"
    if not path.exists():
        shutil.copytree(str(files("fedllm.models") / "builtin" / "tiny"), path)
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        (path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return path


def ours(folder: Path, name: str, *, packing: bool) -> Timing:
    """Run `fedllm train`."""
    config = {
        "name": name,
        "output_dir": str(folder),
        "stage": "sft",
        "model": {"path": str(model_folder(folder)), "dtype": "float32"},
        "adapter": {"rank": 8, "targets": "all-linear"},
        "data": {"path": str(folder / "rows.json"), "max_length": LENGTH, "cache": False},
        "training": {
            "batch_size": PACKS if packing else BATCH,
            "learning_rate": 1e-3,
            "packing": packing,
            "log_every": 1,
        },
        "evaluation": {"every": 0, "max_rows": 8},
        "checkpoint": {"every": 0},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "fedllm", "train", str(file), "--plain"]
    return timed(command, folder / name / "trainer_log.jsonl")


def theirs(binary: str, folder: Path, name: str, *, packing: bool) -> Timing:
    """Run `llamafactory-cli train` with the same settings."""
    config = {
        "model_name_or_path": str(model_folder(folder)),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "val_size": 0.1,
        "cutoff_len": LENGTH,
        "packing": packing,
        "neat_packing": packing,
        "overwrite_cache": True,
        "disable_gradient_checkpointing": True,
        "output_dir": str(folder / name),
        "per_device_train_batch_size": PACKS if packing else BATCH,
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return timed([binary, "train", str(file)], folder / name / "trainer_log.jsonl")


def pairs(binary: str, runs: int, *, packing: bool) -> dict[str, list[Timing]]:
    """Run both sides in turn, the first time uncounted."""
    found: dict[str, list[Timing]] = {"ours": [], "theirs": []}
    for number in range(runs + 1):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows_file(folder)
            mine = ours(folder, "mine", packing=packing)
            other = theirs(binary, folder, "other", packing=packing)
        if number:
            found["ours"].append(mine)
            found["theirs"].append(other)
    return found


def main() -> None:
    """Measure, print and write `central.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llamafactory", metavar="BIN", help="path of llamafactory-cli")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    binary = asked.llamafactory or shutil.which("llamafactory-cli")
    if binary is None:
        print(
            "benchmarks.central needs LLaMA-Factory in an environment of its own:"
            " pip install llamafactory there, then --llamafactory ENV/bin/llamafactory-cli"
        )
        return
    found = {}
    for packing, suffix in ((True, ""), (False, "_unpacked")):
        timings = pairs(binary, asked.runs, packing=packing)
        first = {side: [1 / t.first_step_s for t in own] for side, own in timings.items()}
        pace = {side: [t.rows_per_s for t in own] for side, own in timings.items()}
        row = ratio(first["ours"], first["theirs"])
        # shown as seconds, not as their inverse
        row |= {key: round(1 / row[key], 2) for key in ("ours", "other")}
        found[f"time_to_first_step_vs_llamafactory{suffix}"] = row
        found[f"tokens_per_s_vs_llamafactory{suffix}"] = ratio(pace["ours"], pace["theirs"])
    write("central", found)
    show("fedllm train against LLaMA-Factory", found, GOALS)


if __name__ == "__main__":
    main()
