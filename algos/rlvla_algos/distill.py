"""Staying near a frozen teacher: the divergence of one denoising step, and a coefficient that keeps it at a target.

Of two flows, student and teacher see the same Y_tau and take the same step of the same schedule, so they differ in the
mean alone:

    mean(v) = w0 (Y_tau - tau v) + w1 (Y_tau + (1 - tau) v),    d mean / d v = g = (1 - tau) w1 - tau w0,
    KL = |mean - mean_T|^2 / (2 s^2) = g^2 / (2 s^2) |v - v_T|^2.

For the flow SDE g = -dt (1 + a^2 / 2) at 0 < tau < 1, so the factor is dt (1 + a^2 / 2)^2 (1 - tau) / (2 a^2 tau). At
tau = 1 it is dt^2 / (2 a^2).

Of two language models the divergence is that of their next tokens, KL(teacher || student), summed over the vocabulary.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlvla_algos.flow import Schedule
from rlvla_algos.ppo import Reduction, Scalar, Totals, chunk_log_ratio

STEER = 1.5
"""The coefficient moves by this factor when the divergence leaves [target / 1.5, target * 1.5]."""
RANGE = 100.0
"""It stays within this factor of where it started, so that a run that begins at its teacher, and needs no pull for a
while, finds the way back."""


Distance = Literal["kl", "velocity"]
"""Nats, or squared difference of velocities: the first pulls hardest at the last steps, the second at all alike."""


def velocity_gain(schedule: Schedule, step: Int[Tensor, " B"]) -> Float[Tensor, "B 1 1"]:
    """g: how far a unit of velocity moves the mean of each row's step. Negative, as flow time runs down."""
    tau, _, w0, w1, _ = schedule.at(step)
    return ((1 - tau) * w1 - tau * w0)[:, None, None]


def kl_per_velocity(schedule: Schedule, step: Int[Tensor, " B"]) -> Float[Tensor, "B 1 1"]:
    """g^2 / (2 s^2): nats for each unit of squared difference of velocities."""
    return velocity_gain(schedule, step).square() / (2 * schedule.at(step).std[:, None, None].square())


def step_distance(
    *,
    mean: Float[Tensor, "M H K"],
    teacher_mean: Float[Tensor, "M H K"],
    step: Int[Tensor, " M"],
    schedule: Schedule,
    distance: Distance,
) -> Float[Tensor, "M H K"]:
    """How far a denoising step of the student is from the teacher's, entry by entry.

    Args:
        mean: of the stored transition under the student.
        teacher_mean: the same under the teacher.
    """
    difference = (mean - teacher_mean).square()
    if distance == "kl":
        return difference / (2 * schedule.at(step).std[:, None, None].square())
    if distance == "velocity":
        return difference / velocity_gain(schedule, step).square()
    raise ValueError(f"distance is {distance!r}; it must be one of {', '.join(get_args(Distance))}.")


def distillation_loss(
    *,
    distances: Float[Tensor, "M H K"],
    mask: Bool[Tensor, "M H K"],
    weight: Float[Tensor, " M"],
    reduction: Reduction,
    totals: Totals | None = None,
) -> Scalar:
    """Mean of a minibatch's weighted distances to the teacher.

    Entries are reduced as `rlvla_algos.ppo.chunk_log_ratio` reduces log-ratios, and averaged over as many. So in nats a
    coefficient has one meaning under ``elementwise`` and ``sum``: that of the objective E[A] - coefficient KL.

    Args:
        distances: of every entry.
        mask: valid entries.
        weight: of each decision, 0 or more.
        totals: as in `rlvla_algos.ppo.ppo_loss`.
    """
    distances, counts = chunk_log_ratio(distances, torch.zeros_like(distances), mask, reduction)
    weighted = distances * weight.reshape(-1, *[1] * (distances.ndim - 1))
    return (weighted * counts).sum() / (counts.sum().clamp(min=1) if totals is None else max(1.0, totals.entries))


def token_kl(logits: Float[Tensor, "N V"], teacher_logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(teacher || student) of next-token distributions, exact over the vocabulary, in nats.

    Examples:
        >>> token_kl(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log())
        tensor([0.1308])
    """
    wanted = teacher_logits.log_softmax(dim=-1)
    return (wanted.exp() * (wanted - logits.log_softmax(dim=-1))).sum(dim=-1)


def steer_coefficient(coefficient: float, kl: float, target: float, start: float) -> float:
    """The coefficient of the next update: times 1.5 where the divergence lies above 1.5 times its target, divided by it
    where it lies below target / 1.5 (PPO's adaptive penalty, arXiv:1707.06347, section 4, with a smaller factor).

    Args:
        kl: to the teacher, after this update.
        start: the first coefficient, positive.
    """
    if kl > STEER * target:
        coefficient *= STEER
    elif kl < target / STEER:
        coefficient /= STEER
    return min(max(coefficient, start / RANGE), start * RANGE)
