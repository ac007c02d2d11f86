"""The learner: epochs of minibatches of one loss, a trust region measured exactly, and checks that fail loudly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rlvla.acting import bind
from rlvla.config import AlgoConfig, LRSchedule
from rlvla.policies.base import Context, FlowPolicy, ValueHead
from rlvla.seeding import Stream, keyed_rng
from rlvla_algos.flow import GaussianStep, Schedule, check_flow_sde, gaussian_kl, transition
from rlvla_algos.ppo import behaviour_weight, explained_variance, ppo_loss

KL_STEER = 1.5
"""The learning rate moves by this factor when the KL leaves [target / 1.5, target * 1.5]."""


class InvariantError(RuntimeError):
    """A check that every run makes by itself failed: the gradients would be wrong. The message has advice."""


@dataclass
class Forward:
    """One pass over a minibatch: the Gaussian of the stored transition, and the value."""

    gaussian: GaussianStep
    log_prob: Tensor
    value: Tensor


class Learner:
    """Owns the optimizer of a policy and its value head."""

    def __init__(
        self,
        policy: FlowPolicy,
        value_head: ValueHead,
        config: AlgoConfig,
        schedule: Schedule,
        *,
        seed: int,
        total_iterations: int,
    ) -> None:
        self.policy, self.value_head, self.config = policy, value_head, config
        self.schedule, self.seed, self.total_iterations = schedule, seed, total_iterations
        check_flow_sde(schedule, policy.num_denoising_steps)
        groups = policy.parameter_groups()
        trained = ["expert", "vlm"] if config.train_vlm else ["expert"]
        for name, parameters in groups.items():
            for parameter in parameters:
                parameter.requires_grad_(name in trained)
        rates = {"expert": config.policy_lr, "vlm": config.vlm_lr}
        self._policy_parameters = [p for name in trained for p in groups[name]]
        self._policy_optimizer = torch.optim.Adam(
            [{"params": groups[name], "lr": rates[name], "initial_lr": rates[name]} for name in trained],
            eps=1e-5,
        )
        # An optimizer of its own: in a critic-only update Adam's momentum must not move the policy.
        self._value_optimizer = torch.optim.Adam(value_head.parameters(), lr=config.value_lr, eps=1e-5)
        self._lr_scale = 1.0

    @property
    def policy_lr(self) -> float:
        return float(self._policy_optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights that an update changes: tensors and numbers only."""
        return {
            "value_head": self.value_head.state_dict(),
            "policy_optimizer": self._policy_optimizer.state_dict(),
            "value_optimizer": self._value_optimizer.state_dict(),
            "lr_scale": self._lr_scale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; the policy's weights are loaded by whoever owns them."""
        self.value_head.load_state_dict(state["value_head"])
        self._policy_optimizer.load_state_dict(state["policy_optimizer"])
        self._value_optimizer.load_state_dict(state["value_optimizer"])
        self._lr_scale = float(state["lr_scale"])

    def target_kl(self, iteration: int) -> float:
        """Linear from ``target_kl`` in the first iteration to ``final_target_kl`` in the last."""
        first, last = self.config.target_kl, self.config.final_target_kl
        if last is None:
            return first
        return first + (last - first) * min(1.0, iteration / max(1, self.total_iterations - 1))

    def update(self, rollout: TensorDict, iteration: int) -> dict[str, float]:
        """One PPO update on a rollout that has ``advantage`` and ``value_target``.

        Decisions of older weights (``version`` below ``iteration``) are learnt from by the decoupled objective
        (`behaviour_weight`).

        Raises:
            InvariantError: the learner does not score the rollout's own actions as the rollout did. Of stale decisions
                this cannot be told.
        """
        data = rollout[rollout["valid"]]
        self._set_learning_rate(iteration)
        version = data.get("version")
        if version is not None and bool((version < iteration).any()):
            self._add_proximal(data)
        else:
            self._check_before(data)
        successes = int(data["next", "success"].sum())
        episodes = len(rollout)
        reason = self.critic_only_reason(iteration, successes, episodes)
        metrics = self._critic_epochs(data, iteration) if reason else self._ppo_epochs(data, iteration)
        kl, per_step = self._measure_kl(data) if not reason else (0.0, {})
        if not reason:
            self._steer(kl, self.target_kl(iteration))
        valid = rollout["valid"]
        return {
            **metrics,
            "ppo/kl": kl,
            **per_step,
            "ppo/critic_only": float(bool(reason)),
            "value/explained_variance": explained_variance(
                rollout["state_value"][valid], rollout["value_target"][valid]
            ),
            "ppo/target_kl": self.target_kl(iteration),
            "optim/policy_lr": self.policy_lr,
        }

    def critic_only_reason(self, iteration: int, successes: int, episodes: int) -> str:
        """Why this update must leave the policy alone; empty when it need not."""
        config = self.config
        if iteration < config.critic_only_iterations:
            return "the critic has seen nothing yet"
        if min(successes, episodes - successes) < config.min_successes:
            return f"{successes} successes in {episodes} episodes carry no signal"
        return ""

    def forward(self, batch: TensorDict) -> Forward:
        """One pass gives log-probability and value. The stored context is used where the backbone is frozen."""
        if "context" in batch:
            context = Context.from_tensordict(batch["context"])
        else:
            context = self.policy.encode(batch["batch"])
        tau = self.schedule.at(batch["step"]).tau
        velocity = bind(self.policy, context)(batch["before"], tau, batch["step"])
        gaussian = transition(batch["before"], velocity, batch["step"], self.schedule)
        value = self.value_head(self.policy.value_features(context))
        return Forward(gaussian, gaussian.log_prob(batch["after"]), value)

    def _ppo_epochs(self, data: TensorDict, iteration: int) -> dict[str, float]:
        config = self.config
        sums: dict[str, float] = {}
        num_batches = 0
        for epoch in range(config.epochs):
            epoch_kl, batches = 0.0, self._minibatches(data, iteration, epoch)
            for batch in batches:
                new = self.forward(batch)
                loss = ppo_loss(
                    log_prob=new.log_prob,
                    old_log_prob=batch["log_prob"],
                    mask=batch["mask"],
                    advantage=batch["advantage"],
                    value=new.value,
                    old_value=batch["state_value"],
                    value_target=batch["value_target"],
                    reduction=config.reduction.value,
                    clip_epsilon=config.clip_epsilon,
                    value_clip=config.value_clip,
                    value_coef=config.value_coef,
                    behaviour_weight=batch.get("behaviour_weight"),
                )
                self._policy_optimizer.zero_grad(set_to_none=True)
                self._value_optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss.total)
                norm = nn.utils.clip_grad_norm_(self._policy_parameters, config.max_grad_norm)
                if not torch.isfinite(norm):
                    raise InvariantError(
                        f"the policy gradient is not finite in epoch {epoch}. Lower algo.policy_lr "
                        f"(now {self.policy_lr:g}) or algo.target_kl ({config.target_kl:g})."
                    )
                self._policy_optimizer.step()
                self._value_optimizer.step()
                with torch.no_grad():
                    kl = gaussian_kl(new.gaussian.mean, batch["mean"], new.gaussian.std, batch["mask"]).mean()
                epoch_kl += float(kl)
                num_batches += 1
                for name, value in (
                    ("loss/policy", loss.policy),
                    ("loss/value", loss.value),
                    ("ppo/clip_fraction", loss.clip_fraction),
                    ("optim/grad_norm", norm),
                ):
                    sums[name] = sums.get(name, 0.0) + float(value)
            if epoch_kl / len(batches) > config.kl_stop_factor * self.target_kl(iteration):
                break
        return {
            **{name: total / num_batches for name, total in sums.items()},
            "ppo/epochs": epoch + 1.0,
            **self._checked,
        }

    def _critic_epochs(self, data: TensorDict, iteration: int) -> dict[str, float]:
        total, count = 0.0, 0
        for epoch in range(self.config.epochs):
            for batch in self._minibatches(data, iteration, epoch):
                with torch.no_grad():
                    features = self._features(batch)
                loss = 0.5 * (self.value_head(features) - batch["value_target"]).square().mean()
                self._value_optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                self._value_optimizer.step()
                total, count = total + float(loss.detach()), count + 1
        return {"loss/value": total / count, "ppo/epochs": float(self.config.epochs), **self._checked}

    def _features(self, batch: TensorDict) -> Tensor:
        context = (
            Context.from_tensordict(batch["context"]) if "context" in batch else self.policy.encode(batch["batch"])
        )
        return self.policy.value_features(context)

    @torch.no_grad()
    def _add_proximal(self, data: TensorDict) -> None:
        """Score stale decisions by the weights as they are now, which are the centre of the trust region."""
        news = [self.forward(batch) for batch in data.split(self.config.minibatch_size)]
        proximal = torch.cat([new.log_prob for new in news])
        weight = behaviour_weight(
            proximal,
            data["log_prob"],
            data["mask"],
            self.config.reduction.value,
            self.config.max_behaviour_weight,
        )
        data["behaviour_weight"] = weight
        data["log_prob"] = proximal
        data["mean"] = torch.cat([new.gaussian.mean for new in news])
        counted = data["mask"] if weight.ndim == 3 else torch.ones_like(weight, dtype=torch.bool)
        self._checked = {"ppo/behaviour_weight": float(weight[counted].mean())}

    def _minibatches(self, data: TensorDict, iteration: int, epoch: int) -> list[TensorDict]:
        """A keyed permutation in equal parts: a small last minibatch would be a noisy step of full size."""
        order = keyed_rng(self.seed, Stream.MINIBATCH, iteration, epoch).permutation(len(data))
        parts = np.array_split(order, max(1, round(len(data) / self.config.minibatch_size)))
        return [data[torch.from_numpy(part).to(data.device)] for part in parts]

    @torch.no_grad()
    def _check_before(self, data: TensorDict) -> None:
        """Before the first step the learner must score the rollout exactly as the rollout did.

        The means are compared as well as the ratios: log-probabilities recomputed by the learner agree with each other
        even when both use the wrong time grid; means stored by the rollout do not.
        """
        for name in ("advantage", "value_target", "log_prob"):
            if not torch.isfinite(data[name]).all():
                raise InvariantError(
                    f"{name} is not finite for {int((~torch.isfinite(data[name])).sum())} entries of the rollout. "
                    "Look at the rewards and values in metrics.jsonl, or lower algo.value_lr."
                )
        training = (
            [n for n, m in self.policy.named_modules() if m.training] if isinstance(self.policy, nn.Module) else []
        )
        if training:
            raise InvariantError(
                f"{training[0] or 'the policy'} is in training mode, so dropout may be on and no ratio means anything. "
                "Call policy.eval(); gradients do not need training mode."
            )
        batch = data[: self.config.minibatch_size]
        new = self.forward(batch)
        mask = batch["mask"]
        gap = (((new.gaussian.mean - batch["mean"]) / new.gaussian.std).abs() * mask).max()
        ratio = ((new.log_prob - batch["log_prob"]).exp() - 1).abs() * mask
        self._checked = {"ppo/mean_error": float(gap), "ppo/ratio_error": float(ratio.max())}
        if not float(gap) < self.config.mean_tolerance:
            raise InvariantError(
                f"on the first minibatch the learner's transition mean differs from the rollout's by {float(gap):.3g} "
                f"standard deviations; algo.mean_tolerance is {self.config.mean_tolerance:g}. The two use different "
                "weights, time grids, noise schedules or numerics: check that both come from the same policy and "
                "the same algo.noise_level and policy.num_denoising_steps."
            )
        if not float(ratio.max()) < self.config.ratio_tolerance:
            raise InvariantError(
                f"on the first minibatch a ratio is off by {float(ratio.max()):.3g} from 1; algo.ratio_tolerance is "
                f"{self.config.ratio_tolerance:g}. The stored sample or log-probability is not what the sampler drew: "
                "clipping belongs to the simulator's copy only."
            )

    @torch.no_grad()
    def _measure_kl(self, data: TensorDict) -> tuple[float, dict[str, float]]:
        """Exact KL from the collecting policy, in nats per chunk: over everything, and per denoising step."""
        parts = [
            gaussian_kl(new.gaussian.mean, batch["mean"], new.gaussian.std, batch["mask"])
            for batch in data.split(self.config.minibatch_size)
            for new in [self.forward(batch)]
        ]
        kl = torch.cat(parts)
        step = data["step"]
        per_step = {
            f"ppo/kl_step_{k}": float(kl[step == k].mean())
            for k in range(self.schedule.num_steps)
            if bool((step == k).any())
        }
        return float(kl.mean()), per_step

    def _set_learning_rate(self, iteration: int) -> None:
        scale = self._lr_scale
        if self.config.lr_schedule is LRSchedule.cosine:
            scale = 0.5 * (1 + float(np.cos(np.pi * iteration / max(1, self.total_iterations))))
        for group in self._policy_optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale

    def _steer(self, kl: float, target: float) -> None:
        """Move the learning rate towards the KL target; a rate that suits iteration 1 collapses iteration 30."""
        if self.config.lr_schedule is not LRSchedule.kl:
            return
        if kl > KL_STEER * target:
            self._lr_scale /= KL_STEER
        elif kl < target / KL_STEER:
            self._lr_scale = min(self._lr_scale * KL_STEER, self.config.max_policy_lr / self.config.policy_lr)
