"""The clipped PPO objective for action chunks, with a critic that cannot move the backbone."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Scalar = Float[Tensor, ""]
Reduction = Literal["elementwise", "sum", "mean", "sqrt"]


class PPOLoss(NamedTuple):
    """What one minibatch produced; only ``total`` carries a gradient."""

    total: Scalar
    policy: Scalar
    value: Scalar
    clip_fraction: Scalar
    ratio_error: Scalar
    """Largest |ratio - 1| of a valid entry: 0 before the first step of an update, or something is wrong."""


class Totals(NamedTuple):
    """How many things a minibatch averages over that is shared out among several learners."""

    entries: float
    """What `count_entries` finds, summed over the learners."""
    rows: float
    """Decisions."""


def count_entries(mask: Bool[Tensor, "M H K"], reduction: Reduction) -> int:
    """How many ratios of a minibatch count: entries with ``elementwise``, else decisions with a valid entry."""
    counts = mask if reduction == "elementwise" else mask.any(dim=2).any(dim=1)
    return int(counts.sum())


def chunk_log_ratio(
    log_prob: Float[Tensor, "M H K"],
    old_log_prob: Float[Tensor, "M H K"],
    mask: Bool[Tensor, "M H K"],
    reduction: Reduction,
) -> tuple[Float[Tensor, "M *entries"], Bool[Tensor, "M *entries"]]:
    """Log-ratios on which the clip acts, and which of them count.

    ``sum`` is the chunk's own log-ratio (Qwen-VLA's), ``mean`` and ``sqrt`` divide it by n and sqrt(n)
    valid entries, ``elementwise`` keeps one ratio and one clip per entry. The choice decides what a clip of
    0.2 means: with 112 entries, each shifted by 0.05 s, ``sum`` puts 71% of the ratios outside 1 +- 0.2 and
    ``mean`` none.
    """
    log_ratio = (log_prob - old_log_prob) * mask
    if reduction == "elementwise":
        return log_ratio, mask
    num_valid = mask.sum(dim=(1, 2))
    total = log_ratio.sum(dim=(1, 2))
    if reduction == "mean":
        total = total / num_valid.clamp(min=1)
    elif reduction == "sqrt":
        total = total / num_valid.clamp(min=1).sqrt()
    elif reduction != "sum":
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(get_args(Reduction))}.")
    return total, num_valid > 0


def ppo_loss(
    *,
    log_prob: Float[Tensor, "M H K"],
    old_log_prob: Float[Tensor, "M H K"],
    mask: Bool[Tensor, "M H K"],
    advantage: Float[Tensor, " M"],
    value: Float[Tensor, " M"],
    old_value: Float[Tensor, " M"],
    value_target: Float[Tensor, " M"],
    reduction: Reduction,
    clip_epsilon: float,
    value_clip: float | None,
    value_coef: float,
    behaviour_weight: Float[Tensor, "M *entries"] | None = None,
    totals: Totals | None = None,
    clip_power: Float[Tensor, " M"] | None = None,
    clip_epsilon_high: float | None = None,
) -> PPOLoss:
    """PPO-clip and the clipped value error (arXiv:1707.06347, eqs. 7 and 9).

    One row is one decision, that is one action chunk with a single advantage.

    Args:
        log_prob: of every entry of the stored transition, under the current policy.
        old_log_prob: the same under the policy that collected it.
        mask: valid entries: no padding, and executed.
        advantage: already normalised over the whole batch, if it should be.
        value: critic output on detached features.
        old_value: critic output when the decision was taken.
        value_target: GAE return.
        reduction: see `chunk_log_ratio`.
        clip_epsilon: half-width of the trust region on the ratio, in (0, 1).
        value_clip: the value may move this far from ``old_value`` before its gradient stops; None never.
        value_coef: weight of the value error in ``total``.
        behaviour_weight: of `behaviour_weight`, where ``old_log_prob`` is not of the policy that collected.
        totals: of the minibatch that these rows are a part of; None where they are all of it. The results of all parts
            then add up to those of the whole, ``ratio_error`` apart.
        clip_power: of `rlvla_algos.clip.clip_power`: the bounds are raised to it. None leaves them.
        clip_epsilon_high: half-width above 1, where it is another one than below: a larger one lets what was unlikely
            and good become likely (DAPO's clip-higher, arXiv:2503.14476).
    """
    high = clip_epsilon if clip_epsilon_high is None else clip_epsilon_high
    log_ratio, counts = chunk_log_ratio(log_prob, old_log_prob, mask, reduction)
    ratio = log_ratio.exp()
    # A ratio to the power 1 / p is inside the bounds where the ratio is inside the bounds to the power p.
    power = None if clip_power is None else clip_power.reshape(-1, *[1] * (ratio.ndim - 1))
    rooted = ratio if power is None else (log_ratio / power).exp()
    clipped = rooted.clamp(1 - clip_epsilon, 1 + high)
    if power is not None:
        clipped = clipped**power
    weight = advantage.reshape(-1, *[1] * (ratio.ndim - 1))
    if behaviour_weight is not None:
        weight = weight * behaviour_weight
    num_counted = counts.sum().clamp(min=1) if totals is None else max(1.0, totals.entries)
    policy = -(torch.minimum(ratio * weight, clipped * weight) * counts).sum() / num_counted

    value_error = value_loss(value, old_value, value_target, value_clip, totals)
    away = (ratio - 1).abs() * counts
    outside = ((rooted - 1 > high) | (1 - rooted > clip_epsilon)) & counts
    return PPOLoss(
        total=policy + value_coef * value_error,
        policy=policy.detach(),
        value=value_error.detach(),
        clip_fraction=(outside.sum() / num_counted).detach(),
        ratio_error=away.max().detach(),
    )


def value_loss(
    value: Float[Tensor, " M"],
    old_value: Float[Tensor, " M"],
    value_target: Float[Tensor, " M"],
    value_clip: float | None,
    totals: Totals | None = None,
) -> Scalar:
    """Half the mean squared error of the critic, clipped (arXiv:1707.06347, eq. 9); arguments as in `ppo_loss`."""
    error = (value - value_target).square()
    if value_clip is not None:
        near_old = old_value + (value - old_value).clamp(-value_clip, value_clip)
        error = torch.maximum(error, (near_old - value_target).square())
    return 0.5 * (error.mean() if totals is None else error.sum() / totals.rows)


def behaviour_weight(
    proximal_log_prob: Float[Tensor, "M H K"],
    behaviour_log_prob: Float[Tensor, "M H K"],
    mask: Bool[Tensor, "M H K"],
    reduction: Reduction,
    max_weight: float,
) -> Float[Tensor, "M *entries"]:
    """min(pi_proximal / pi_behaviour, ``max_weight``): what stale data counts in the decoupled objective.

    The ratio that is clipped is that to the proximal policy, the weights at the start of the update; this factor turns
    the expectation over what the older behaviour policy did into one over what the proximal one would have done
    (arXiv:2110.00641, eq. 2). The bound keeps its variance finite.
    """
    log_ratio, _ = chunk_log_ratio(proximal_log_prob, behaviour_log_prob, mask, reduction)
    return log_ratio.exp().clamp(max=max_weight)


def moments(values: Float[Tensor, " M"]) -> tuple[Scalar, Scalar]:
    """Mean and standard deviation of all there is."""
    return values.mean(), values.std(correction=0)


def variance(values: Float[Tensor, " M"]) -> Scalar:
    """Of all there is."""
    return values.var(correction=0)


def normalize_advantage(
    advantage: Float[Tensor, "..."],
    valid: Bool[Tensor, "..."],
    moments: Callable[[Tensor], tuple[Tensor, Tensor]] = moments,
) -> Float[Tensor, "..."]:
    """Zero mean and unit variance over the valid decisions of the whole batch; 0 elsewhere.

    Args:
        moments: mean and standard deviation of the valid ones; another function where other learners hold a part.
    """
    mean, deviation = moments(advantage[valid])
    return torch.where(valid, (advantage - mean) / (deviation + 1e-8), 0.0)


def explained_variance(
    prediction: Float[Tensor, " M"],
    target: Float[Tensor, " M"],
    variance: Callable[[Tensor], Tensor] = variance,
) -> float:
    """1 - Var(target - prediction) / Var(target): 1 is a perfect critic, 0 a constant one.

    Args:
        variance: another function where other learners hold a part of the predictions.
    """
    of_target, of_error = variance(target), variance(target - prediction)
    if of_target == 0:
        return float("nan")
    return float(1 - of_error / of_target)
