"""A mixed suite through all four verbs: demonstrations of two tasks, SFT, PPO by task, both SimplerEnv suites."""

import json
from pathlib import Path

import pytest

from rlvla import collect, evaluate, sft, train
from rlvla.acting import Actor
from rlvla.compose import compose
from rlvla.dataset_reader import load_dataset
from rlvla.policies.folder import load_policy
from rlvla.workers import open_envs
from rlvla_algos.statistics import wilson_interval

pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.usefixtures("simpler_assets")]

TASKS = "stack_cube+carrot_on_plate"
LOCAL = ["workers.kind=local", "workers.num_actors=1", "workers.envs_per_actor=4"]
SUITE = ["suite=simpler_env", f"suite.task={TASKS}", "suite.max_episode_steps=16", *LOCAL]


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("simpler")
    whole = [setting for setting in SUITE if "max_episode_steps" not in setting]
    collect.run(compose("collect", [*whole, f"output={root / 'data'}", "episodes=4"]))
    data = load_dataset(root / "data")
    assert set(data.tasks) == {"put carrot on plate", "stack the green block on the yellow block"}
    assert data.images["3rd_view_camera"].shape[1:] == (224, 224, 3)
    settings = ["policy=qwen_vla_small", f"dataset={root / 'data'}", f"output={root / 'sft'}"]
    sft.run(compose("sft", [*SUITE[:3], *settings, "steps=2", "batch_size=2", "noise_draws=1"]))
    return root / "sft" / "policy"


def test_training_allocates_measures_and_reports_by_task(policy_folder: Path, tmp_path: Path) -> None:
    settings = [
        f"policy={policy_folder}",
        f"output={tmp_path / 'ppo'}",
        "iterations=1",
        "inference_batch=4",
        "episodes_per_iteration=4",
        "task_weights={stack_cube: 3.0, carrot_on_plate: 1.0}",
        "eval.trials=4",
        "eval.noise_seeds=2",
        "eval.videos=0",
        "eval.shuffled_images=false",
    ]
    summary = train.run(compose("train", [*SUITE, *settings]))
    assert set(summary["by_task"]) == {"stack_cube", "carrot_on_plate"}
    result = json.loads((tmp_path / "ppo" / "evaluations" / "after.json").read_text())
    # Four configurations of each task; a second noise seed is for more episodes than there are configurations.
    assert sorted(result["initial_states"]) == [0, 6, 12, 18, 24, 30, 36, 42]
    assert result["by_task"]["stack_cube"]["interval"] == pytest.approx(list(wilson_interval(0, 4)))
    assert set(result["metrics"]) == {"success_strict", "success_maniskill"}
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    iteration = next(row for row in rows if row["kind"] == "iteration")
    assert iteration["rollout/episodes/stack_cube"] == 3
    assert iteration["rollout/episodes/carrot_on_plate"] == 1
    assert "Task by task" in (tmp_path / "ppo" / "report.html").read_text()


def test_outcomes_are_the_same_twice_and_sharded_over_ray_actors(policy_folder: Path) -> None:
    config = compose("eval", [f"policy={policy_folder}", *SUITE, "eval.trials=6", "eval.noise_seeds=2"])
    actor = Actor(load_policy(policy_folder), block=4, device="cpu")
    results = []
    for kind, actors, per_actor, passes in (("local", 1, 4, 2), ("ray", 2, 2, 1)):
        config.workers.kind = type(config.workers.kind)(kind)
        config.workers.num_actors, config.workers.envs_per_actor = actors, per_actor
        envs = open_envs(config.suite, config.workers)
        try:
            # The second pass finds a used pool of scenes.
            results += [evaluate.evaluate(actor, envs, config.eval, name="x")[0] for _ in range(passes)]
        finally:
            envs.close()
    assert results[0] == results[1] == results[2]
    assert sorted(results[0].initial_states) == list(range(0, 48, 4))


def test_a_policy_of_the_four_tasks_is_measured_on_the_six_it_never_saw(policy_folder: Path, tmp_path: Path) -> None:
    settings = [f"policy={policy_folder}", f"output={tmp_path / 'ood'}", "eval.trials=1", "eval.videos=0"]
    settings.append("inference_batch=4")
    suite = ["suite=simpler_env_ood", "suite.max_episode_steps=8", "eval.shuffled_images=false", *LOCAL]
    evaluate.run(compose("eval", [*suite, *settings]))
    result = json.loads((tmp_path / "ood" / "evaluations" / "eval.json").read_text())
    assert len(result["by_task"]) == 6
    assert all(rate["trials"] == 1 for rate in result["by_task"].values())
    # The asset folder of this machine has stand-ins, or it has not; either way the result says what it rests on.
    assert isinstance(result["notes"], list)
