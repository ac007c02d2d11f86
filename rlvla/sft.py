"""`rlvla sft`: flow matching on demonstrations; makes the checkpoint that `rlvla train` refines."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlvla.config import FlowTime, SFTConfig
from rlvla.dataset import Demonstrations, action_chunks
from rlvla.dataset_reader import load_dataset
from rlvla.distill import twin_teacher
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.architectures import architecture
from rlvla.policies.base import context_is_fixed, trained_groups
from rlvla.policies.folder import save_policy
from rlvla.policies.policy import Policy
from rlvla.policies.processor import load_tokenizer, train_tokenizer
from rlvla.policies.prompted import prompts_for_tokenizer
from rlvla.run import Run, pick_device
from rlvla.seeding import Stream, keyed_rng, normal, seed_torch
from rlvla_algos.flow_matching import flow_matching_loss, interpolate
from rlvla_envs.base import ActionComponent, Camera, EnvSpec, Observation, require_match


def run(config: SFTConfig) -> dict[str, Any]:
    """Train a policy on ``config.dataset`` and write it to ``config.output``/policy."""
    demonstrations = load_dataset(Path(config.dataset))
    env_spec = dataset_spec(demonstrations, config)
    device = pick_device(config.device)
    with Run.open(config, "sft", total=config.steps) as record:
        seed_torch(config.seed)
        policy = build_policy(config, env_spec, demonstrations).to(device)
        record.progress.note(
            f"{demonstrations.num_episodes} demonstrations, {demonstrations.num_frames} frames; "
            + ", ".join(f"{k} {sum(p.numel() for p in v) / 1e6:.2f} M" for k, v in policy.parameter_groups().items())
            + " parameters"
        )
        weights = fit(policy, demonstrations, config, record, device)
        folder = Path(config.output) / "policy"
        save_policy(policy, folder, weights)
        summary = {
            "policy": str(folder),
            "dataset": config.dataset,
            "episodes": demonstrations.num_episodes,
            "steps": config.steps,
            "loss": record.last("loss/flow"),
            "minutes": record.minutes(),
        }
        record.finish(summary)
        return summary


def fit(
    policy: Policy, demonstrations: Demonstrations, config: SFTConfig, record: Run, device: str
) -> dict[str, torch.Tensor] | None:
    """AdamW with warm-up and cosine decay on the two-level averaged velocity error.

    Returns:
        The averaged weights when ``ema_decay`` is set, else None.
    """
    chunks, real = action_chunks(demonstrations, policy.env_spec.chunk_size)
    target = policy.actions_from_env(chunks)
    mask = torch.zeros(target.shape, dtype=torch.bool)
    mask[:, : real.shape[1]] = torch.from_numpy(real)[..., None]
    mask &= policy.action_mask().cpu()

    weight = frame_weights(demonstrations, config)
    groups = policy.parameter_groups()
    trained = [p for name in trained_groups(policy, config.train_vlm) for p in groups[name]]
    policy.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    average: dict[str, torch.Tensor] | None = None
    teacher = twin_teacher(config, policy, device)
    started = time.monotonic()
    for step in range(config.steps):
        rng = keyed_rng(config.seed, Stream.SFT, step)
        rows = rng.choice(len(weight), size=config.batch_size, p=weight)
        observation = observe(demonstrations, rows)
        batch = policy.collate(observation)
        batch["state"] = batch["state"] + config.state_noise * torch.from_numpy(normal(rng, *batch["state"].shape))
        draws = config.noise_draws * config.batch_size
        noise = torch.from_numpy(normal(rng, draws, policy.horizon, policy.channels))
        tau = torch.from_numpy(draw_flow_time(rng, draws, config))
        action = target[rows].repeat(config.noise_draws, 1, 1)
        valid = mask[rows].repeat(config.noise_draws, 1, 1)
        noise, tau, action, valid, batch = (x.to(device) for x in (noise, tau, action, valid, batch))

        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate_factor(step, config.steps, config.warmup_steps)
        with torch.set_grad_enabled(not context_is_fixed(policy, config.train_vlm)):
            context = policy.encode(batch)
        velocity = policy.velocity(context.repeat(config.noise_draws), interpolate(action, noise, tau), tau)
        loss = flow_matching_loss(velocity, action, noise, valid)
        losses = {"loss/flow": loss}
        if teacher is not None:
            losses["loss/feature"] = teacher.loss(observation, batch, context)
            loss = loss + config.feature_coef * losses["loss/feature"]
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        error = float(losses["loss/flow"].detach())
        norm = nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        if not math.isfinite(error):
            raise RuntimeError(
                f"the flow-matching loss is {error} at step {step}. Lower lr (now {config.lr:g}), or look for "
                "outliers in the dataset's actions."
            )
        optimizer.step()
        if config.ema_decay is not None:
            average = update_average(average, policy, config.ema_decay)
        if (step + 1) % 20 == 0 or step + 1 == config.steps:
            rate = (step + 1) / (time.monotonic() - started)
            row = {name: float(each.detach()) for name, each in losses.items()}
            row |= {"optim/grad_norm": float(norm), "speed/steps_per_s": rate}
            record.log({"kind": "sft", "step": step + 1, "minutes": record.minutes(), **row})
            record.progress.bar(f"sft loss {error:.3f}", step + 1, config.steps)
    return average


def build_policy(config: SFTConfig, env_spec: EnvSpec, demonstrations: Demonstrations) -> Policy:
    """A fresh policy with the dataset's statistics and a tokenizer that knows its prompts."""
    # A student's tokens are compared with its teacher's one by one.
    source = config.tokenizer or config.twin_teacher
    if source is None:
        prompts = prompts_for_tokenizer(env_spec, demonstrations.tasks, config.policy)
        tokenizer = train_tokenizer(prompts, config.policy.vlm.vocab_size)
    else:
        tokenizer = load_tokenizer(Path(source))
    stats = ActionStats.of(demonstrations.action, demonstrations.state if env_spec.state_size else None)
    policy = architecture(config.policy.name).policy(config.policy, env_spec, stats, tokenizer)
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


def observe(demonstrations: Demonstrations, rows: np.ndarray) -> Observation:
    return Observation(
        images={name: image[rows] for name, image in demonstrations.images.items()},
        instruction=[demonstrations.instruction(int(i)) for i in rows],
        state=None if demonstrations.state is None else demonstrations.state[rows],
    )


def frame_weights(demonstrations: Demonstrations, config: SFTConfig) -> np.ndarray:
    """Probability [N] of drawing each frame: the first steps of a demonstration more often."""
    start = demonstrations.episode_start[demonstrations.episode_index]
    since = np.arange(demonstrations.num_frames) - start
    weight = np.where(since < config.first_steps, config.first_steps_weight, 1.0)
    probability: np.ndarray = weight / weight.sum()
    return probability


def draw_flow_time(rng: np.random.Generator, size: int, config: SFTConfig) -> np.ndarray:
    """tau in [0.001, 0.999]: at 0 the velocity is undefined by the data, at 1 it is the data's mean."""
    if config.flow_time is FlowTime.beta:
        tau = rng.beta(config.beta_alpha, config.beta_beta, size)
    elif config.flow_time is FlowTime.sigmoid_normal:
        tau = 1 / (1 + np.exp(-rng.standard_normal(size)))
    else:
        tau = rng.random(size)
    return np.clip(tau, 1e-3, 1 - 1e-3).astype(np.float32)


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
