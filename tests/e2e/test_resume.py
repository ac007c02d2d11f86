"""A process that is killed loses an iteration at most, and nobody can tell from the result that it was."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from rlvla import collect, evaluate, sft
from rlvla.compose import compose
from rlvla.rollout import play

# One environment: an evaluation takes long enough to be killed in.
TOY = ["suite=toy", "workers.kind=local", "workers.num_actors=1", "workers.envs_per_actor=1"]
PUSH = ["suite=push_cube", "suite.max_episode_steps=16", "workers.num_actors=2", "workers.envs_per_actor=2"]
# Runs that live for seconds have no time to build one.
PUSH += ["workers.spare=false"]
TRAIN = [
    "episodes_per_iteration=8",
    "algo.critic_only_iterations=1",
    "algo.min_successes=0",
    "algo.epochs=2",
    "eval.trials=12",
    "eval.videos=0",
    "eval.every=2",
]
UNTIMED = ("minutes", "time/", "speed/")


def make_policy(root: Path, suite: list[str], *settings: str) -> Path:
    whole = [setting for setting in suite if "max_episode_steps" not in setting]
    collect.run(compose("collect", [*whole, f"output={root / 'data'}", "episodes=4"]))
    chosen = [s for s in suite if s.startswith("suite")]
    sft.run(compose("sft", [*chosen, *settings, f"dataset={root / 'data'}", f"output={root / 'sft'}"]))
    return root / "sft" / "policy"


def start(verb: str, settings: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "rlvla.cli", verb, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(verb: str, settings: list[str]) -> str:
    """Run to the end; what it said on stderr."""
    process = start(verb, settings)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def kill_when(condition: Callable[[], bool], verb: str, settings: list[str]) -> None:
    """SIGKILL the whole process group at the moment the condition holds."""
    process = start(verb, settings)
    try:
        until = time.monotonic() + 300
        while not condition():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def rows(run: Path) -> list[dict[str, Any]]:
    """What was logged, without what a clock says."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(UNTIMED)} for line in lines]


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{prefix}/{key}")
    else:
        yield prefix, tree


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    newest = "checkpoints/iteration-0006"
    assert {p.name for p in (one / "checkpoints").iterdir()} == {p.name for p in (other / "checkpoints").iterdir()}
    files = ["policy/model.safetensors", f"{newest}/policy/model.safetensors"]
    files += [str(path.relative_to(one)) for path in one.glob("policy/adapter*")]
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), f"{file} differs"
    learners = [dict(leaves(torch.load(run / newest / "learner.pt", weights_only=True))) for run in (one, other)]
    assert learners[0].keys() == learners[1].keys()
    assert len(learners[0]) > 20
    for key, value in learners[0].items():
        same = torch.equal(value, learners[1][key]) if isinstance(value, torch.Tensor) else value == learners[1][key]
        assert same, f"{key} of the learner differs"
    for name in ("before", "after", "after-shuffled"):
        results = [json.loads((run / "evaluations" / f"{name}.json").read_text()) for run in (one, other)]
        assert results[0] == results[1]


@pytest.mark.parametrize(
    "suite",
    [
        pytest.param("toy", id="toy"),
        pytest.param("async", id="toy-one-step-off"),
        pytest.param("lora", id="toy-adapters"),
        pytest.param("push", id="maniskill-over-ray", marks=[pytest.mark.simulator, pytest.mark.slow]),
    ],
)
def test_a_run_killed_four_times_ends_with_the_bits_of_one_that_was_not(suite: str, tmp_path: Path) -> None:
    settings = {
        "toy": (TOY, ["policy=qwen_vla_toy", "steps=20", "batch_size=8"], "sync"),
        "async": (TOY, ["policy=qwen_vla_toy", "steps=20", "batch_size=8"], "async"),
        "lora": (TOY, ["policy=qwen_vla_toy", "steps=20", "batch_size=8"], "sync"),
        # The run that is killed takes turns as well: sync and pingpong give the same weights.
        "push": (PUSH, ["steps=3", "batch_size=4"], "pingpong"),
    }
    overrides, training, schedule = settings[suite]
    policy = make_policy(tmp_path, overrides, *training)
    common = [*overrides, *TRAIN, f"policy={policy}", "iterations=6"]
    if suite == "lora":
        common += ["algo.train_vlm=true", "lora.rank=2", "lora.groups=[vlm]", "algo.learning_rates={vlm: 1e-4}"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    undisturbed = "sync" if schedule == "pingpong" else schedule
    finish("train", [*common, f"output={straight}", f"schedule={undisturbed}"])
    common.append(f"schedule={schedule}")

    def before_is_half_done() -> bool:
        log = killed / "evaluations" / "before.episodes.jsonl"
        return log.exists() and log.read_text().count("\n") >= 2

    def iterations_done(number: int) -> Callable[[], bool]:
        return lambda: sum(row["kind"] == "iteration" for row in rows_so_far(killed)) >= number

    def learner_is_being_written() -> bool:
        written = any((killed / "checkpoints").glob(".stage-*/policy")) and iterations_done(4)()
        # It is over in milliseconds: who misses it kills a little later.
        return written or iterations_done(5)()

    def after_is_measured() -> bool:
        return (killed / "evaluations" / "after.json").exists()

    moments = (before_is_half_done, iterations_done(2), learner_is_being_written, after_is_measured)
    for moment in moments:
        kill_when(moment, "train", [*common, f"output={killed}"])
    said = finish("train", [*common, f"output={killed}", "workers.envs_per_actor=2"])
    assert "going on after iteration" in said
    assert_same_run(straight, killed)
    assert not any((killed / "checkpoints").glob(".*"))


def rows_so_far(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return [json.loads(line) for line in whole]


def test_a_damaged_checkpoint_costs_an_iteration_and_is_reported(tmp_path: Path) -> None:
    policy = make_policy(tmp_path, TOY, "policy=qwen_vla_toy", "steps=20", "batch_size=8")
    common = [*TOY, *TRAIN, f"policy={policy}", "iterations=6"]
    straight, harmed = tmp_path / "straight", tmp_path / "harmed"
    finish("train", [*common, f"output={straight}"])
    kill_when(lambda: (harmed / "checkpoints" / "iteration-0003").exists(), "train", [*common, f"output={harmed}"])
    newest = max((harmed / "checkpoints").glob("iteration-*"))
    with (newest / "learner.pt").open("r+b") as file:
        file.seek(100)
        file.write(b"flipped")
    said = finish("train", [*common, f"output={harmed}"])
    assert f"{newest.name} is damaged (learner.pt is not what was written)" in " ".join(said.split())
    alarms = [row for row in rows(harmed) if row["kind"] == "alarm"]
    assert any("is damaged" in row["message"] for row in alarms)
    weights = [(run / "policy" / "model.safetensors").read_bytes() for run in (straight, harmed)]
    assert weights[0] == weights[1]


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.usefixtures("simpler_assets")
def test_an_enumerated_evaluation_killed_half_way_visits_the_other_configurations_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = ["suite=simpler_env", "suite.task=stack_cube+carrot_on_plate", "suite.max_episode_steps=16"]
    one = ["workers.kind=local", "workers.num_actors=1", "workers.envs_per_actor=4"]
    policy = make_policy(tmp_path, [*suite, *one], "policy=qwen_vla_small", "steps=2", "batch_size=2", "noise_draws=1")
    common = [*suite, f"policy={policy}", "eval.videos=0", "eval.noise_seeds=1", "eval.shuffled_images=false"]
    evaluate.run(compose("eval", [*common, *one, f"output={tmp_path / 'straight'}"]))

    log = tmp_path / "killed" / "evaluations" / "eval.episodes.jsonl"

    def half_way() -> bool:
        return log.exists() and log.read_text().count("\n") >= 20

    kill_when(half_way, "eval", [*common, *one, f"output={tmp_path / 'killed'}"])
    whole_lines = log.read_text().split("\n")[1:-1]
    states = list(range(48))
    played = [states[json.loads(line)["episode"]] for line in whole_lines]
    visited: list[int] = []

    def watched(envs: Any, initial_states: list[int], decide: Any) -> Any:
        visited.extend(initial_states)
        return play(envs, initial_states, decide)

    monkeypatch.setattr(evaluate, "play", watched)
    # Resumed with simulators spread over two actors.
    sharded = ["workers.num_actors=2", "workers.envs_per_actor=2"]
    evaluate.run(compose("eval", [*common, *sharded, f"output={tmp_path / 'killed'}"]))
    assert 0 < len(played) < 48
    assert Counter(played + visited) == dict.fromkeys(states, 1)
    results = [json.loads((tmp_path / run / "evaluations" / "eval.json").read_text()) for run in ("straight", "killed")]
    assert results[0] == results[1]
