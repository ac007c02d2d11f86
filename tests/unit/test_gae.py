"""Advantages over action chunks: who bootstraps, where the trace stops, and an independent implementation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from rlvla.config import AlgoConfig
from rlvla.train import add_advantages
from rlvla_algos.gae import generalized_advantage_estimate


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def flags(*values: int) -> Tensor:
    return torch.tensor([values], dtype=torch.bool)


def random_episodes(seed: int, batch: int = 4, length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reward, value, next_value = torch.randn(3, batch, length, generator=generator)
    terminated = torch.rand(batch, length, generator=generator) < 0.2
    truncated = torch.rand(batch, length, generator=generator) < 0.2
    return {
        "reward": reward,
        "value": value,
        "next_value": next_value,
        "terminated": terminated,
        "done": terminated | truncated,
    }


def test_two_decisions_and_a_success_by_hand() -> None:
    # discount 0.9, lambda 0.5
    #   delta_1 = 1 + 0 - 0.6             =  0.4      (terminated: no bootstrap)
    #   delta_0 = 0 + 0.9 x 0.6 - 0.5     =  0.04
    #   A_1 = 0.4,  A_0 = 0.04 + 0.9 x 0.5 x 0.4 = 0.22
    advantage, target = generalized_advantage_estimate(
        reward=row(0, 1),
        value=row(0.5, 0.6),
        next_value=row(0.6, 100),
        terminated=flags(0, 1),
        done=flags(0, 1),
        discount=row(0.9, 0.9),
        gae_lambda=0.5,
    )
    torch.testing.assert_close(advantage, row(0.22, 0.4))
    torch.testing.assert_close(target, row(0.72, 1.0))


def test_a_success_and_a_time_limit_in_one_chunk_do_not_bootstrap() -> None:
    # Both ended the same chunk: 1 - 0.7 = 0.3, whatever the critic says of the final observation.
    advantage, _ = generalized_advantage_estimate(
        reward=row(1),
        value=row(0.7),
        next_value=row(50),
        terminated=flags(1),
        done=flags(1),
        discount=row(0.99),
        gae_lambda=0.95,
    )
    torch.testing.assert_close(advantage, row(0.3))


def test_truncation_bootstraps_but_does_not_leak_into_the_next_episode() -> None:
    # Decision 0 is cut off at V(final) = 0.8: 0 + 0.5 x 0.8 - 0.2 = 0.2, and decision 1 belongs to another
    # episode: 1 - 0.1 = 0.9 stays where it is.
    advantage, _ = generalized_advantage_estimate(
        reward=row(0, 1),
        value=row(0.2, 0.1),
        next_value=row(0.8, 7),
        terminated=flags(0, 1),
        done=flags(1, 1),
        discount=row(0.5, 0.5),
        gae_lambda=0.95,
    )
    torch.testing.assert_close(advantage, row(0.2, 0.9))


def test_every_decision_has_its_own_discount() -> None:
    # lambda 1, V = 0: A_0 = r_0 + d_0 (r_1 + d_1 r_2) = 1 + 0.5 (2 + 0.1 x 4) = 2.2
    advantage, _ = generalized_advantage_estimate(
        reward=row(1, 2, 4),
        value=row(0, 0, 0),
        next_value=row(0, 0, 0),
        terminated=flags(0, 0, 1),
        done=flags(0, 0, 1),
        discount=row(0.5, 0.1, 0.9),
        gae_lambda=1.0,
    )
    torch.testing.assert_close(advantage, row(2.2, 2.4, 4.0))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_it_equals_torchrl(seed: int, gae_lambda: float) -> None:
    from torchrl.objectives.value.functional import generalized_advantage_estimate as torchrl_gae

    episodes = random_episodes(seed)
    advantage, target = generalized_advantage_estimate(
        **episodes, discount=torch.full((4, 12), 0.97), gae_lambda=gae_lambda
    )
    expected_advantage, expected_target = torchrl_gae(
        0.97,
        gae_lambda,
        episodes["value"][..., None],
        episodes["next_value"][..., None],
        episodes["reward"][..., None],
        done=episodes["done"][..., None],
        terminated=episodes["terminated"][..., None],
    )
    torch.testing.assert_close(advantage, expected_advantage[..., 0])
    torch.testing.assert_close(target, expected_target[..., 0])


@given(seed=st.integers(0, 1000), gamma=st.floats(0.5, 1.0))
def test_lambda_one_is_the_monte_carlo_return(seed: int, gamma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    reward, value = torch.randn(2, 2, 6, generator=generator)
    # The next decision's value is the next value, as in a rollout; the last decision terminates.
    next_value = torch.cat([value[:, 1:], torch.zeros(2, 1)], dim=1)
    end = torch.zeros(2, 6, dtype=torch.bool)
    end[:, -1] = True
    _, target = generalized_advantage_estimate(
        reward=reward,
        value=value,
        next_value=next_value,
        terminated=end,
        done=end,
        discount=torch.full((2, 6), gamma),
        gae_lambda=1.0,
    )
    returns = torch.stack([sum(gamma ** (k - t) * reward[:, k] for k in range(t, 6)) for t in range(6)], dim=1)
    torch.testing.assert_close(target, returns, atol=1e-5, rtol=1e-4)


@given(seed=st.integers(0, 1000))
def test_lambda_zero_is_the_one_step_error(seed: int) -> None:
    episodes = random_episodes(seed)
    advantage, _ = generalized_advantage_estimate(**episodes, discount=torch.full((4, 12), 0.9), gae_lambda=0.0)
    future = torch.where(episodes["terminated"], 0.0, 0.9 * episodes["next_value"])
    torch.testing.assert_close(advantage, episodes["reward"] + future - episodes["value"])


@given(seed=st.integers(0, 1000), garbage=st.floats(-100, 100))
def test_padding_behind_the_end_leaves_the_episode_alone(seed: int, garbage: float) -> None:
    episodes = random_episodes(seed, length=5)
    episodes["done"][:, -1] = True
    alone = generalized_advantage_estimate(**episodes, discount=torch.full((4, 5), 0.99), gae_lambda=0.95)
    padding = {
        "reward": torch.full((4, 3), garbage),
        "value": torch.full((4, 3), garbage),
        "next_value": torch.full((4, 3), garbage),
        "terminated": torch.zeros(4, 3, dtype=torch.bool),
        "done": torch.ones(4, 3, dtype=torch.bool),
    }
    padded = generalized_advantage_estimate(
        **{name: torch.cat([episodes[name], padding[name]], dim=1) for name in episodes},
        discount=torch.full((4, 8), 0.99),
        gae_lambda=0.95,
    )
    for before, after in zip(alone, padded, strict=True):
        assert torch.equal(before, after[:, :5])


@pytest.mark.parametrize(("bootstrap", "target"), [(True, [0.8, 0.8]), (False, [0.0, 0.0])])
def test_what_lies_past_the_time_limit_counts_only_where_it_is_asked_for(bootstrap: bool, target: list[float]) -> None:
    # Two decisions without a reward, cut off after the second, where the critic would have seen 0.8. Undiscounted.
    rollout = TensorDict(
        {
            "state_value": torch.tensor([[0.5, 0.5]]),
            "valid": torch.tensor([[True, True]]),
            "next": {
                "reward": torch.zeros(1, 2),
                "state_value": torch.tensor([[0.5, 0.8]]),
                "terminated": torch.tensor([[False, False]]),
                "done": torch.tensor([[False, True]]),
                "executed_steps": torch.tensor([[8, 8]]),
            },
        },
        batch_size=[1, 2],
    )
    add_advantages(rollout, AlgoConfig(gamma=1.0, gae_lambda=1.0, bootstrap_time_limit=bootstrap))
    torch.testing.assert_close(rollout["value_target"], torch.tensor([target]))
