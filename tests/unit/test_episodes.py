"""Episodes judged against each other: numbers by hand, TorchRL's advantages, and what a baseline must keep."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvla_algos.episodes import best_of_group, group_mean, grpo_advantage, rloo_advantage


def random_groups(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outcomes of groups of any size, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(23, generator=generator), torch.randint(0, 6, (23,), generator=generator)


def test_the_group_mean_by_hand() -> None:
    mean = group_mean(torch.tensor([1.0, 0.0, 1.0, 4.0]), torch.tensor([7, 7, 7, 2]))
    assert mean.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 4])


def test_grpo_by_hand() -> None:
    # Outcomes 1, 0, 0, 0: mean 1/4, unbiased variance (9 + 3) / 16 / 3 = 1/4, so the deviation is 1/2.
    advantage = grpo_advantage(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64))
    assert advantage.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])


def test_rloo_by_hand() -> None:
    # Of 1, 0, 0, 1 the others of a success average 1/3, those of a failure 2/3.
    advantage = rloo_advantage(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.int64))
    assert advantage.tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])


@pytest.mark.parametrize("outcome", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("judge", [grpo_advantage, rloo_advantage])
def test_equal_outcomes_and_lonely_episodes_have_no_advantage(outcome: float, judge: object) -> None:
    assert callable(judge)
    # Seven of 0.1: their mean is off in the last bit.
    advantage = judge(torch.full((8,), outcome), torch.tensor([0] * 7 + [5]))
    assert advantage.abs().max().item() < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_grpo_equals_torchrls_group_advantage() -> None:
    from tensordict import TensorDict
    from torchrl.data import LazyStackStorage, ReplayBuffer
    from torchrl.objectives.llm import MCAdvantage

    outcome, _ = random_groups(3)
    outcome, group = outcome[:20], torch.arange(20) // 5
    buffer = ReplayBuffer(
        storage=LazyStackStorage(20),
        transform=MCAdvantage(grpo_size=5, prompt_key="group", trajectory_return="sum"),
        batch_size=20,
    )
    for reward, number in zip(outcome.tolist(), group.tolist(), strict=True):
        done = torch.tensor([[True]])
        step = {"group": [str(number)], "next": {"reward": torch.tensor([[reward]]), "done": done}}
        buffer.extend(TensorDict(step, batch_size=[1]))
    expected = buffer[:]["advantage"].flatten()
    torch.testing.assert_close(grpo_advantage(outcome, group), expected, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 10_000))
def test_both_equal_plain_loops(seed: int) -> None:
    outcome, group = random_groups(seed)
    grpo, rloo = grpo_advantage(outcome, group), rloo_advantage(outcome, group)
    for i in range(len(outcome)):
        others = [float(outcome[j]) for j in range(len(outcome)) if group[j] == group[i] and j != i]
        if not others:
            assert grpo[i] == rloo[i] == 0
            continue
        assert rloo[i].item() == pytest.approx(float(outcome[i]) - np.mean(others), abs=1e-5)
        everyone = [*others, float(outcome[i])]
        assert grpo[i].item() == pytest.approx(
            (float(outcome[i]) - np.mean(everyone)) / np.std(everyone, ddof=1), abs=1e-3
        )


def test_the_baseline_of_rloo_leaves_the_expected_gradient_and_that_of_a_mean_shrinks_it() -> None:
    # A policy that succeeds with probability p = sigmoid(x): the gradient of its success is p (1 - p). Three attempts,
    # all 8 outcomes: the expectation is a sum.
    p, n = 0.3, 3
    expected = {"rloo": 0.0, "mean": 0.0}
    for attempts in itertools.product([0.0, 1.0], repeat=n):
        outcome = torch.tensor(attempts)
        chance = math.prod(p if x else 1 - p for x in attempts)
        score = outcome - p  # d log P / dx of a Bernoulli with a logit
        group = torch.zeros(n, dtype=torch.int64)
        expected["rloo"] += chance * float((rloo_advantage(outcome, group) * score).mean())
        expected["mean"] += chance * float(((outcome - group_mean(outcome, group)) * score).mean())
    assert expected["rloo"] == pytest.approx(p * (1 - p))
    assert expected["mean"] == pytest.approx(p * (1 - p) * (n - 1) / n)


@given(seed=st.integers(0, 10_000), shift=st.floats(-3, 3), scale=st.floats(0.1, 10))
def test_grpo_does_not_know_the_unit_of_a_reward(seed: int, shift: float, scale: float) -> None:
    outcome, group = random_groups(seed)
    torch.testing.assert_close(
        grpo_advantage(scale * outcome + shift, group), grpo_advantage(outcome, group), rtol=1e-2, atol=1e-2
    )


def test_the_best_of_a_group_is_the_shortest_success_and_none_of_failures() -> None:
    outcome = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    steps = torch.tensor([3, 9, 5, 5, 1, 2])
    best = best_of_group(outcome, steps, torch.tensor([4, 4, 4, 4, 8, 8]))
    assert best.tolist() == [False, False, True, False, False, False]
