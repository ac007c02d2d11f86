"""ManiSkill tabletop tasks on the CPU, rendered only where the policy looks.

One ManiSkill environment a slot (physx_cpu simulates one scene), any built-in tabletop task by its id. The
measured facts behind the choices here are in docs/architecture.md#maniskill.
"""

import contextlib
import difflib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlvla_envs.base import (
    ActionComponent,
    Camera,
    ChunkResult,
    Demonstration,
    EnvSpec,
    Observation,
    SuiteConfig,
    black_images,
)
from rlvla_envs.common import check_options, record_expert
from rlvla_envs.maniskill_common import renew_physics, require_maniskill
from rlvla_envs.suites import Ready
from rlvla_envs.vulkan_drawing import building_simulator

INSTRUCTIONS = {
    "PushCube-v1": "push the blue cube onto the red and white target",
    "PullCube-v1": "pull the blue cube onto the red and white target",
    "PickCube-v1": "pick up the red cube and hold it at the goal",
    "StackCube-v1": "stack the red cube on the green cube",
    "LiftPegUpright-v1": "lift the peg upright",
    "PokeCube-v1": "poke the cube with the peg",
    "RollBall-v1": "roll the ball into the goal",
    "PlaceSphere-v1": "place the sphere into the bin",
    "PegInsertionSide-v1": "insert the peg into the hole",
    "PlugCharger-v1": "plug the charger into the receptacle",
}

# The range is that of the normalised action; the conventions are those of ManiSkill's PDEEPoseController.
# The sign of the rotation is its own: it multiplies by rot_lower, which is negative.
PANDA_ACTION = (
    ActionComponent(name="translation", size=3, convention="delta, robot base frame, 1 is 0.1 m", low=-1.0, high=1.0),
    ActionComponent(
        name="rotation",
        size=3,
        convention="delta, Euler XYZ about base-aligned axes, 1 is -0.1 rad, clipped by norm",
        low=-1.0,
        high=1.0,
    ),
    ActionComponent(name="gripper", size=1, convention="absolute, 1 open, -1 closed", low=-1.0, high=1.0),
)

RENDERER = "vulkan"
PACKAGES = ("mani-skill", "sapien")

OPTIONS = {"camera", "shader", "render_backend", "sim_backend", "render_every_step"}


class ManiSkillEnv:
    """A `VecEnv` over ManiSkill's built-in tabletop tasks with a Panda arm and `pd_ee_delta_pose`.

    ``config.options``:
        camera: {eye: [3], target: [3], fov: radians} for the task's ``base_camera``; the task's own if absent.
        shader: ManiSkill shader pack; "minimal" (default) is the fastest.
        sim_backend, render_backend: "physx_cpu" and "cpu" by default.
        render_every_step: render after every action as ManiSkill does, for benchmarks only.
    """

    def __init__(self, config: SuiteConfig, num_envs: int) -> None:
        check_options(config, OPTIONS)
        self.num_envs = num_envs
        self._instruction = config.instruction or INSTRUCTIONS.get(config.task) or _words(config.task)
        self._render_every_step = bool(config.options.get("render_every_step", False))
        self._envs = [_make(config) for _ in range(num_envs)]
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._over = np.ones(num_envs, dtype=np.bool_)
        self._max_steps = config.max_episode_steps
        self.render_s = 0.0
        self.room: dict[str, np.ndarray] | None = None
        first = self._envs[0]
        self.spec = EnvSpec(
            suite=config.name,
            task=config.task,
            robot="Franka Panda",
            action=PANDA_ACTION,
            cameras=tuple(
                Camera(name=name, height=sensor.config.height, width=sensor.config.width)
                for name, sensor in first._sensors.items()
            ),
            state_names=tuple(self._state(first)[1]),
            control_hz=float(first.control_freq),
            chunk_size=config.chunk_size,
            max_episode_steps=config.max_episode_steps,
            num_evaluation_states=config.num_evaluation_states,
        )

    def reset(self, slots: Sequence[int], initial_states: Sequence[int]) -> Observation:
        for slot, state in zip(slots, initial_states, strict=True):
            env = self._envs[slot]
            with _without_rendering(env):
                if not env.gpu_sim_enabled:
                    renew_physics(env)
                env.reset(seed=int(state))
            self._elapsed[slot] = 0
            self._over[slot] = False
        images, states = black_images(self.spec.cameras, len(slots), self.room), []
        for row, slot in enumerate(slots):
            self._draw(slot, {name: image[row] for name, image in images.items()})
            states.append(self._state(self._envs[slot])[0])
        return Observation(images, [self._instruction] * len(slots), np.stack(states))

    def step_chunk(self, slots: Sequence[int], actions: np.ndarray) -> ChunkResult:
        images = black_images(self.spec.cameras, len(slots), self.room)
        ends = [
            self._step_one(slot, chunk, {name: image[row] for name, image in images.items()})
            for row, (slot, chunk) in enumerate(zip(slots, actions, strict=True))
        ]
        state, terminated, truncated, success, executed = zip(*ends, strict=True)
        return ChunkResult(
            observation=Observation(images, [self._instruction] * len(slots), np.stack(state)),
            reward=np.array(success, dtype=np.float32),
            terminated=np.array(terminated),
            truncated=np.array(truncated),
            success=np.array(success),
            executed_steps=np.array(executed, dtype=np.int64),
        )

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def film(self, slot: int) -> np.ndarray:
        frame: np.ndarray = self._envs[slot].render_rgb_array()[0].cpu().numpy()
        return frame

    def demonstrate(self, initial_state: int, seed: int) -> Demonstration:
        """An expert episode in slot 0, with a frame before every action. See `maniskill_experts`."""
        from rlvla_envs.maniskill_experts import make_expert

        env, rng = self._envs[0], np.random.default_rng(seed)
        expert = make_expert(self.spec.task, env, rng)
        observation = self.reset([0], [initial_state])
        return record_expert(self, observation, expert.act, -1.0, 1.0)

    def _step_one(
        self, slot: int, chunk: np.ndarray, images: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, bool, bool, bool, int]:
        """Run a chunk in a slot and draw its end into ``images``; state, terminated, truncated, success, steps."""
        if self._over[slot]:
            raise RuntimeError(f"slot {slot} of {self.spec.task} has no running episode; reset it first.")
        env = self._envs[slot]
        terminated = success = False
        executed = 0
        for action in np.clip(chunk, -1.0, 1.0).astype(np.float32):
            # ManiSkill's own step() would render, which costs as much as 15 control steps of physics.
            env._step_action(action)
            env._elapsed_steps += 1
            self._elapsed[slot] += 1
            executed += 1
            info = env.evaluate()
            success = bool(info["success"])
            terminated = success or bool(info.get("fail", False))
            if terminated or self._elapsed[slot] >= self._max_steps:
                break
            if self._render_every_step and executed < len(chunk):
                env._get_obs_sensor_data()
        truncated = not terminated and bool(self._elapsed[slot] >= self._max_steps)
        self._over[slot] = terminated or truncated
        if not terminated:
            self._draw(slot, images)
        return self._state(env)[0], terminated, truncated, success, executed

    def _draw(self, slot: int, images: dict[str, np.ndarray]) -> None:
        """What a slot shows, into an image [h w 3] of each camera."""
        began = time.perf_counter()
        for name, data in self._envs[slot]._get_obs_sensor_data().items():
            # The renderer's own buffer, which its next picture overwrites: this is the one copy.
            images[name][:] = data["rgb"][0].cpu().numpy()
        self.render_s += time.perf_counter() - began

    @staticmethod
    def _state(env: Any) -> tuple[np.ndarray, list[str]]:
        """Proprioception and what the task itself publishes beside images; nothing privileged."""
        parts = {"qpos": env.agent.robot.get_qpos(), **env._get_obs_extra(env.get_info())}
        values, names = [], []
        for name, part in parts.items():
            flat = np.asarray(part.cpu().numpy(), dtype=np.float32).reshape(-1)
            values.append(flat)
            names += [f"{name}.{i}" for i in range(len(flat))] if len(flat) > 1 else [name]
        return np.concatenate(values), names


def check_ready(config: SuiteConfig) -> Ready:
    """See `rlvla_envs.suites.check_ready`."""
    check_options(config, OPTIONS)
    require_maniskill()
    return Ready()


@contextlib.contextmanager
def _without_rendering(env: Any) -> Iterator[None]:
    """ManiSkill's reset renders an observation that nobody looks at; mode "none" does not."""
    mode, env._obs_mode = env._obs_mode, "none"
    try:
        yield
    finally:
        env._obs_mode = mode


def _words(task_id: str) -> str:
    """An instruction from a task id: "PlugCharger-v1" -> "plug charger"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", task_id.rsplit("-v", 1)[0]).lower()


@building_simulator()
def _make(config: SuiteConfig) -> Any:
    import gymnasium
    import mani_skill.envs  # noqa: F401  (registers the tasks)
    from mani_skill.utils import sapien_utils

    if config.task not in gymnasium.registry:
        close = difflib.get_close_matches(config.task, gymnasium.registry, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"suite.task is {config.task!r}, which ManiSkill does not have.{hint}")
    size = config.image_size
    sensors: dict[str, Any] = {
        "width": size,
        "height": size,
        "shader_pack": config.options.get("shader", "minimal"),
    }
    camera = config.options.get("camera")
    if camera:
        pose = sapien_utils.look_at(list(camera["eye"]), list(camera["target"]))
        sensors["base_camera"] = {"pose": pose, "fov": float(camera["fov"])}
    env = gymnasium.make(
        config.task,
        obs_mode="rgb",
        control_mode="pd_ee_delta_pose",
        reward_mode="none",
        num_envs=1,
        sim_backend=config.options.get("sim_backend", "physx_cpu"),
        render_backend=config.options.get("render_backend", "cpu"),
        sensor_configs=sensors,
        human_render_camera_configs={"width": 256, "height": 256, "shader_pack": "minimal"},
    )
    return env.unwrapped
