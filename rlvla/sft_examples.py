"""What `rlvla sft` learns from: chunks that start at any frame, or whole trajectories told from text alone."""

from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from tensordict import TensorDict
from torch import Tensor

from rlvla.config import ConfigError, SFTConfig
from rlvla.dataset import Demonstrations, action_chunks
from rlvla.policies.base import Context, FlowPolicy
from rlvla.policies.policy import Policy
from rlvla.policies.qwen_vla import QwenVLA
from rlvla.seeding import normal
from rlvla_envs.base import Observation


class Drawn(NamedTuple):
    """A batch, and what it is to be answered with."""

    batch: TensorDict
    action: Float[Tensor, "B L K"]
    """Normalised and padded."""
    valid: Bool[Tensor, "B L K"]
    observation: Observation
    """What the batch was made from."""


class Examples(Protocol):
    """Where batches come from. Everything is drawn from the generator of a step."""

    def draw(self, rng: np.random.Generator, size: int) -> Drawn: ...

    def velocity(self, context: Context, sample: Tensor, tau: Tensor, valid: Tensor) -> Tensor: ...


def examples_of(policy: Policy, demonstrations: Demonstrations, config: SFTConfig) -> Examples:
    """Chunks, or with ``sequence_length`` whole trajectories.

    Raises:
        ConfigError: whole trajectories for an architecture that predicts chunks only.
    """
    if not config.sequence_length:
        return Chunks(policy, demonstrations, config)
    if not isinstance(policy, QwenVLA):
        raise ConfigError(
            f"stage=t2a (sequence_length={config.sequence_length}) is for policy.name=qwen_vla, and this policy is "
            f"{policy.config.name}. Leave the stage out."
        )
    return Trajectories(policy, demonstrations, config)


class Chunks:
    """The H actions that follow a frame, from what was seen in it."""

    def __init__(self, policy: Policy, demonstrations: Demonstrations, config: SFTConfig) -> None:
        chunks, real = action_chunks(demonstrations, policy.env_spec.chunk_size)
        self._policy, self._demonstrations, self._state_noise = policy, demonstrations, config.state_noise
        self._action = policy.actions_from_env(chunks)
        self._valid = torch.zeros(self._action.shape, dtype=torch.bool)
        self._valid[:, : real.shape[1]] = torch.from_numpy(real)[..., None]
        self._valid &= policy.action_mask().cpu()
        self._weight = frame_weights(demonstrations, config)

    def draw(self, rng: np.random.Generator, size: int) -> Drawn:
        rows = rng.choice(len(self._weight), size=size, p=self._weight)
        seen = observe(self._demonstrations, rows)
        batch = self._policy.collate(seen)
        _blur_state(batch, rng, self._state_noise, self._policy.env_spec.state_size)
        if self._policy.auxiliary_weights:
            batch["next"] = next_images(self._policy, self._demonstrations, rows)
        return Drawn(batch, self._action[rows], self._valid[rows], seen)

    def velocity(self, context: Context, sample: Tensor, tau: Tensor, valid: Tensor) -> Tensor:
        # A flow's; a distribution is not asked.
        return cast(FlowPolicy, self._policy).velocity(context, sample, tau)


class Trajectories:
    """All actions of a demonstration, from its instruction, its first state and no image: Qwen-VLA's first stage
    (T2A, sections 3.1 and 5.2.1). The prompt says how many actions there are."""

    def __init__(self, policy: QwenVLA, demonstrations: Demonstrations, config: SFTConfig) -> None:
        self._policy, self._demonstrations, self._state_noise = policy, demonstrations, config.state_noise
        first, last = demonstrations.episode_start, demonstrations.episode_end
        self._first = first
        self.lengths = np.minimum(last - first, config.sequence_length)
        longest, channels = int(self.lengths.max()), demonstrations.action.shape[1]
        self._action = torch.zeros(len(first), longest, policy.channels)
        self._valid = torch.zeros(self._action.shape, dtype=torch.bool)
        active = policy.action_mask().any(dim=0).cpu()
        for episode, (start, length) in enumerate(zip(first, self.lengths, strict=True)):
            unit = policy.stats.normalize(demonstrations.action[start : start + length])
            self._action[episode, :length, :channels] = torch.from_numpy(unit)
            self._valid[episode, :length] = active

    def draw(self, rng: np.random.Generator, size: int) -> Drawn:
        rows = rng.integers(len(self._first), size=size)
        seen = observe(self._demonstrations, self._first[rows])
        batch = self._policy.collate_text(seen, self.lengths[rows].tolist())
        _blur_state(batch, rng, self._state_noise, self._policy.env_spec.state_size)
        return Drawn(batch, self._action[rows], self._valid[rows], seen)

    def velocity(self, context: Context, sample: Tensor, tau: Tensor, valid: Tensor) -> Tensor:
        return self._policy.sequence_velocity(context, sample, tau, valid)


def next_images(policy: Policy, demonstrations: Demonstrations, rows: np.ndarray) -> TensorDict:
    """What the cameras saw one chunk after each frame, as `Policy.auxiliary_losses` wants it."""
    ahead = policy.env_spec.chunk_size
    valid = demonstrations.frames_left[rows] > ahead
    frames = np.where(valid, rows + ahead, rows)
    images = [demonstrations.images[camera.name][frames] for camera in policy.env_spec.cameras]
    return TensorDict(
        {"images": torch.from_numpy(np.stack(images, axis=1)), "valid": torch.from_numpy(valid)},
        batch_size=[len(rows)],
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


def _blur_state(batch: TensorDict, rng: np.random.Generator, deviation: float, size: int) -> None:
    """Of the robot's own ``size`` channels; a wider policy's padding behind them stays 0, as everywhere."""
    own, padding = batch["state"][:, :size], batch["state"][:, size:]
    batch["state"] = torch.cat([own + deviation * torch.from_numpy(normal(rng, *own.shape)), padding], dim=1)
