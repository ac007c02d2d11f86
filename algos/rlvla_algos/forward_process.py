"""Objectives on the forward process of a flow: noise is added to the actions that were executed, and the velocity is
compared with what SFT would have it be. No density of a denoising step is needed.

    Y_tau = (1 - tau) a + tau eps,    error = (v(Y_tau, tau) - (eps - a))^2,    n draws of (eps, tau) a decision.

Axes: M decisions, n draws, H actions in a chunk, K action channels.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from rlvla_algos.ppo import Scalar

Draws = Float[Tensor, "M n H K"]


def velocity_error(velocity: Draws, action: Float[Tensor, "M H K"], noise: Draws) -> Draws:
    """Squared error of the velocity, of each entry at each draw."""
    return (velocity - (noise - action[:, None])).square()


def surrogate_log_prob(velocity: Draws, action: Float[Tensor, "M H K"], noise: Draws) -> Float[Tensor, "M H K"]:
    """Minus the mean error over the draws: FPO's stand-in for a log-probability (arXiv:2507.21053).

    The flow-matching loss bounds the likelihood from below up to a constant, so exp(l_old - l_new) at equal draws takes
    the place of the ratio. It is no density: what is exact of a ratio (its mean of 1, say) is approximate of this one.
    """
    return -velocity_error(velocity, action, noise).mean(dim=1)


def nft_weight(advantage: Float[Tensor, " M"], max_advantage: float) -> Float[Tensor, " M"]:
    """Share of a decision that is a good example: r = 1/2 + 1/2 clip(A / max_advantage, -1, 1) (arXiv:2509.16117)."""
    return 0.5 + 0.5 * (advantage / max_advantage).clamp(-1, 1)


def nft_loss(
    *,
    velocity: Draws,
    old_velocity: Draws,
    action: Float[Tensor, "M H K"],
    noise: Draws,
    mask: Bool[Tensor, "M H K"],
    weight: Float[Tensor, " M"],
    beta: float,
    entries: float | None = None,
) -> Scalar:
    """Learn towards good examples and away from bad ones (DiffusionNFT, arXiv:2509.16117).

        r (v+ - target)^2 + (1 - r) (v- - target)^2
            v+ = (1 - beta) v_old + beta v,    v- = (1 + beta) v_old - beta v

    averaged over draws and entries inside ``mask``. At v = v_old its gradient is beta (2 r - 1) times that of the
    flow-matching loss: nothing at r = 1/2. v- is bounded by v_old on the other side, so that pushing away from a bad
    example costs more the further it goes.

    Args:
        old_velocity: at the same draws, of the policy that collected.
        weight: r in [0, 1], see `nft_weight`.
        beta: how far v+ and v- stand from the old velocity, positive. Smaller moves further.
        entries: valid ones of all learners' parts of the minibatch; None where this is all of it.
    """
    positive = (1 - beta) * old_velocity + beta * velocity
    negative = (1 + beta) * old_velocity - beta * velocity
    r = weight[:, None, None, None]
    error = r * velocity_error(positive, action, noise) + (1 - r) * velocity_error(negative, action, noise)
    counted = max(1.0, float(mask.sum()) if entries is None else entries)
    return (error.mean(dim=1) * mask).sum() / counted


def cloning_loss(log_prob: Float[Tensor, "M H K"], mask: Bool[Tensor, "M H K"], entries: float | None = None) -> Scalar:
    """Minus the mean log-probability of chosen decisions over entries inside ``mask``; of a flow `surrogate_log_prob`,
    which makes it the flow-matching loss.

    Args:
        entries: as in `nft_loss`.
    """
    counted = max(1.0, float(mask.sum()) if entries is None else entries)
    return -(log_prob * mask).sum() / counted
