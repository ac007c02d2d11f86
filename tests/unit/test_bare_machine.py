"""Policies and learner on a machine that has torch, transformers and little else."""

from collections.abc import Callable
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ABSENT = (
    "ray",
    "mani_skill",
    "sapien",
    "gymnasium",
    "mujoco",
    "hydra",
    "omegaconf",
    "optuna",
    "pyarrow",
    "imageio",
    "PIL",
    "rich",
    "scipy",
    "torchrl",
)
WITHOUT = f"""
import importlib.machinery, sys
sys.path.append({str(SCRIPTS)!r})
ABSENT = {ABSENT!r}
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda kind, name, *more: None if name.split(".")[0] in ABSENT else find(name, *more)
)
"""


def test_the_blocker_blocks(run_python: Callable[[str], str]) -> None:
    code = "\ntry:\n    import hydra\nexcept ModuleNotFoundError as error:\n    print(error.name)\n"
    assert run_python(WITHOUT + code).split() == ["hydra"]


def test_a_ppo_update_of_a_drawn_policy_needs_neither_ray_nor_hydra_nor_a_simulator(
    run_python: Callable[[str], str],
) -> None:
    code = """
import torch
torch.set_num_threads(1)
from synthetic import algo_config, draw_policy, play, policy_config
from rlvla.learner import Learner
from rlvla.policies.base import ValueHead, trained_groups
from rlvla.policies.groups import require_gradients
from rlvla.samplers import training_sampler
config = algo_config(minibatch_size=8)
policy = draw_policy(policy_config("qwen_vla_toy"), 32, "cpu", std=0.2)
require_gradients(policy, trained_groups(policy, False))
head, sampler = ValueHead(policy.value_size), training_sampler(policy, config)
learner = Learner(policy, head, config, sampler, seed=0, total_iterations=1)
before = policy.expert.blocks[0].qkv.weight.clone()
rollout = play(policy, head, sampler, episodes=4, decisions=2, block=4, device="cpu")
found = learner.update(rollout, 0)
print(found["ppo/ratio_error"] < 1e-3, not torch.equal(before, policy.expert.blocks[0].qkv.weight))
print(*sorted(set(ABSENT) & set(sys.modules)))
"""
    assert run_python(WITHOUT + code).split() == ["True", "True"]
