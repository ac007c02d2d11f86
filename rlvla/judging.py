"""How episodes are judged without a critic (`rlvla.config.Estimator`), and which of them an update learns from."""

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from rlvla.config import AlgoConfig, Estimator
from rlvla.ranks import ALONE, Group
from rlvla_algos.episodes import best_of_group, group_mean, grpo_advantage, rloo_advantage
from rlvla_algos.ppo import normalize_advantage


def repeat_states(states: Sequence[int], times: int) -> list[int]:
    """The initial states of an iteration, each ``times`` times in a row: the attempts of a group."""
    return [state for state in states for _ in range(times)]


def judge(rollout: TensorDict, algo: AlgoConfig, group: Group = ALONE) -> dict[str, float]:
    """Put ``advantage`` into a rollout by comparing whole episodes of all ranks, and take those that are not to be
    learnt from out of ``valid`` and ``mask``.

    Episodes of one initial state are a group, on whatever ranks they were played and however many were lost with their
    simulators. There is no critic, so ``value_target`` is 0.

    Returns:
        Numbers for metrics.jsonl, of all ranks.
    """
    valid = rollout["valid"]
    own = [
        rollout["next", "reward"].sum(dim=1).tolist(),
        rollout["initial_state"][:, 0].tolist(),
        rollout["next", "executed_steps"].sum(dim=1).tolist(),
        rollout["next", "success"].any(dim=1).tolist(),
    ]
    parts = group.gather(own)
    outcome, state, steps, success = ([x for part in parts for x in part[column]] for column in range(4))
    # In double precision: what a mean over ranks rounds to must not depend on how they share the episodes.
    whole = torch.tensor(outcome, dtype=torch.float64)
    number = torch.tensor(state)
    advantage, keep = _judged(whole, number, torch.tensor(steps), torch.tensor(success), algo)
    first = sum(len(part[0]) for part in parts[: group.rank])
    mine = slice(first, first + len(rollout))
    _keep(rollout, keep[mine].to(valid.device))
    spread = advantage[mine].to(valid.device, torch.float64)[:, None].expand(rollout.batch_size).clone()
    if algo.estimator is Estimator.reinforce_pp:
        spread = normalize_advantage(spread, rollout["valid"], group.moments)
    reward = rollout["next", "reward"]
    rollout["advantage"] = torch.where(rollout["valid"], spread, torch.zeros_like(spread)).to(reward.dtype)
    rollout["value_target"] = torch.zeros_like(reward)
    return {"rollout/left_out": 1 - float(keep.float().mean())}


def _judged(outcome: Tensor, state: Tensor, steps: Tensor, success: Tensor, algo: AlgoConfig) -> tuple[Tensor, Tensor]:
    """Advantage of each episode, and which of them are learnt from."""
    match algo.estimator:
        case Estimator.grpo:
            advantage = grpo_advantage(outcome, state)
        case Estimator.rloo:
            advantage = rloo_advantage(outcome, state)
        case Estimator.reinforce_pp:
            advantage = outcome - group_mean(outcome, state) if algo.group_size > 1 else outcome
        case Estimator.success:
            return torch.ones_like(outcome), success
        case Estimator.best_of_n:
            return torch.ones_like(outcome), best_of_group(outcome, steps, state)
        case _:
            raise ValueError(f"{algo.estimator.value} judges decisions and not episodes.")
    rate = group_mean(success.float(), state)
    # Rates are multiples of 1 / n: a bound that is one of them must not be missed by its last bit.
    slack = 1e-6
    return advantage, (rate >= algo.min_group_success - slack) & (rate <= algo.max_group_success + slack)


def _keep(rollout: TensorDict, keep: Tensor) -> None:
    """Take the other episodes out. A rank that would be left without a row keeps one whose entries do not count,
    because the others wait for its part of each minibatch."""
    kept = rollout["valid"] & keep[:, None]
    rollout["mask"] = rollout["mask"] & kept[..., None, None]
    if not bool(kept.any()):
        kept[0, 0] = True
    rollout["valid"] = kept
