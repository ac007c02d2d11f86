"""`rlvla sft`: imitation of demonstrations; makes the checkpoint that `rlvla train` refines."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlvla.acting import context_noise
from rlvla.config import ConfigError, SFTConfig
from rlvla.dataset import Demonstrations
from rlvla.dataset_reader import load_dataset
from rlvla.distill import TwinTeacher, twin_teacher
from rlvla.policies.base import context_is_fixed, trained_groups
from rlvla.policies.exploration import drop_explorer, has_latent
from rlvla.policies.folder import build, load_policy, save_policy
from rlvla.policies.groups import check_groups, group_rates, require_gradients, trained_parameters
from rlvla.policies.lora import adapted, add_lora, describe_lora
from rlvla.policies.policy import Policy
from rlvla.policies.processor import load_tokenizer, train_tokenizer
from rlvla.policies.prompted import PromptedPolicy, prompts_for_tokenizer
from rlvla.reasoning import frozen_vlm
from rlvla.run import Run, pick_device
from rlvla.samplers import evaluation_sampler
from rlvla.seeding import Stream, keyed_rng, normal, seed_torch
from rlvla.sft_mixture import Mixture, Part, Source, describe_mixture, embodiments_of, more_sources
from rlvla.teachers import START
from rlvla.vision_language import Reader, answer_logits, answer_loss, load_chats, to_device
from rlvla_algos.distill import token_kl
from rlvla_envs.base import ActionComponent, Camera, EnvSpec, require_match


def run(config: SFTConfig) -> dict[str, Any]:
    """Train a policy on ``config.dataset`` and write it to ``config.output``/policy."""
    demonstrations = load_dataset(Path(config.dataset))
    sources = [Source(dataset_spec(demonstrations, config), demonstrations, config.weight), *more_sources(config)]
    device = pick_device(config.device)
    with Run.open(config, "sft", total=config.steps) as record:
        seed_torch(config.seed)
        policy = build_policy(config, sources).to(device)
        names = trained_groups(policy, config.train_vlm, config.freeze)
        if add_lora(policy, config.lora, names, config.start or ""):
            record.progress.note(describe_lora(adapted(policy)))
        record.progress.note(
            f"{sum(s.demonstrations.num_episodes for s in sources)} demonstrations, "
            f"{sum(s.demonstrations.num_frames for s in sources)} frames; "
            + ", ".join(f"{k} {sum(p.numel() for p in v) / 1e6:.2f} M" for k, v in policy.parameter_groups().items())
            + " parameters"
        )
        if config.start is not None:
            record.progress.note(f"architecture, sizes and tokenizer are those of {config.start}; policy= is not read")
        weights = fit(policy, sources, config, record, device)
        folder = Path(config.output) / "policy"
        save_policy(policy, folder, weights)
        summary = {
            "policy": str(folder),
            "dataset": config.dataset,
            **({"more": [each.dataset for each in config.more]} if config.more else {}),
            "episodes": sum(source.demonstrations.num_episodes for source in sources),
            "steps": config.steps,
            "loss": record.last(evaluation_sampler(policy).imitation_metric),
            "minutes": record.minutes(),
        }
        record.finish(summary)
        return summary


def fit(
    policy: Policy, sources: Sequence[Source], config: SFTConfig, record: Run, device: str
) -> dict[str, torch.Tensor] | None:
    """AdamW with warm-up and cosine decay on the imitation loss of the policy's kind, and on the answers to questions
    about images where there are any.

    Returns:
        The averaged weights when ``ema_decay`` is set, else None.
    """
    mixture = Mixture(policy, sources, config)
    if len(sources) > 1:
        for line in describe_mixture(policy, sources, mixture.shares):
            record.progress.note(line)
    check_groups(policy, config.freeze, "freeze")
    names = trained_groups(policy, config.train_vlm, config.freeze)
    rates = group_rates(policy, names, config.learning_rates, config.lr, key="learning_rates")
    require_gradients(policy, names)
    questions = Questions(policy, config, device) if config.vision_language.dataset else None
    groups = trained_parameters(policy, names)
    trained = [p for parameters in groups.values() for p in parameters]
    optimizer = torch.optim.AdamW(
        [{"params": groups[name], "lr": rates[name], "initial_lr": rates[name]} for name in names],
        weight_decay=config.weight_decay,
        fused=True,
    )
    average: dict[str, torch.Tensor] | None = None
    sampler = evaluation_sampler(policy)
    imitation = Imitation(policy, config, device, twin_teacher(config, policy, device))
    started = time.monotonic()
    for step in range(config.steps):
        rng = keyed_rng(config.seed, Stream.SFT, step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate_factor(step, config.steps, config.warmup_steps)
        optimizer.zero_grad(set_to_none=True)
        losses: dict[str, float] = {}
        for part in mixture.parts(rng, config.batch_size):
            loss, measured = imitation.loss(part, rng)
            torch.autograd.backward(part.share * loss)
            for name, value in measured.items():
                losses[name] = losses.get(name, 0.0) + part.share * value
        if questions is not None:
            # A pass of its own after the first one's memory is free.
            told, measured = questions.loss(step)
            torch.autograd.backward(told)
            losses |= measured
        norm = nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        for name, error in losses.items():
            if not math.isfinite(error):
                raise RuntimeError(
                    f"{name} is {error} at step {step}. Lower lr (now {config.lr:g}), or look for outliers in the "
                    "dataset's actions."
                )
        optimizer.step()
        if config.ema_decay is not None:
            average = update_average(average, policy, config.ema_decay)
        if (step + 1) % 20 == 0 or step + 1 == config.steps:
            rate = (step + 1) / (time.monotonic() - started)
            row = {**losses, "optim/grad_norm": float(norm), "speed/steps_per_s": rate}
            record.log({"kind": "sft", "step": step + 1, "minutes": record.minutes(), **row})
            record.progress.bar(f"sft loss {losses[sampler.imitation_metric]:.3f}", step + 1, config.steps)
    return average


class Imitation:
    """The loss of demonstrated chunks, and of what else a frame teaches."""

    def __init__(self, policy: Policy, config: SFTConfig, device: str, teacher: TwinTeacher | None) -> None:
        self._policy, self._config, self._device, self._teacher = policy, config, device, teacher
        self._sampler = evaluation_sampler(policy)

    def loss(self, part: Part, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        """Of rows that are drawn now; and its parts without their weights, by the names they are logged under."""
        policy, config, device = self._policy, self._config, self._device
        batch, action, valid, observation = part.examples.draw(rng, part.rows)
        noise = {name: normal(rng, part.rows, *size) for name, size in policy.context_noise().items()}
        if noise:
            batch["noise"] = context_noise(noise, part.rows)
        action, valid, batch = (x.to(device) for x in (action, valid, batch))
        with torch.set_grad_enabled(not context_is_fixed(policy, config.train_vlm, config.freeze)):
            context = policy.encode(batch)
        loss = self._sampler.imitation_loss(policy, context, action, valid, rng, config, part.examples.velocity)
        losses = {self._sampler.imitation_metric: float(loss.detach())}
        if "next" in batch:
            parts = policy.auxiliary_losses(context, batch)
            auxiliary = torch.stack([policy.auxiliary_weights[name] * parts[name].mean() for name in parts]).sum()
            loss = loss + auxiliary
            losses["loss/auxiliary"] = float(auxiliary.detach())
        if self._teacher is not None:
            feature = self._teacher.loss(observation, batch, context)
            loss = loss + config.feature_coef * feature
            losses["loss/feature"] = float(feature.detach())
        return loss, losses


class Questions:
    """Vision-language data that is learnt beside the actions, so that the backbone keeps its other abilities."""

    def __init__(self, policy: Policy, config: SFTConfig, device: str) -> None:
        """
        Args:
            policy: with ``requires_grad`` set on what is trained.
        """
        if not isinstance(policy, PromptedPolicy):
            raise ConfigError(
                f"vision_language.dataset is for policies that read prompts by a language model with its own words; "
                f"{policy.config.name} is none. Leave it out."
            )
        self._policy, self._config, self._reader, self._device = policy, config, Reader(policy), device
        own = config.vision_language
        assert own.dataset is not None
        self._chats = load_chats(Path(own.dataset))
        self._teacher: Any = None
        if own.teacher is not None:
            folder = Path((config.start or "") if own.teacher == START else own.teacher)
            self._teacher = frozen_vlm(folder, policy, device, key="vision_language.teacher")

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Weighted, of one step's conversations; and its parts without their weights, by the names they are logged
        under."""
        own = self._config.vision_language
        rng = keyed_rng(self._config.seed, Stream.VISION_LANGUAGE, step)
        rows = rng.integers(len(self._chats), size=own.batch_size)
        batch = to_device(self._reader.batch([self._chats[row] for row in rows]), self._device)
        logits = answer_logits(self._policy.vlm, batch)
        told = answer_loss(logits, batch)
        loss, measured = own.weight * told, {"loss/vision_language": float(told.detach())}
        if self._teacher is not None:
            with torch.no_grad():
                wanted = answer_logits(self._teacher, batch)
            pull = token_kl(logits, wanted).mean()
            loss = loss + own.teacher_coef * pull
            measured["loss/reasoning"] = float(pull.detach())
        return loss, measured


def build_policy(config: SFTConfig, sources: Sequence[Source]) -> Policy:
    """A policy with the datasets' embodiments and statistics: a fresh one whose tokenizer knows their prompts, or the
    one that ``start`` names.

    Raises:
        ValueError: ``start`` is no policy folder, or its policy does not fit a suite.
    """
    embodiments = embodiments_of(sources)
    if config.start is not None:
        before = load_policy(Path(config.start))
        if has_latent(before):
            raise ConfigError(
                f"start={config.start} draws its initial noise from a head (algo.sampler.kind=latent), which would not "
                "fit the flow that SFT makes of it. Start from the policy before that run."
            )
        # Of steps' noise: it explores for the flow as it was.
        drop_explorer(before)
        # A policy of one robot has the sizes of its state, and says so below where another one's differ.
        is_padded = before.state_width != before.env_spec.state_size or len(before.embodiments) > 1
        policy = build(before.config, embodiments, before.tokenizer, before.state_width if is_padded else 0)
        try:
            policy.load_state_dict(before.state_dict())
        except RuntimeError as error:
            # Sizes that are the suite's and not the configuration's: of the state.
            raise ConfigError(
                f"start={config.start} was trained on a suite with {before.state_width} state channels, and "
                f"this one has {policy.state_width}. Choose a suite with as many, or a policy with "
                "policy.use_state=false."
            ) from error
        return policy
    # A student's tokens are compared with its teacher's one by one.
    source = config.tokenizer or config.twin_teacher
    if source is None:
        prompts = [
            prompt
            for source in sources
            for prompt in prompts_for_tokenizer(source.env_spec, source.demonstrations.tasks, config.policy)
        ]
        if config.vision_language.dataset is not None:
            chats = load_chats(Path(config.vision_language.dataset))
            prompts += [text for chat in chats for text in chat.texts()]
        tokenizer = train_tokenizer(prompts, config.policy.vlm.vocab_size)
    else:
        tokenizer = load_tokenizer(Path(source))
    policy = build(config.policy, embodiments, tokenizer)
    policy.initialize()
    return policy


def dataset_spec(demonstrations: Demonstrations, config: SFTConfig) -> EnvSpec:
    """The conventions the policy will be trained under.

    A dataset of ours carries them, and they must be the suite's. A foreign one carries names and sizes; what it
    has must agree with the suite, and the rest is taken from the suite.

    Raises:
        ValueError: the dataset and the suite disagree; both sides are printed.
    """
    from rlvla_envs.suites import make_env

    env = make_env(config.suite, 1)
    suite_spec = env.spec
    env.close()
    if demonstrations.env_spec is not None:
        found = EnvSpec.from_dict(demonstrations.env_spec)
    else:
        found = _foreign_spec(demonstrations, suite_spec)
    # The chunk is the policy's choice, not the data's: demonstrations have an action for every step.
    found = EnvSpec.from_dict({**found.to_dict(), "chunk_size": suite_spec.chunk_size})
    require_match(found, suite_spec, left="dataset", right="suite")
    return suite_spec


def _foreign_spec(demonstrations: Demonstrations, suite: EnvSpec) -> EnvSpec:
    size = demonstrations.action.shape[1]
    action = suite.action
    if size != suite.action_size:
        action = (ActionComponent(name="action", size=size, convention="unknown", low=-np.inf, high=np.inf),)
    order = {camera.name: i for i, camera in enumerate(suite.cameras)}
    cameras = tuple(
        Camera(name=name, height=image.shape[1], width=image.shape[2])
        for name, image in sorted(demonstrations.images.items(), key=lambda item: order.get(item[0], len(order)))
    )
    size = 0 if demonstrations.state is None else demonstrations.state.shape[1]
    state = suite.state_names if size == suite.state_size else tuple(f"state.{i}" for i in range(size))
    return EnvSpec.from_dict(
        {
            **suite.to_dict(),
            "action": [vars(c) for c in action],
            "cameras": [vars(c) for c in cameras],
            "state_names": state,
            "control_hz": demonstrations.fps,
        }
    )


def learning_rate_factor(step: int, num_steps: int, warmup: int) -> float:
    """Linear warm-up times cosine decay, in (0, 1]."""
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


@torch.no_grad()
def update_average(average: dict[str, torch.Tensor] | None, policy: nn.Module, decay: float) -> dict[str, torch.Tensor]:
    state = policy.state_dict()
    if average is None:
        return {name: tensor.clone() for name, tensor in state.items()}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor, 1 - decay)
    return average
