"""The supervised objective of a flow-matching policy."""

from jaxtyping import Bool, Float
from torch import Tensor

Chunk = Float[Tensor, "B H K"]


def interpolate(action: Chunk, noise: Chunk, tau: Float[Tensor, " B"]) -> Chunk:
    """Y_tau = (1 - tau) Y_0 + tau Y_1: the straight path the flow is trained on."""
    tau = tau[:, None, None]
    return (1 - tau) * action + tau * noise


def flow_matching_loss(
    velocity: Chunk,
    action: Chunk,
    noise: Chunk,
    mask: Bool[Tensor, "B H K"],
) -> Float[Tensor, ""]:
    """Squared error of the velocity, averaged over valid steps first, over active channels second.

    Qwen-VLA, equations 1 and 2: per channel the mean over its valid time steps, then the plain mean over the
    channels that have any. So a control mode with few channels, or a channel with few valid steps, weighs
    as much as any other, and padding has no gradient.

    Args:
        velocity: v(Y_tau, tau).
        action: Y_0, normalised.
        noise: Y_1.
        mask: True where an entry is neither padding nor past the end of its episode. A row with no valid
            entry counts 0.
    """
    error = (velocity - (noise - action)).square() * mask
    valid_steps = mask.sum(dim=1)
    per_channel = error.sum(dim=1) / valid_steps.clamp(min=1)
    return (per_channel.sum(dim=1) / (valid_steps > 0).sum(dim=1).clamp(min=1)).mean()
