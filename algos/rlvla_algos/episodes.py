"""What an episode is worth without a critic: compared with other attempts at the same initial state.

An episode has one outcome, the undiscounted sum of its rewards, and all its decisions share one advantage. ``group`` is
the number of the initial state that an episode began in. Axis: E episodes.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def group_mean(values: Float[Tensor, " E"], group: Int[Tensor, " E"]) -> Float[Tensor, " E"]:
    """Mean over each episode's group, the episode among it."""
    return _sum(values, group) / _size(group)


def grpo_advantage(outcome: Float[Tensor, " E"], group: Int[Tensor, " E"]) -> Float[Tensor, " E"]:
    """(R - mean) / deviation over the attempts at one initial state (GRPO, arXiv:2402.03300).

    The deviation is the unbiased one. A group whose outcomes are all equal, and an episode that is alone in its group,
    have advantage 0.
    """
    away = outcome - group_mean(outcome, group)
    size = _size(group)
    deviation = (_sum(away.square(), group) / (size - 1).clamp(min=1)).sqrt()
    # Compared with a small number and not with 0: the mean of equal outcomes can be off in its last bit, and dividing
    # two rounding errors would give an advantage of 1.
    return torch.where(deviation > 1e-6, away / deviation.clamp(min=1e-6), torch.zeros_like(away))


def rloo_advantage(outcome: Float[Tensor, " E"], group: Int[Tensor, " E"]) -> Float[Tensor, " E"]:
    """R minus the mean of the other attempts (REINFORCE leave-one-out, arXiv:2402.14740).

        R_i - 1/(n-1) sum over j != i of R_j = n/(n-1) (R_i - mean)

    The baseline does not depend on the episode's own actions, so the expected gradient is that without one. An episode
    that is alone in its group has advantage 0.
    """
    size = _size(group)
    scale = torch.where(size > 1, size / (size - 1).clamp(min=1), torch.zeros_like(size))
    return scale * (outcome - group_mean(outcome, group))


def best_of_group(
    outcome: Float[Tensor, " E"], steps: Int[Tensor, " E"], group: Int[Tensor, " E"]
) -> Bool[Tensor, " E"]:
    """One episode of each group: that of the largest outcome, of those the shortest, of those the first. None of a
    group whose best outcome is not positive."""
    best = torch.zeros_like(outcome, dtype=torch.bool)
    for number in group.unique().tolist():
        episodes = (group == number).nonzero()[:, 0].tolist()
        chosen = min(episodes, key=lambda e: (-float(outcome[e]), int(steps[e]), e))
        best[chosen] = outcome[chosen] > 0
    return best


def _sum(values: Float[Tensor, " E"], group: Int[Tensor, " E"]) -> Float[Tensor, " E"]:
    _, number = group.unique(return_inverse=True)
    return torch.zeros_like(values).index_add_(0, number, values)[number]


def _size(group: Int[Tensor, " E"]) -> Float[Tensor, " E"]:
    return _sum(torch.ones(len(group), device=group.device), group)
