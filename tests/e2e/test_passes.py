"""How often the networks run: what is known is not computed again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from rlvla.acting import Actor
from rlvla.compose import compose
from rlvla.config import AlgoConfig
from rlvla.learner import Learner
from rlvla.policies.base import ValueHead
from rlvla.policies.policy import Policy
from rlvla.rollout import collect
from rlvla.samplers import training_sampler
from rlvla.seeding import training_state
from rlvla.train import add_advantages
from rlvla.workers import Envs, open_envs

EPISODES, EPOCHS = 8, 3
ALGO = AlgoConfig(
    epochs=EPOCHS, target_kl=100.0, critic_only_iterations=0, min_successes=0, minibatch_size=16, policy_lr=1e-3
)


@pytest.fixture
def envs() -> Iterator[Envs]:
    sizes = ["workers.kind=local", "workers.num_actors=1", f"workers.envs_per_actor={EPISODES}"]
    config = compose("train", ["policy=none", "suite=toy", *sizes])
    opened = open_envs(config.suite, config.workers)
    yield opened
    opened.close()


@contextmanager
def counting(module: Any) -> Iterator[list[int]]:
    """Rows of each pass through a module, which takes them in its first argument or in ``input_ids``."""
    with counting_both(module) as (rows, _):
        yield rows


@contextmanager
def counting_both(module: Any) -> Iterator[tuple[list[int], list[int]]]:
    """`counting`, and of those the passes that keep what a gradient needs."""
    rows: list[int] = []
    trained: list[int] = []

    def count(_: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else kwargs["input_ids"]))
        trained.extend(rows[-1:] if torch.is_grad_enabled() else [])

    hook = module.register_forward_pre_hook(count, with_kwargs=True)
    yield rows, trained
    hook.remove()


def play(policy: Policy, envs: Envs, *, store_context: bool) -> tuple[TensorDict, Learner]:
    torch.manual_seed(1)
    head = ValueHead(policy.value_size)
    sampler = training_sampler(policy, ALGO)
    learner = Learner(policy, head, ALGO, sampler, seed=0, total_iterations=1)
    rollout = collect(
        Actor(policy, block=EPISODES, device="cpu"),
        head,
        envs,
        [training_state(0, 9, i) for i in range(EPISODES)],
        sampler=sampler,
        key=(0, 0),
        store_context=store_context,
        value_final=False,
    )
    add_advantages(rollout, ALGO)
    return rollout, learner


def test_a_rollout_runs_the_vlm_once_and_the_expert_n_times_a_decision(
    make_policy: Callable[..., Policy], envs: Envs
) -> None:
    policy: Any = make_policy("qwen_vla_toy", envs.spec)
    with counting(policy.vlm) as encoded, counting(policy.expert) as denoised:
        rollout, _ = play(policy, envs, store_context=True)
    # As many slots as episodes: each round is one block, whose rows of ended episodes repeat another.
    rounds = rollout.shape[1]
    assert encoded == [EPISODES] * rounds
    assert denoised == [EPISODES] * (rounds * policy.num_denoising_steps)


def test_an_update_with_kept_contexts_runs_no_vlm_and_the_expert_once_a_decision_and_epoch(
    make_policy: Callable[..., Policy], envs: Envs
) -> None:
    policy: Any = make_policy("qwen_vla_toy", envs.spec)
    rollout, learner = play(policy, envs, store_context=True)
    decisions = int(rollout["valid"].sum())
    with counting(policy.vlm) as encoded, counting_both(policy.expert) as (scored, trained):
        learner.update(rollout, 0)
    assert encoded == []
    assert sum(trained) == EPOCHS * decisions
    # The epochs; the check of the first minibatch's size before them; the measurement of the KL after them.
    checked = min(decisions, ALGO.minibatch_size)
    assert sum(scored) == EPOCHS * decisions + checked + decisions


def test_kept_contexts_and_encoding_again_make_the_same_update(make_policy: Callable[..., Policy], envs: Envs) -> None:
    weights = []
    for store_context in (True, False):
        policy: Any = make_policy("qwen_vla_toy", envs.spec)
        start = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        rollout, learner = play(policy, envs, store_context=store_context)
        with counting(policy.vlm) as encoded:
            learner.update(rollout, 0)
        assert bool(encoded) != store_context
        weights.append(policy.state_dict())
    assert max(float((weights[0][name] - start[name]).abs().max()) for name in start) > 1e-4
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-5, rtol=0)
