"""A study with real training runs: killed and continued, interrupted, with trials that die or are stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rlvla import collect, sft
from rlvla.compose import compose
from rlvla.config.tune import Sampler
from rlvla.tune_space import parse_space
from rlvla.tune_study import Study, TrialRecord

TOY = ["suite=toy", "workers.kind=local", "workers.num_actors=1", "workers.envs_per_actor=8"]
TINY = [
    *TOY,
    *("iterations=2", "episodes_per_iteration=8", "algo.min_successes=0", "algo.critic_only_iterations=0"),
    "inference_batch=8",
    *(
        "suite.max_episode_steps=16",
        "eval.trials=8",
        "eval.shuffled_images=false",
        "tune.rungs=1",
        "tune.seeds=1",
        "tune.parallel=1",
        "tune.own_settings=false",
    ),
    "tune.sampler=random",
]
SPACE = "algo.policy_lr: {low: 1.0e-5, high: 1.0e-3, log: true}\nalgo.epochs: {low: 1, high: 2}\n"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tune")
    collect.run(compose("collect", [*TOY, f"output={root / 'data'}", "episodes=4"]))
    few = ["policy=qwen_vla_toy", "steps=20", "batch_size=8"]
    sft.run(compose("sft", ["suite=toy", *few, f"dataset={root / 'data'}", f"output={root / 'sft'}"]))
    return root / "sft" / "policy"


def words(policy: Path, output: Path, *more: str, space: str = SPACE) -> list[str]:
    file = output.with_suffix(".space.yaml")
    file.write_text(space)
    return [*TINY, f"policy={policy}", f"output={output}", f"tune.space={file}", *more]


def start(settings: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "rlvla.cli", "tune", *settings]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes)


def finish(settings: list[str], status: int = 0) -> tuple[dict[str, Any], str]:
    """Run to the end; the summary, and what it said on stderr."""
    process = start(settings)
    out, said = process.communicate(timeout=600)
    assert process.returncode == status, said
    return (json.loads(out) if out else {}), said


def stop_when(condition: Callable[[], bool], settings: list[str], number: int) -> int:
    """Signal the study, and it alone, when the condition holds; its exit status."""
    process = start(settings)
    try:
        until = time.monotonic() + 300
        while not condition():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(number)
        process.wait(120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return process.returncode


def no_process_of(folder: Path) -> bool:
    """Whether nothing works in the folder any more, given a moment to end."""
    until = time.monotonic() + 30
    while any(str(folder) in line for line in _command_lines()):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_text(errors="replace"))
    return found


def journal(output: Path, space: str = SPACE) -> Study:
    import yaml

    content = parse_space(yaml.safe_load(space), "space")
    return Study(output / "journal.log", content, Sampler.random, seed=0, startup=4, liar=False)


def trials(output: Path) -> list[TrialRecord]:
    return journal(output).trials()


def test_a_study_killed_in_the_middle_and_interrupted_goes_on_to_a_complete_one(policy: Path, tmp_path: Path) -> None:
    output = tmp_path / "study"
    settings = words(policy, output, "tune.trials=3")

    def iterating(number: int) -> Callable[[], bool]:
        log = output / "trials" / f"{number:04d}" / "seed-0" / "metrics.jsonl"
        return lambda: log.exists() and '"iteration"' in log.read_text()

    stop_when(iterating(1), settings, signal.SIGKILL)
    assert no_process_of(output)
    (running,) = [trial for trial in trials(output) if trial.state == "running"]
    assert running.number == 1
    assert stop_when(iterating(2), settings, signal.SIGINT) == 130
    assert no_process_of(output)
    before = {trial.number: trial.values for trial in trials(output)}

    summary, said = finish(settings)
    assert "going on with trials 2" in " ".join(said.split())
    assert summary["trials"]["complete"] + summary["trials"]["stopped"] == 3
    after = trials(output)
    assert [trial.number for trial in after] == [0, 1, 2]
    assert {number: after[number].values for number in before} == before
    # A run that was interrupted went on after its last checkpoint; it did not begin anew.
    assert "going on after iteration" in (output / "trials" / "0002" / "seed-0.log").read_text()
    assert not list(output.glob("trials/*/*/checkpoints"))

    best = compose("train", [f"@{output / 'best.yaml'}", f"output={tmp_path / 'best'}"])
    assert best.algo.policy_lr == summary["settings"]["algo.policy_lr"]
    page = (output / "report.html").read_text()
    assert "trials/0000/seed-0/report.html" in page

    # Finished is finished, until more is asked for; and another space is another study.
    _, said = finish(settings, status=2)
    assert "holds a finished tune run" in said
    other = [*words(policy, output, "tune.trials=4", space=SPACE.replace("high: 2", "high: 3"))]
    _, said = finish(other, status=2)
    assert "algo.epochs was 1 to 2 and is 1 to 3" in said
    _, said = finish(words(policy, output, "tune.trials=4", "iterations=3"), status=2)
    assert "iterations was 2 and is 3" in said
    assert (output / "summary.json").exists()
    summary, _ = finish(words(policy, output, "tune.trials=4"))
    assert sum(summary["trials"].values()) == 4


def test_a_trial_that_dies_is_named_and_the_study_goes_on(policy: Path, tmp_path: Path) -> None:
    output = tmp_path / "study"
    # No machine has memory for the second head: 4 TB.
    space = "algo.value_hidden_sizes: {choices: [[], [10000000000]]}\n"
    summary, _ = finish(
        words(policy, output, "tune.sampler=grid", "tune.trials=2", "iterations=1", "tune.seeds=2", space=space)
    )
    assert summary["trials"] == {"complete": 1, "stopped": 0, "failed": 1}
    assert summary["settings"] == {"algo.value_hidden_sizes": "[]"}
    (dead,) = [trial for trial in journal(output, space).trials() if trial.state == "failed"]
    assert "memory" in dead.error
    page = (output / "report.html").read_text()
    assert "Trials that died" in page
    assert "algo.value_hidden_sizes=[10000000000]" in page
    assert (output / "trials" / "0000" / "seed-1" / "summary.json").exists()


def test_a_study_of_which_the_first_trials_all_die_says_why_and_stops(policy: Path, tmp_path: Path) -> None:
    output = tmp_path / "study"
    space = "algo.value_hidden_sizes: {choices: [[10000000000], [10000000001], []]}\n"
    settings = words(policy, output, "tune.sampler=grid", "tune.trials=3", "iterations=1", space=space)
    _, said = finish([*settings, "tune.give_up_after=2"], status=1)
    assert "the first 2 trials all died" in said
    assert "memory" in said
    # What can work is still tried when the command is given again.
    summary, _ = finish(settings)
    assert summary["trials"] == {"complete": 1, "stopped": 0, "failed": 2}


def test_a_trial_that_is_behind_is_ended_with_its_process(policy: Path, tmp_path: Path) -> None:
    output = tmp_path / "study"
    settings = words(policy, output, "iterations=40", "eval.every=1", "tune.trials=5")
    stop_when(lambda: (output / "journal.log").exists(), settings, signal.SIGINT)
    # Four that solved all at the first rung.
    rivals = journal(output)
    known = {trial.number for trial in rivals.interrupted()}
    while len(known) < 4:
        known.add(rivals.ask().number)
    for number in sorted(known):
        rivals.add_rung(number, 1, 8, 8, True, "iteration 1")
        rivals.add_result(number, {"seed": 0, "successes": 8, "trials": 8, "before": 0.0, "env_steps": 1, "minutes": 0})
        # Of the last one the study was killed between its result and its end.
        if number < max(known):
            rivals.set_objective(number, 0.6)
            rivals.end(number, "complete", 1)
    summary, _ = finish(settings)
    assert summary["trials"] == {"complete": 4, "stopped": 1, "failed": 0}
    last = trials(output)[-1]
    assert not last.rungs[1]["goes_on"]
    assert 0 < last.env_steps < 40 * 8 * 32
    run = output / "trials" / f"{last.number:04d}" / "seed-0"
    assert not (run / "summary.json").exists()
    assert (run / "report.html").exists()
    assert "interrupted" in run.with_name("seed-0.log").read_text()
    assert no_process_of(output)
    assert "stopped at iteration 1" in (output / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["policy=nowhere"], "policy is nowhere, which is no policy folder"),
        (["tune.space=nowhere"], "tune.space is nowhere; it must be ppo"),
        (["suite.name=toi"], "Did you mean 'toy'"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    policy: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    output = tmp_path / "study"
    _, heard = finish([*words(policy, output), *more], status=2)
    assert said in heard
    assert not output.exists()
