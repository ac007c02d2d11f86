"""The policy's and the critic's loss on a minibatch, whatever the objective (`rlvla.config.Objective`)."""

from tensordict import TensorDict
from torch import Tensor

from rlvla.config import AlgoConfig, Objective
from rlvla.forward_sampler import VELOCITY
from rlvla.samplers import Likelihood
from rlvla_algos.forward_process import cloning_loss, nft_loss, nft_weight
from rlvla_algos.ppo import PPOLoss, Totals, ppo_loss, value_loss


def objective_loss(
    config: AlgoConfig,
    likelihood: Likelihood,
    value: Tensor,
    batch: TensorDict,
    totals: Totals | None,
    clip_power: Tensor | None,
) -> PPOLoss:
    """What one minibatch, or this rank's part of it, gives to the loss.

    Args:
        value: of the critic as it is now; without a critic it gets no gradient.
        totals: as in `ppo_loss`, and so is ``clip_power``.
    """
    value_coef = config.value_coef if config.has_critic else 0.0
    if config.objective in (Objective.ppo, Objective.fpo):
        return ppo_loss(
            log_prob=likelihood.log_prob,
            old_log_prob=batch["log_prob"],
            mask=batch["mask"],
            advantage=batch["advantage"],
            value=value,
            old_value=batch["state_value"],
            value_target=batch["value_target"],
            reduction=config.reduction.value,
            clip_epsilon=config.clip_epsilon,
            clip_epsilon_high=config.clip_epsilon_high,
            value_clip=config.value_clip,
            value_coef=value_coef,
            behaviour_weight=batch.get("behaviour_weight"),
            totals=totals,
            clip_power=clip_power,
        )
    entries = None if totals is None else totals.entries
    if config.objective is Objective.nft:
        forward = batch["forward"]
        policy = nft_loss(
            velocity=likelihood.parameters[VELOCITY],
            old_velocity=forward["velocity"],
            action=forward["action"],
            noise=forward["noise"],
            mask=batch["mask"],
            weight=nft_weight(batch["advantage"], config.forward.nft_max_advantage),
            beta=config.forward.nft_beta,
            entries=entries,
        )
    else:
        policy = cloning_loss(likelihood.log_prob, batch["mask"], entries)
    error = value_loss(value, batch["state_value"], batch["value_target"], config.value_clip, totals)
    none = policy.detach().new_zeros(())
    return PPOLoss(policy + value_coef * error, policy.detach(), error.detach(), none, none)
