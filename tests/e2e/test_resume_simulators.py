"""What `test_resume` says of the toy, of real simulators and of evaluations that visit every configuration."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlvla import evaluate
from rlvla.compose import compose
from rlvla.rollout import play
from tests.e2e.runs import TRAIN, assert_kills_leave_no_trace, kill_when, make_policy

PUSH = ["suite=push_cube", "suite.max_episode_steps=16", "workers.num_actors=2", "workers.envs_per_actor=2"]
# Runs that live for seconds have no time to build one.
PUSH += ["workers.spare=false"]


@pytest.mark.simulator
@pytest.mark.slow
def test_a_run_on_maniskill_over_ray_that_is_killed_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    local = ["workers.kind=local", "workers.num_actors=1"]
    policy = make_policy(tmp_path, [*PUSH, *local], "steps=3", "batch_size=4")
    few = ["episodes_per_iteration=4", "eval.trials=4"]
    common = [*PUSH, *TRAIN, *few, f"policy={policy}", "iterations=6"]
    # The run that is killed takes turns as well: sync and pingpong give the same weights.
    assert_kills_leave_no_trace(tmp_path, common, moments=("checkpoint",), schedule="pingpong")


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.usefixtures("simpler_assets")
def test_an_enumerated_evaluation_killed_half_way_visits_the_other_configurations_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = [
        "suite=simpler_env",
        "suite.task=stack_cube+carrot_on_plate",
        "suite.max_episode_steps=8",
        "suite.image_size=64",
    ]
    one = ["workers.kind=local", "workers.num_actors=1", "workers.envs_per_actor=4"]
    policy = make_policy(tmp_path, [*suite, *one], "policy=qwen_vla_small", "steps=2", "batch_size=2", "noise_draws=1")
    common = [*suite, f"policy={policy}", "eval.videos=0", "eval.noise_seeds=1", "eval.shuffled_images=false"]
    common.append("inference_batch=4")
    evaluate.run(compose("eval", [*common, *one, f"output={tmp_path / 'straight'}"]))

    log = tmp_path / "killed" / "evaluations" / "eval.episodes.jsonl"

    def half_way() -> bool:
        return log.exists() and log.read_text().count("\n") >= 20

    kill_when(half_way, "eval", [*common, *one, f"output={tmp_path / 'killed'}"])
    whole_lines = log.read_text().split("\n")[1:-1]
    states = list(range(48))
    played = [states[json.loads(line)["episode"]] for line in whole_lines]
    visited: list[int] = []

    def watched(envs: Any, initial_states: list[int], decide: Any, **options: Any) -> Any:
        visited.extend(initial_states)
        return play(envs, initial_states, decide, **options)

    monkeypatch.setattr(evaluate, "play", watched)
    # Resumed with simulators spread over two actors.
    sharded = ["workers.num_actors=2", "workers.envs_per_actor=2"]
    evaluate.run(compose("eval", [*common, *sharded, f"output={tmp_path / 'killed'}"]))
    assert 0 < len(played) < 48
    assert Counter(played + visited) == dict.fromkeys(states, 1)
    results = [json.loads((tmp_path / run / "evaluations" / "eval.json").read_text()) for run in ("straight", "killed")]
    assert results[0] == results[1]
