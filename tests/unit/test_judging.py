"""Whole episodes judged in a rollout: what is left out, and that ranks and lost episodes change nothing."""

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from rlvla.config import AlgoConfig, Estimator, Objective
from rlvla.judging import judge, repeat_states
from rlvla.ranks import Group
from rlvla.train import add_advantages


def rollout(outcomes: list[float], states: list[int], lengths: list[int]) -> TensorDict:
    """Episodes of chunks of one step; the reward comes with the last one."""
    longest = max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    last = torch.arange(longest) == torch.tensor(lengths)[:, None] - 1
    reward = torch.where(last, torch.tensor(outcomes)[:, None], 0.0)
    return TensorDict(
        {
            "valid": valid,
            "mask": valid[..., None, None].expand(*valid.shape, 2, 1).clone(),
            "initial_state": torch.tensor(states)[:, None].expand(valid.shape).clone(),
            "next": {"reward": reward, "success": reward > 0, "executed_steps": valid.long()},
        },
        batch_size=valid.shape,
    )


def algo(estimator: Estimator, **changes: Any) -> AlgoConfig:
    return AlgoConfig(estimator=estimator, **{"group_size": 2, **changes})


def test_every_decision_of_an_episode_has_its_advantage_and_the_rest_none() -> None:
    # State 5: outcomes 1 and 0, so leave-one-out gives 1 and -1. State 8 has one attempt left: 0.
    data = rollout([1.0, 0.0, 1.0], [5, 5, 8], [2, 3, 1])
    measured = add_advantages(data, algo(Estimator.rloo))
    assert data["advantage"].tolist() == [[1, 1, 0], [-1, -1, -1], [0, 0, 0]]
    assert not data["value_target"].any()
    assert measured == {"rollout/left_out": 0.0}


def test_groups_that_all_failed_or_all_succeeded_are_left_out() -> None:
    data = rollout([1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 1, 2])
    measured = judge(data, algo(Estimator.grpo, min_group_success=0.1, max_group_success=0.9))
    assert data["valid"].tolist() == [[False, False]] * 4 + [[True, False], [True, True]]
    assert torch.equal(data["mask"].any(dim=3).any(dim=2), data["valid"])
    assert measured["rollout/left_out"] == pytest.approx(4 / 6)


def test_a_bound_that_is_a_groups_own_rate_keeps_it() -> None:
    data = rollout([1.0, 0.0, 0.0], [1, 1, 1], [1, 1, 1])
    judge(data, algo(Estimator.grpo, min_group_success=1 / 3))
    assert bool(data["valid"].all())


def test_where_nothing_is_left_a_row_stays_that_does_not_count() -> None:
    data = rollout([0.0, 0.0], [1, 1], [2, 2])
    judge(data, algo(Estimator.grpo, min_group_success=0.1))
    assert int(data["valid"].sum()) == 1
    assert not data["mask"].any()


def test_reinforce_pp_by_hand() -> None:
    # Outcomes 1 and 0 with one and three decisions: mean 1/4, deviation sqrt(3)/4.
    data = rollout([1.0, 0.0], [1, 2], [1, 3])
    judge(data, algo(Estimator.reinforce_pp, group_size=1))
    assert data["advantage"][0, 0].item() == pytest.approx(3**0.5)
    assert data["advantage"][1].tolist() == pytest.approx([-(3**-0.5)] * 3)


def test_clones_are_made_of_successes_or_of_the_best_of_each_state() -> None:
    for estimator, kept in ((Estimator.success, [True, True, False]), (Estimator.best_of_n, [False, True, False])):
        data = rollout([1.0, 1.0, 0.0], [1, 1, 2], [2, 1, 1])
        judge(data, algo(estimator, objective=Objective.clone))
        assert data["valid"][:, 0].tolist() == kept


class OfTwo(Group):
    """One of two ranks, whose messages are known beforehand."""

    def __init__(self, rank: int, parts: list[Any]) -> None:
        self.rank, self.size, self._parts = rank, 2, parts

    def gather(self, message: Any) -> list[Any]:
        assert message == self._parts[self.rank]
        return self._parts


def test_a_group_that_two_ranks_share_is_one_group() -> None:
    outcomes, states, lengths = [1.0, 0.0, 0.0, 1.0, 1.0], [1, 1, 1, 2, 2], [1, 2, 1, 1, 2]
    config = algo(Estimator.grpo, max_group_success=0.9)
    whole = rollout(outcomes, states, lengths)
    judge(whole, config)
    cuts = [slice(0, 2), slice(2, 5)]
    parts = [[outcomes[cut], states[cut], lengths[cut], [x > 0 for x in outcomes[cut]]] for cut in cuts]
    for rank, cut in enumerate(cuts):
        own = rollout(outcomes[cut], states[cut], lengths[cut])
        measured = judge(own, config, OfTwo(rank, parts))
        torch.testing.assert_close(own["advantage"], whole["advantage"][cut])
        assert torch.equal(own["valid"], whole["valid"][cut])
        assert measured["rollout/left_out"] == pytest.approx(2 / 5)


def test_attempts_at_a_state_follow_each_other() -> None:
    assert repeat_states([4, 9], 3) == [4, 4, 4, 9, 9, 9]
