"""Generalized advantage estimation over action chunks."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def generalized_advantage_estimate(
    *,
    reward: Float[Tensor, "B T"],
    value: Float[Tensor, "B T"],
    next_value: Float[Tensor, "B T"],
    terminated: Bool[Tensor, "B T"],
    done: Bool[Tensor, "B T"],
    discount: Float[Tensor, "B T"],
    gae_lambda: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """GAE(lambda) where one decision is one action chunk (arXiv:1506.02438, eq. 16).

        delta = r + discount (1 - terminated) V(next) - V,    trace = discount lambda (1 - done).

    ``terminated`` stops the bootstrap, ``done`` (terminated or truncated) stops the trace: a success and
    a time limit inside one chunk must not bootstrap, and a time limit alone must.

    Args:
        reward: what happened while the chunk ran.
        value: V of the observation the chunk was chosen from.
        next_value: V of the observation it led to, before any reset.
        terminated: the task ended, there is no future to bootstrap.
        done: the episode ended.
        discount: of one decision, in [0, 1]: gamma, or gamma to the power of the executed steps.
        gae_lambda: 0 is the one-step error, 1 the Monte Carlo return.

    Returns:
        ``(advantage, value_target)``, with ``value_target = advantage + value``.
    """
    delta = reward + discount * next_value * ~terminated - value
    trace = discount * gae_lambda * ~done
    advantage = torch.empty_like(delta)
    running = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + trace[:, t] * running
        advantage[:, t] = running
    return advantage, advantage + value
