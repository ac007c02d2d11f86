"""What the tables over toy runs share: settings, cells that are filled once, and a row of what PPO gained."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlvla_algos.statistics import mcnemar_exact, paired_difference_interval

ROOT = Path(__file__).resolve().parent.parent
LOCAL = ["suite=toy", "workers.kind=local"]
SFT = ["suite=toy", "steps=400", "noise_draws=8", "first_steps_weight=1"]
EPISODES = 60
TRAIN = [
    *LOCAL,
    "workers.num_actors=1",
    "workers.envs_per_actor=64",
    "inference_batch=64",
    "episodes_per_iteration=192",
    "iterations=12",
    "eval.trials=200",
    "eval.temperature=1.0",
    "eval.videos=0",
    "algo.bootstrap_time_limit=false",
    "algo.policy_lr=2e-4",
    "algo.target_kl=0.12",
    "algo.final_target_kl=0.03",
    "algo.epochs=5",
    "algo.value_lr=4e-3",
    "algo.value_hidden_sizes=[128,128]",
]


def fill(cells: Iterable[tuple[Path, Callable[[Path], None]]], parallel: int) -> None:
    """Call each cell's work with its folder. One that fails leaves its log and does not stop the others."""

    def one(cell: tuple[Path, Callable[[Path], None]]) -> None:
        folder, work = cell
        folder.mkdir(parents=True, exist_ok=True)
        try:
            work(folder)
        except subprocess.CalledProcessError as error:
            print(f"{folder.name}: {error}; see {folder}", file=sys.stderr)

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(one, cells))


def collect(output: Path, episodes: int) -> Path:
    """Demonstrations, made once."""
    data = output / f"data-{episodes}"
    if not (data / "meta" / "info.json").exists():
        rlvla(output / f"collect-{episodes}.log", "collect", *LOCAL, f"episodes={episodes}", f"output={data}")
    return data


def sft(folder: Path, *words: str) -> Path:
    """The policy folder of an SFT stage in ``folder``, made once."""
    if not (folder / "summary.json").exists():
        # An SFT stage that was stopped does not go on, and does not make way by itself.
        shutil.rmtree(folder, ignore_errors=True)
        rlvla(folder.with_suffix(".log"), "sft", *words, f"output={folder}")
    return folder / "policy"


def train(folder: Path, *words: str, threads: int = 1) -> None:
    """A PPO stage in ``folder``; what was begun goes on."""
    if not (folder / "report.html").exists():
        rlvla(folder.with_suffix(".log"), "train", *words, f"output={folder}", threads=threads)


def rlvla(log: Path, verb: str, *words: str, threads: int = 1) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"rlvla {verb} {' '.join(words)}", file=sys.stderr)
    with log.open("w") as file:
        command = [sys.executable, "-m", "rlvla.cli", verb, *words]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)


def finished(folders: dict[int, Path]) -> dict[int, dict[str, Any]]:
    """Summaries of the PPO stages that are done, by seed, with both evaluations' outcomes."""
    found = {}
    for seed, folder in folders.items():
        if (folder / "summary.json").exists():
            found[seed] = json.loads((folder / "summary.json").read_text())
            for name in ("before", "after"):
                found[seed][name] = json.loads((folder / "evaluations" / f"{name}.json").read_text())["outcomes"]
    return found


def gain(seeds: dict[int, dict[str, Any]]) -> tuple[float, tuple[float, float], float]:
    """(change, its 95% interval, McNemar's p) over all seeds together; rates in [-1, 1]."""
    before = [bool(o) for one in seeds.values() for o in one["before"]]
    after = [bool(o) for one in seeds.values() for o in one["after"]]
    change = (sum(after) - sum(before)) / len(after)
    return change, paired_difference_interval(before, after), mcnemar_exact(before, after)


def columns(seeds: dict[int, dict[str, Any]]) -> tuple[str, ...]:
    """(seeds, before -> after, points, p) of a row."""
    change, (low, high), p = gain(seeds)
    each = ", ".join(f"{one['success_before']:.2f} -> {one['success_after']:.2f}" for one in seeds.values())
    return (str(len(seeds)), each, f"{100 * change:+.1f} [{100 * low:.1f}, {100 * high:.1f}]", f"{p:.0e}")
