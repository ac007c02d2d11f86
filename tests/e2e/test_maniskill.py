"""The system on a rendered robot task, for as long as it takes to see that the parts fit."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from rlvla import collect, evaluate, sft
from rlvla.compose import compose
from rlvla.dataset_reader import load_dataset
from rlvla.workers import open_envs

# pytest's importlib mode keeps test folders off sys.path: load the sibling by its file.
_spec = importlib.util.spec_from_file_location("toy_helpers", Path(__file__).with_name("test_toy.py"))
assert _spec is not None
assert _spec.loader is not None
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

pytestmark = pytest.mark.simulator


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("push")
    collected = collect.run(
        compose("collect", [f"output={root / 'data'}", "episodes=4", "workers.num_actors=2", "workers.spare=false"])
    )
    assert collected["episodes"] == 4
    data = load_dataset(root / "data")
    assert data.images["base_camera"].shape[1:] == (64, 64, 3)
    assert data.tasks == ("push the blue cube onto the red and white target",)
    sft.run(compose("sft", [f"dataset={root / 'data'}", f"output={root / 'sft'}", "steps=3", "batch_size=4"]))
    return root / "sft" / "policy"


def test_ray_rollouts_equal_in_process_rollouts_bit_for_bit(policy_folder: Path) -> None:
    rollouts = []
    for kind, actors, per_actor in (("local", 1, 4), ("ray", 2, 2)):
        overrides = [
            f"policy={policy_folder}",
            f"workers.kind={kind}",
            f"workers.num_actors={actors}",
            "workers.spare=false",
            f"workers.envs_per_actor={per_actor}",
        ]
        config = compose("train", overrides)
        envs = open_envs(config.suite, config.workers)
        try:
            rollouts.append(toy.make_rollout(policy_folder, envs, episodes=6, block=4)[0])
        finally:
            envs.close()
    toy.assert_equal_rollouts(*rollouts)
    assert torch.isfinite(rollouts[0]["log_prob"]).all()


def test_an_evaluation_leaves_a_result_a_video_and_a_report(policy_folder: Path, tmp_path: Path) -> None:
    overrides = [f"policy={policy_folder}", f"output={tmp_path / 'eval'}", "eval.trials=4", "eval.videos=1"]
    overrides.append("inference_batch=4")
    summary = evaluate.run(
        compose("eval", [*overrides, "workers.num_actors=2", "workers.envs_per_actor=2", "workers.spare=false"])
    )
    result = json.loads((tmp_path / "eval" / "evaluations" / "eval.json").read_text())
    assert result["trials"] == 4
    assert result["initial_states"] == [0, 1, 2, 3]
    assert (tmp_path / "eval" / "videos" / "eval-0.mp4").stat().st_size > 1000
    assert Path(summary["report"]).exists()
