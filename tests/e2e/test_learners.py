"""`rlvla train learners.num=2`: the run that one learner makes, also when a rank is killed."""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlvla import collect, sft, train
from rlvla.compose import compose
from tests.e2e.runs import Started

pytestmark = pytest.mark.slow

TOY = ["suite=toy", "workers.num_actors=2", "workers.envs_per_actor=4"]
LOCAL, RAY = "workers.kind=local", "workers.kind=ray"
TRAIN = [
    "episodes_per_iteration=23",
    "iterations=5",
    "inference_batch=8",
    "algo.critic_only_iterations=1",
    "algo.min_successes=0",
    "algo.train_vlm=true",
    "algo.epochs=2",
    "algo.minibatch_size=48",
    "eval.trials=4",
    "eval.videos=0",
    "eval.shuffled_images=false",
]
UNTIMED = ("minutes", "time/", "speed/", "memory/")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    collect.run(compose("collect", [*TOY, LOCAL, f"output={root / 'data'}", "episodes=8"]))
    settings = ["policy=qwen_vla_toy", "steps=40", "batch_size=16", "train_vlm=false"]
    sft.run(compose("sft", ["suite=toy", *settings, f"dataset={root / 'data'}", f"output={root / 'sft'}"]))
    return root / "sft" / "policy"


@pytest.fixture(scope="module")
def one_learner(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    train.run(compose("train", [*TOY, LOCAL, *TRAIN, f"policy={policy}", f"output={output}"]))
    return output


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [
        {key: value for key, value in row.items() if not key.startswith(UNTIMED)}
        for row in map(json.loads, lines)
        if row["kind"] == kind
    ]


def assert_same_but_for_rounding(one: Path, other: Path) -> None:
    for kind in ("iteration", "evaluation"):
        found = [rows(run, kind) for run in (one, other)]
        assert len(found[0]) == len(found[1]) > 0
        for before, after in zip(*found, strict=True):
            assert before.keys() == after.keys()
            for key, value in before.items():
                if isinstance(value, float):
                    # The errors are themselves rounding.
                    tolerance = 1e-4 if key.endswith("_error") else 1e-6
                    assert after[key] == pytest.approx(value, rel=1e-3, abs=tolerance), key
                else:
                    assert after[key] == value, key
    weights = [load_file(run / "policy" / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)
    newest = "checkpoints/iteration-0005"
    files = [{str(p.relative_to(run / newest)) for p in (run / newest).rglob("*")} for run in (one, other)]
    assert files[0] == files[1]


@pytest.mark.parametrize(("strategy", "workers"), [("ddp", RAY), ("fsdp", LOCAL)])
def test_two_learners_make_the_run_of_one(
    strategy: str, workers: str, policy: Path, one_learner: Path, tmp_path: Path
) -> None:
    settings = ["learners.num=2", f"learners.strategy={strategy}", f"policy={policy}", f"output={tmp_path / 'two'}"]
    summary = train.run(compose("train", [*TOY, workers, *TRAIN, *settings]))
    assert summary["env_steps"] == rows(one_learner, "iteration")[-1]["env_steps"]
    assert_same_but_for_rounding(one_learner, tmp_path / "two")
    assert not rows(tmp_path / "two", "alarm") or rows(tmp_path / "two", "alarm") == rows(one_learner, "alarm")


def test_what_a_rank_refuses_is_said_in_its_own_words(policy: Path, tmp_path: Path) -> None:
    settings = ["learners.num=2", "suite.chunk_size=4", f"policy={policy}", f"output={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="chunk size H"):
        train.run(compose("train", [*TOY, LOCAL, *TRAIN, *settings]))


def learner_ranks(driver: int, output: Path) -> dict[bool, int]:
    """Process ids of a run's two ranks, by whether it holds the run folder, as rank 0 does."""
    parents: dict[int, int] = {}
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::LearnerRank"):
                found.append(int(folder.name))

    def ancestors(pid: int) -> list[int]:
        return [] if pid not in parents else [parents[pid], *ancestors(parents[pid])]

    lock = output / ".lock"
    ranks = {}
    for pid in found:
        if driver in ancestors(pid):
            with suppress(OSError):
                ranks[any(path.exists() and path.samefile(lock) for path in Path(f"/proc/{pid}/fd").iterdir())] = pid
    return ranks


def test_a_rank_that_is_killed_costs_a_restart_from_the_last_checkpoint(
    policy: Path, one_learner: Path, tmp_path: Path
) -> None:
    output = tmp_path / "two"
    settings = [*TOY, LOCAL, *TRAIN, "learners.num=2", f"policy={policy}", f"output={output}"]
    process = Started("train", settings, tmp_path / "said")

    def wait_for(condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 300
        while not condition():
            assert process.ended(0) is None, process.said
            assert time.monotonic() < until
            time.sleep(0.01)

    try:
        for iterations, leads in ((1, False), (3, True)):
            wait_for((output / "checkpoints" / f"iteration-{iterations:04d}").exists)
            wait_for(lambda: len(learner_ranks(process.pid, output)) == 2)
            os.kill(learner_ranks(process.pid, output)[leads], signal.SIGKILL)
        status, said = process.ended(300), process.said
    finally:
        process.kill()
    assert status == 0, said
    assert said.count("starting the learners again") == 2
    alarms = [row for row in rows(output, "alarm") if row["where"].startswith("restart")]
    assert [row["where"] for row in alarms] == ["restart 1", "restart 2"]
    assert "learner rank 1 died" in alarms[0]["message"]
    assert "learner rank 0 died" in alarms[1]["message"]
    assert_same_but_for_rounding(one_learner, output)
