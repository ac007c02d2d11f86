"""A Qwen-VLA of any size with drawn weights, and a rollout without a simulator: for machines that have torch,
transformers and little else. Nothing here needs Ray, Hydra or a simulator."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # transformers brings it
from tensordict import TensorDict

from rlvla.acting import Actor
from rlvla.config import AlgoConfig
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.backbone import VLMConfig
from rlvla.policies.base import ValueHead
from rlvla.policies.expert import ExpertConfig
from rlvla.policies.processor import train_tokenizer
from rlvla.policies.prompted import prompts_for_tokenizer
from rlvla.policies.qwen_vla import QwenVLA, QwenVLAConfig
from rlvla.rounds import Rounds, refer
from rlvla.samplers import Sampler
from rlvla.seeding import Stream, keyed_rng
from rlvla_envs.base import ActionComponent, Camera, EnvSpec, Observation

CONFIGS = Path(__file__).resolve().parents[1] / "configs/policy"
INSTRUCTION = "put the object on the left into the container on the right"
ACTIONS = 7


def policy_config(name: str) -> QwenVLAConfig:
    """A Qwen-VLA of configs/policy, read without Hydra."""
    read = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    read.pop("defaults", None)
    vlm, expert = VLMConfig(**read.pop("vlm", {})), ExpertConfig(**read.pop("expert", {}))
    return QwenVLAConfig(vlm=vlm, expert=expert, **read)


def spec_for(config: QwenVLAConfig, image_size: int) -> EnvSpec:
    """A robot with one camera, as SimplerEnv's."""
    return EnvSpec(
        suite="synthetic",
        task="none",
        robot="robot",
        action=(
            ActionComponent(name="arm", size=min(ACTIONS, config.expert.channels), convention="?", low=-1, high=1),
        ),
        cameras=(Camera(name="camera", height=image_size, width=image_size),),
        control_hz=5.0,
        chunk_size=config.expert.horizon,
        max_episode_steps=4 * config.expert.horizon,
        num_evaluation_states=1,
    )


def draw_policy(
    config: QwenVLAConfig, image_size: int, device: str, *, exact: bool = True, std: float = 0.02
) -> QwenVLA:
    """A policy with drawn weights, in fp32, made where it will be.

    Args:
        exact: round the weights to what bfloat16 holds, as those of published checkpoints are.
        std: of what would start at zero: last layers, gates, biases.
    """
    spec = spec_for(config, image_size)
    tokenizer = train_tokenizer(prompts_for_tokenizer(spec, [INSTRUCTION]), min(config.vlm.vocab_size, 512))
    drawn = np.random.default_rng(0).uniform(-1, 1, (200, spec.action_size)).astype(np.float32)
    stats = ActionStats.of(drawn, None)
    assert stats.active.all()
    torch.manual_seed(0)
    with torch.device(device):
        policy = QwenVLA(config, spec, stats, tokenizer)
    policy = policy.to(device)
    policy.initialize()
    with torch.no_grad():
        for parameter in policy.parameters():
            if not parameter.any():
                # A velocity of zero would pass any test.
                parameter.normal_(std=std)
            if exact:
                parameter.copy_(parameter.bfloat16())
    return policy


def observe(policy: QwenVLA, rows: int, seed: int) -> Observation:
    """Noise for images."""
    rng = np.random.default_rng(seed)
    spec = policy.env_spec
    images = {c.name: rng.integers(0, 256, (rows, c.height, c.width, 3), dtype=np.uint8) for c in spec.cameras}
    return Observation(images=images, instruction=[INSTRUCTION] * rows, state=None)


def play(
    policy: QwenVLA,
    value_head: ValueHead,
    sampler: Sampler,
    *,
    episodes: int,
    decisions: int,
    block: int,
    device: str,
    seed: int = 0,
    store_context: bool = True,
) -> TensorDict:
    """A rollout [E, T] as `rlvla.rollout.collect` gives it, of decisions on noise, with drawn advantages and targets:
    what `rlvla.learner.Learner.update` takes."""
    actor = Actor(policy, block=block, device=device)
    columns, sources = [], []
    for t in range(decisions):
        rngs = [keyed_rng(seed, Stream.ROLLOUT, 0, e, t) for e in range(episodes)]
        thought = actor.decide(observe(policy, episodes, seed + t), rngs, temperature=1.0, sampler=sampler)
        with torch.no_grad():
            features = policy.value_features(thought.context)
            value = value_head.value(value_head.read_rows(features, thought.context.tokens, thought.context.mask), None)
        source: dict[str, Any] = (
            {"context": thought.context.to_tensordict()} if store_context else {"batch": thought.batch}
        )
        made = thought.decision.stored
        sources.append(TensorDict(source, batch_size=[episodes], device=device))
        columns.append(TensorDict({**made, "state_value": value}, batch_size=[episodes], device=device))
    rollout: TensorDict = torch.stack(columns, dim=1).contiguous()
    shape = (episodes, decisions)
    refer(rollout, Rounds(sources), torch.arange(episodes * decisions, device=device).reshape(decisions, episodes).T)
    draws = torch.Generator().manual_seed(seed)
    reward = torch.randn(shape, generator=draws).to(device)
    rollout["advantage"] = reward
    rollout["value_target"] = rollout["state_value"] + 0.1 * reward
    rollout["valid"] = torch.ones(shape, dtype=torch.bool, device=device)
    rollout["mask"] = policy.action_mask().expand(*shape, -1, -1).clone()
    success = torch.zeros(shape, dtype=torch.bool, device=device)
    success[::2, -1] = True
    rollout["next"] = TensorDict({"success": success}, batch_size=shape)
    return rollout


def algo_config(**changes: Any) -> AlgoConfig:
    """PPO whose update is never cut short, so that what is timed is always the same."""
    settings = {"epochs": 1, "critic_only_iterations": 0, "min_successes": 0, "target_kl": 1e3}
    return AlgoConfig(**{**settings, **changes})
