"""The learner: epochs of minibatches of one loss, a trust region measured exactly, and checks that fail loudly."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlvla.config import AlgoConfig, ComputeConfig, LearnerStrategy, LRSchedule, Objective, Precision
from rlvla.cotraining import CoTraining
from rlvla.minibatches import Minibatch, minibatches, nothing, passes
from rlvla.objectives import objective_loss
from rlvla.parallel import context_of, hold
from rlvla.policies.base import ChunkPolicy, ValueHead, context_is_fixed, trained_groups
from rlvla.policies.groups import check_groups, group_rates, require_gradients, trained_parameters
from rlvla.ranks import ALONE, Group, naming_the_lost
from rlvla.reasoning import ReasoningTeacher
from rlvla.rounds import next_rows, recall
from rlvla.samplers import Likelihood, Sampler
from rlvla.seeding import Stream, keyed_rng
from rlvla.teachers import ActionTeacher
from rlvla_algos.clip import clip_power
from rlvla_algos.distill import distillation_loss, steer_coefficient
from rlvla_algos.ppo import Totals, behaviour_weight, count_entries, explained_variance

COARSER = {Precision.fp32: 1.0, Precision.bf16: 100.0}
"""What ``algo.mean_tolerance`` and ``algo.ratio_tolerance`` are multiplied by: in bfloat16 a velocity has an error of
half a percent, and how many rows are computed at once changes which."""
KL_STEER = 1.5
"""The learning rate moves by this factor when the KL leaves [target / 1.5, target * 1.5]."""


class InvariantError(RuntimeError):
    """A check that every run makes by itself failed: the gradients would be wrong. The message has advice."""


@dataclass
class Forward:
    """One pass over a minibatch."""

    likelihood: Likelihood
    value: Tensor
    auxiliary: Tensor
    """[M]: the policy's own losses, where they are asked for; else zeros."""

    @property
    def log_prob(self) -> Tensor:
        return self.likelihood.log_prob


class Learner:
    """Owns the optimizer of a policy and its value head.

    In a group of ranks each has its own episodes, and every number that decides anything is one of all ranks. So N
    ranks make the update that one makes, up to rounding.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        value_head: ValueHead,
        config: AlgoConfig,
        sampler: Sampler,
        *,
        seed: int,
        total_iterations: int,
        group: Group = ALONE,
        strategy: LearnerStrategy = LearnerStrategy.ddp,
        teacher: ActionTeacher | None = None,
        reasoning: ReasoningTeacher | None = None,
        cotraining: CoTraining | None = None,
        compute: ComputeConfig | None = None,
    ) -> None:
        self.compute = compute or ComputeConfig()
        self.policy, self.value_head, self.config = policy, value_head, config
        self.sampler, self.seed, self.total_iterations = sampler, seed, total_iterations
        self.group = group
        sampler.check(policy)
        if config.auxiliary_weight > 0:
            _check_auxiliary(policy, config)
        check_groups(policy, config.freeze, "algo.freeze")
        trained = trained_groups(policy, config.train_vlm, config.freeze)
        rates = group_rates(
            policy, trained, config.learning_rates, config.policy_lr, vlm=config.vlm_lr, key="algo.learning_rates"
        )
        require_gradients(policy, trained)
        self._held = hold(policy, group, strategy)
        # The value head is small and sees no gradient of the policy: every rank has all of it.
        group.equalize(value_head.parameters())
        groups = trained_parameters(self._held, trained)
        self._policy_parameters = [p for name in trained for p in groups[name]]
        self._policy_optimizer = torch.optim.Adam(
            [{"params": groups[name], "lr": rates[name], "initial_lr": rates[name]} for name in trained],
            eps=1e-5,
            # A third of the time on a CPU, and on a GPU no temporaries as large as what is trained.
            fused=True,
        )
        # An optimizer of its own: in a critic-only update Adam's momentum must not move the policy.
        self._value_optimizer = torch.optim.Adam(value_head.parameters(), lr=config.value_lr, eps=1e-5, fused=True)
        self._lr_scale = 1.0
        self.caution = 1.0
        """Factor on the policy's learning rates and its KL target, which a safeguard lowers."""
        self.teacher, self.reasoning, self.cotraining = teacher, reasoning, cotraining
        self._teacher_coef = config.teacher.coef

    @property
    def policy_lr(self) -> float:
        return float(self._policy_optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights that an update changes: tensors and numbers only, the same for any number
        of ranks. All ranks call it; what rank 0 gets is whole."""
        return {
            "value_head": self.value_head.state_dict(),
            "policy_optimizer": self._held.optimizer_state(self._policy_optimizer, keep=self.group.leads),
            "value_optimizer": self._value_optimizer.state_dict(),
            "lr_scale": self._lr_scale,
            **({"caution": self.caution} if self.caution != 1 else {}),
            **({"teacher_coef": self._teacher_coef} if self.teacher else {}),
            **({"reasoning_coef": self.reasoning.coef} if self.reasoning else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; whoever owns the policy has loaded its weights."""
        self._held.take()
        self.value_head.load_state_dict(state["value_head"])
        self._held.load_optimizer_state(self._policy_optimizer, state["policy_optimizer"])
        self._value_optimizer.load_state_dict(state["value_optimizer"])
        self._lr_scale = float(state["lr_scale"])
        self.caution = float(state.get("caution", 1.0))
        if self.teacher:
            self._teacher_coef = float(state["teacher_coef"])
        if self.reasoning:
            self.reasoning.coef = float(state["reasoning_coef"])

    def target_kl(self, iteration: int) -> float:
        """Linear from ``target_kl`` in the first iteration to ``final_target_kl`` in the last, times the caution."""
        first, last = self.config.target_kl, self.config.final_target_kl
        if last is None:
            return self.caution * first
        return self.caution * (first + (last - first) * min(1.0, iteration / max(1, self.total_iterations - 1)))

    def update(self, rollout: TensorDict, iteration: int, *, consume: bool = False) -> dict[str, float]:
        """One PPO update on a rollout that has ``advantage`` and ``value_target``.

        Decisions of older weights (``version`` below ``iteration``) are learnt from by the decoupled objective
        (`behaviour_weight`).

        Args:
            rollout: this rank's episodes; those of rank 0 come first among all.
            consume: take what decisions were made from out of the rollout, so that it is freed when nobody reads it any
                more.

        Raises:
            InvariantError: the learner does not score the rollout's own actions as the rollout did, on any rank. Of
                stale decisions this cannot be told.
        """
        group = self.group
        data = rollout[rollout["valid"]]
        if self.config.auxiliary_weight > 0:
            data["next_row"] = next_rows(rollout["row"], rollout["valid"])[rollout["valid"]]
        if consume:
            del rollout["rounds"]
        self._set_learning_rate(iteration)
        version = data.get("version")
        stale = version is not None and bool((version < iteration).any())
        if stale:
            self._add_proximal(data)
        else:
            self._check_before(data)
        # Without a critic some episodes may have been left out (`rlvla.judging`): neither kind is counted of those.
        kept = len(rollout) if self.config.has_critic else int(rollout["mask"].flatten(1).any(dim=1).sum())
        successes, episodes = group.total(int(data["next", "success"].sum()), kept)
        reason = self.critic_only_reason(iteration, int(successes), int(episodes))
        if not group.total(int(data["mask"].sum()))[0]:
            reason = reason or "no episode is left to learn from"
        if reason:
            metrics = self._critic_epochs(data, iteration) if self.config.has_critic else dict(self._checked)
        else:
            if self.compute.precision is not Precision.fp32:
                self._score_again(data, iteration)
            self._ask_teacher(data)
            self._held.lend()
            metrics = self._ppo_epochs(data, iteration)
        kl, others = self._measure_kl(data) if not reason else (0.0, {})
        if not reason:
            self._held.give_back()
            self._steer(kl, self.target_kl(iteration))
            self._steer_teacher(others)
        valid = rollout["valid"]
        return {
            **metrics,
            "ppo/kl": kl,
            **others,
            "ppo/critic_only": float(bool(reason)),
            **(
                {
                    "value/explained_variance": explained_variance(
                        rollout["state_value"][valid], rollout["value_target"][valid], group.variance
                    )
                }
                if self.config.has_critic
                else {}
            ),
            "ppo/target_kl": self.target_kl(iteration),
            "optim/policy_lr": self.policy_lr,
        }

    def critic_only_reason(self, iteration: int, successes: int, episodes: int) -> str:
        """Why this update must leave the policy alone; empty when it need not."""
        config = self.config
        if config.has_critic and iteration < config.critic_only_iterations:
            return "the critic has seen nothing yet"
        # Clones are made of successes alone.
        needed = successes if config.objective is Objective.clone else min(successes, episodes - successes)
        if needed < config.min_successes:
            return f"{successes} successes in {episodes} episodes carry no signal"
        return ""

    def forward(self, decisions: TensorDict, *, next_images: bool = False) -> Forward:
        """One pass gives log-probability and value. All ranks call it equally often."""
        batch = recall(decisions, next_images=next_images)
        with naming_the_lost():
            scored = self._held.score(batch, self.sampler)
        read = self.value_head.read(scored.features, scored.tokens, scored.token_mask)
        return Forward(scored.likelihood, self.value_head.value(read, batch.get("time_left")), scored.auxiliary)

    def _ppo_epochs(self, data: TensorDict, iteration: int) -> dict[str, float]:
        config, group = self.config, self.group
        sums: dict[str, float] = {}
        num_batches = 0
        for epoch in range(config.epochs):
            epoch_kl, before = 0.0, num_batches
            for part in self._minibatches(data, iteration, epoch):
                self._policy_optimizer.zero_grad(set_to_none=True)
                self._value_optimizer.zero_grad(set_to_none=True)
                measured: dict[str, float] = {}
                kl = 0.0
                for pass_, piece in enumerate(self._passes(part)):
                    demonstrated: Tensor | None = None
                    if self.cotraining is not None and pass_ == 0:
                        demonstrated = self.cotraining.loss(self.sampler, iteration, epoch, num_batches)
                    found, moved = self._descend(piece, demonstrated)
                    kl += moved
                    for name, share in found.items():
                        measured[name] = measured.get(name, 0.0) + share
                if self.reasoning:
                    # A pass of its own after the first one's memory is free.
                    self._hold_answers(self.reasoning, iteration, epoch, num_batches - before)
                norm = self._clip_gradients()
                if not np.isfinite(norm):
                    raise InvariantError(
                        f"the policy gradient is not finite in epoch {epoch}. Lower algo.policy_lr "
                        f"(now {self.policy_lr:g}) or algo.target_kl ({config.target_kl:g})."
                    )
                self._policy_optimizer.step()
                self._value_optimizer.step()
                num_batches += 1
                batch_kl, *numbers = group.total(kl / part.rows, *measured.values())
                epoch_kl += batch_kl
                for name, number in (*zip(measured, numbers, strict=True), ("optim/grad_norm", norm)):
                    sums[name] = sums.get(name, 0.0) + number
            if epoch_kl / (num_batches - before) > config.kl_stop_factor * self.target_kl(iteration):
                break
        return {
            **{name: total / num_batches for name, total in sums.items()},
            "ppo/epochs": epoch + 1.0,
            **(self.reasoning.report(group) if self.reasoning else {}),
            **self._checked,
        }

    def _descend(self, piece: Minibatch, demonstrated: Tensor | None) -> tuple[dict[str, float], float]:
        """Add the gradients of one pass to those that are there.

        Returns:
            What there is to log of it, and its divergence from the collecting policy, both to be added up.
        """
        config, batch = self.config, piece.data
        new = self.forward(batch, next_images=config.auxiliary_weight > 0)
        loss = objective_loss(config, new.likelihood, new.value, batch, self._totals(piece), self._clip_power(batch))
        entropy = self._entropy(new.likelihood, piece)
        total = loss.total if entropy is None else loss.total - config.entropy_coef * entropy
        pull = self._pull(new.likelihood, piece)
        total = total if pull is None else total + self._teacher_coef * pull
        if demonstrated is not None:
            total = total + config.demonstrations.weight * demonstrated
        auxiliary = new.auxiliary.sum() / piece.rows
        self._backward(piece.weight * (total + config.auxiliary_weight * auxiliary))
        with torch.no_grad():
            kl = float(self.sampler.kl(new.likelihood.parameters, batch).sum())
        measured = {"loss/policy": float(loss.policy)}
        if config.has_critic:
            measured["loss/value"] = piece.weight * float(loss.value)
        if config.has_ratio:
            measured["ppo/clip_fraction"] = float(loss.clip_fraction)
        if entropy is not None:
            measured["ppo/entropy"] = float(entropy.detach())
        if pull is not None:
            measured["loss/teacher"] = float(pull.detach())
        if demonstrated is not None:
            measured["loss/demonstrations"] = float(demonstrated.detach())
        if config.auxiliary_weight > 0:
            measured["loss/auxiliary"] = piece.weight * float(auxiliary.detach())
        return measured, kl

    def _hold_answers(self, teacher: ReasoningTeacher, *key: int) -> None:
        """Add the gradient of the divergence from the reasoning teacher's answers, on the conversations of a key."""
        with naming_the_lost():
            told = teacher.divergence(self._held.answers, self.group, key)
            torch.autograd.backward(self.group.size * teacher.coef * told)

    def _entropy(self, likelihood: Likelihood, part: Minibatch) -> Tensor | None:
        """This rank's part of the minibatch's mean entropy over valid entries; None where it is a constant."""
        if likelihood.entropy is None:
            return None
        entries = int((part.whole or part).data["mask"].sum())
        entropy: Tensor = (likelihood.entropy * part.data["mask"]).sum() / max(1.0, self.group.total(entries)[0])
        return entropy

    def _ask_teacher(self, data: TensorDict) -> None:
        """Note what the teacher would have done. Its answers stay the same during the epochs."""
        if self.teacher:
            data["teacher"] = self.teacher.answers(data, self.sampler, self._rows(data))
            if "context" in data["rounds"]:
                data.set_non_tensor("rounds", data["rounds"].without("batch"))

    def _pull(self, likelihood: Likelihood, part: Minibatch) -> Tensor | None:
        """This rank's part of the minibatch's mean distance to the teacher; None where there is none."""
        if self.teacher is None:
            return None
        batch, config = part.data, self.config
        return distillation_loss(
            distances=self.sampler.distance(likelihood.parameters, batch, config.teacher.distance.value),
            mask=batch["mask"],
            weight=batch["teacher_weight"],
            reduction=config.reduction.value,
            totals=self._totals(part),
        )

    def _steer_teacher(self, measured: dict[str, float]) -> None:
        """Report the coefficient of this update and choose the next one's."""
        if self.teacher is None:
            return
        config = self.config.teacher
        measured["ppo/teacher_coef"] = self._teacher_coef
        if config.target_kl is not None:
            kl = measured["ppo/teacher_kl"]
            self._teacher_coef = steer_coefficient(self._teacher_coef, kl, config.target_kl, config.coef)

    def _critic_epochs(self, data: TensorDict, iteration: int) -> dict[str, float]:
        total, count = 0.0, 0
        for epoch in range(self.config.epochs):
            for part in self._minibatches(data, iteration, epoch):
                with torch.no_grad():
                    # The acting policy has its weights and is not about to change, so no rank need wait for another.
                    context = context_of(self.policy, recall(part.data))
                    features = self.policy.value_features(context)
                read = self.value_head.read(features, context.tokens, context.mask)
                value = self.value_head.value(read, part.data.get("time_left"))
                error = (value - part.data["value_target"]).square().sum()
                loss = part.weight * 0.5 * (error / part.rows)
                self._value_optimizer.zero_grad(set_to_none=True)
                self._backward(loss)
                self._value_optimizer.step()
                total, count = total + self.group.total(float(loss.detach()))[0], count + 1
        return {"loss/value": total / count, "ppo/epochs": float(self.config.epochs), **self._checked}

    def _backward(self, loss: Tensor) -> None:
        """Gradients of the sum of all ranks' losses."""
        with naming_the_lost():
            # DDP, FSDP2 and we with the value head average over the ranks.
            torch.autograd.backward(self.group.size * loss)
        self.group.average_gradients(self.value_head.parameters())

    @torch.no_grad()
    def _add_proximal(self, data: TensorDict) -> None:
        """Score stale decisions by the weights as they are now, which are the centre of the trust region."""
        news = [self.forward(batch) for batch in data.split(self._rows(data))]
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
        parameters = [new.likelihood.parameters for new in news]
        self.sampler.recentre(data, {name: torch.cat([p[name] for p in parameters]) for name in parameters[0]})
        counted = data["mask"] if weight.ndim == 3 else torch.ones_like(weight, dtype=torch.bool)
        self._checked = {"ppo/behaviour_weight": float(weight[counted].mean())}

    def _clip_gradients(self) -> float:
        """Their norm over all policy parameters before the clip."""
        with naming_the_lost():
            norm: Tensor = nn.utils.clip_grad_norm_(self._policy_parameters, self.config.max_grad_norm)
            # Of split parameters it is still in parts.
            return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _clip_power(self, batch: TensorDict) -> Tensor | None:
        if not self.config.match_clip:
            return None
        return clip_power(batch["mask"], self.config.reduction.value, self.sampler.terms)

    def _totals(self, part: Minibatch) -> Totals | None:
        if self.group.size == 1 and part.whole is None:
            return None
        entries = count_entries((part.whole or part).data["mask"], self.config.reduction.value)
        return Totals(self.group.total(entries)[0], part.rows)

    def _minibatches(self, data: TensorDict, iteration: int, epoch: int) -> Iterator[Minibatch]:
        order = keyed_rng(self.seed, Stream.MINIBATCH, iteration, epoch)
        return minibatches(data, order, self.config.minibatch_size, self.group)

    def _passes(self, part: Minibatch) -> Iterator[Minibatch]:
        return passes(part, self._rows_at_once(part.data), self.group)

    def _rows_at_once(self, data: TensorDict) -> int | None:
        """Rows of a pass; None where a minibatch is one."""
        if self.compute.pass_tokens is None:
            return None
        return max(1, self.compute.pass_tokens // (self.policy.encoded_tokens(recall(data[:1])) + self.policy.horizon))

    def _rows(self, data: TensorDict) -> int:
        """Rows of a pass without gradients."""
        return min(self.config.minibatch_size, self._rows_at_once(data) or self.config.minibatch_size)

    @torch.no_grad()
    def _check_before(self, data: TensorDict) -> None:
        """Before the first step the learner must score the rollout exactly as the rollout did.

        The distributions are compared as well as the ratios: log-probabilities recomputed by the learner agree with
        each other even when both use the wrong time grid; means stored by the rollout do not.
        """
        with self.group.together():
            self._check_finite(data)
            self._check_mode()
        batch = data[: self._rows(data)]
        new = self.forward(batch)
        with self.group.together():
            mask = batch["mask"]
            gap = (self.sampler.gap(new.likelihood.parameters, batch) * mask).max()
            ratio = ((new.log_prob - batch["log_prob"]).exp() - 1).abs() * mask
            self._check_error(float(gap), float(ratio.max()))
        mean_error, ratio_error = self.group.largest(float(gap), float(ratio.max()))
        self._checked = {"ppo/mean_error": mean_error, "ppo/ratio_error": ratio_error}

    def _score_again(self, data: TensorDict, iteration: int) -> None:
        """Let the old log-probabilities come from the very passes of the first epoch, so that its ratios begin at 1.

        The rollout computed other numbers of rows at once, and in bfloat16 that is a percent. Kernels differ with and
        without gradients as well, so these passes have them.
        """
        log_prob = torch.empty_like(data["log_prob"])
        parameters: dict[str, Tensor] = {}
        # DDP counts passes with gradients, and each needs its way back.
        with torch.set_grad_enabled(self.group.size == 1):
            for part in self._minibatches(data, iteration, 0):
                for piece in self._passes(part):
                    again, found = self._scores(piece)
                    if not piece.weight:
                        continue
                    where = piece.index.to(data.device)
                    log_prob[where] = again
                    for name, values in found.items():
                        if name not in parameters:
                            parameters[name] = values.new_empty((len(data), *values.shape[1:]))
                        parameters[name][where] = values
        data["log_prob"] = log_prob
        if parameters:
            self.sampler.recentre(data, parameters)

    def _scores(self, piece: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities and parameters of a pass, detached: its graph is gone before the next one's is made."""
        found = self.forward(piece.data).likelihood
        return found.log_prob.detach(), {name: values.detach() for name, values in found.parameters.items()}

    def _check_finite(self, data: TensorDict) -> None:
        for name in ("advantage", "value_target", "log_prob"):
            if not torch.isfinite(data[name]).all():
                raise InvariantError(
                    f"{name} is not finite for {int((~torch.isfinite(data[name])).sum())} entries of the rollout. "
                    "Look at the rewards and values in metrics.jsonl, or lower algo.value_lr."
                )

    def _check_mode(self) -> None:
        training = (
            [n for n, m in self.policy.named_modules() if m.training] if isinstance(self.policy, nn.Module) else []
        )
        if training:
            raise InvariantError(
                f"{training[0] or 'the policy'} is in training mode, so dropout may be on and no ratio means anything. "
                "Call policy.eval(); gradients do not need training mode."
            )

    def _check_error(self, gap: float, ratio: float) -> None:
        coarser = COARSER[self.compute.precision]
        scale = f" times {coarser:g} for {self.compute.precision.value}" if coarser != 1 else ""
        if not gap < coarser * self.config.mean_tolerance:
            raise InvariantError(
                f"on the first minibatch the learner's {self.sampler.compared} differs from the rollout's by {gap:.3g} "
                f"standard deviations; algo.mean_tolerance is {self.config.mean_tolerance:g}{scale}. "
                f"{self.sampler.advice}"
            )
        if not ratio < coarser * self.config.ratio_tolerance:
            raise InvariantError(
                f"on the first minibatch a ratio is off by {ratio:.3g} from 1; algo.ratio_tolerance is "
                f"{self.config.ratio_tolerance:g}{scale}. The stored sample or log-probability is not what the sampler "
                "drew: clipping belongs to the simulator's copy only."
            )

    @torch.no_grad()
    def _measure_kl(self, data: TensorDict) -> tuple[float, dict[str, float]]:
        """Exact KL from the collecting policy, in nats per chunk: over everything, and of the sampler's parts; and that
        to the teacher."""
        group = self.group
        batches = list(data.split(self._rows(data)))
        most = int(group.largest(len(batches))[0])
        kls, pulls = [], []
        for batch in [*batches, *[nothing(data)] * (most - len(batches))]:
            parameters = self.forward(batch).likelihood.parameters
            kls.append(self.sampler.kl(parameters, batch))
            if self.teacher:
                pulls.append((self.sampler.distance(parameters, batch, "kl") * batch["mask"]).sum(dim=(1, 2)))
        kl = torch.cat(kls[: len(batches)])
        parts = {name: kl[rows] for name, rows in self.sampler.parts(data).items()}
        found = group.total(*(len(values) for values in parts.values())) if parts else []
        others = {
            name: group.mean(values) for (name, values), number in zip(parts.items(), found, strict=True) if number
        }
        if self.teacher:
            weight = data["teacher_weight"]
            pulled, weights = group.total(float((weight * torch.cat(pulls[: len(batches)])).sum()), float(weight.sum()))
            others["ppo/teacher_kl"] = pulled / max(weights, 1e-8)
        return group.mean(kl), others

    def _set_learning_rate(self, iteration: int) -> None:
        scale = self._lr_scale
        if self.config.lr_schedule is LRSchedule.cosine:
            scale = 0.5 * (1 + float(np.cos(np.pi * iteration / max(1, self.total_iterations))))
        for group in self._policy_optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale * self.caution

    def _steer(self, kl: float, target: float) -> None:
        """Move the learning rate towards the KL target; a rate that suits iteration 1 collapses iteration 30."""
        if self.config.lr_schedule is not LRSchedule.kl:
            return
        if kl > KL_STEER * target:
            self._lr_scale /= KL_STEER
        elif kl < target / KL_STEER:
            self._lr_scale = min(self._lr_scale * KL_STEER, self.config.max_policy_lr / self.config.policy_lr)


def _check_auxiliary(policy: ChunkPolicy, config: AlgoConfig) -> None:
    """Refuse auxiliary losses of a policy that has none, or whose contexts are stored instead of the images."""
    if not getattr(policy, "auxiliary_weights", {}) or context_is_fixed(policy, config.train_vlm, config.freeze):
        raise ValueError(
            f"algo.auxiliary_weight is {config.auxiliary_weight:g}, and this policy has no auxiliary loss that would "
            "train anything. Set it to 0, or train a policy that has one: uam, where policy.dorsal.dynamics_weight is "
            "positive and the dorsal expert is trained."
        )
