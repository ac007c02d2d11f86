"""CALVIN: chains of five subtasks in a row on one table, counted by how many of them are solved.

The protocol: `calvin_tasks`; one simulation: `calvin_world`. The suite lives in an interpreter of its own (`HOME`), and
its code and meshes in the user's clone; docs/how-to/calvin.md says what a user has to know.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlvla_envs.base import ActionComponent, Camera, EnvSpec, SuiteConfig
from rlvla_envs.calvin_tasks import CHAINS, LENGTH, STATE_NAMES, SUBTASK_STEPS
from rlvla_envs.slots import Look, Slot, TellingEnv, check_slotted, ready_at_home
from rlvla_envs.suite_home import Home
from rlvla_envs.suites import NotReadyError, Ready, named_clone

if TYPE_CHECKING:
    from rlvla_envs.calvin_world import World

HOME = Home(
    name="calvin",
    modules=("pybullet", "hydra", "gym"),
    python=(3, 11),
    megabytes=1000,
    download_megabytes=350,
    newest=(3, 12),  # numpy 1.26
)

CLONE = "git clone --recurse-submodules https://github.com/mees/calvin"
VARIABLE = "RLVLA_CALVIN"
"""Names the clone where ``suite.options.root`` does not."""
FILES = (
    "calvin_env/conf/config_data_collection.yaml",
    "calvin_env/calvin_env/envs/play_table_env.py",
    "calvin_env/calvin_env/envs/tasks.py",
    "calvin_models/calvin_agent/evaluation/multistep_sequences.py",
    "calvin_models/conf/annotations/new_playtable_validation.yaml",
    "calvin_models/conf/callbacks/rollout/tasks/new_playtable_tasks.yaml",
)

ACTION = (
    ActionComponent(name="translation", size=3, convention="delta, world frame, 1 is 0.02 m", low=-1.0, high=1.0),
    ActionComponent(name="rotation", size=3, convention="delta, euler xyz, 1 is 0.05 rad", low=-1.0, high=1.0),
    ActionComponent(name="gripper", size=1, convention="absolute, -1 closed, 1 open", low=-1.0, high=1.0),
)
CAMERAS = ("rgb_static", "rgb_gripper")
CONTROL_HZ = 30.0
MAX_IMAGE_SIZE = 256
"""Pixels; the benchmark draws 200 and 84."""
SCENE = "calvin_scene_D_eval"
"""Table D, on which policies of tables A, B and C are measured."""

TASKS = ("chains", "0", "all")
"""One task under the names that every suite understands."""
OPTIONS = {"root", "scene", "subtask_steps", "render_every_step"}

PACKAGES = ("pybullet", "numpy")

MB_PER_PROCESS = 200
MB_PER_WORLD = 150
"""A process with one simulation took 270 MB."""


class CalvinEnv(TellingEnv["World"]):
    """A `VecEnv` of CALVIN's chains; an episode is a chain, and is solved when all five subtasks are.

    The instruction is that of the subtask to be solved now. The step that solves one ends its chunk, so that the policy
    looks before it begins the next. ``ChunkResult.metrics`` has ``chain_length`` and ``in_a_row_1`` to ``in_a_row_5``.

    ``config.task`` is ``chains``, the only one.
    ``config.options``:
        root: clone of mees/calvin; RLVLA_CALVIN otherwise.
        scene: a file of calvin_env/conf/scene.
        subtask_steps: after which a subtask is lost, 360.
        render_every_step: draw after every action, for benchmarks and tests only.

    Raises:
        NotReadyError: the clone is not there or not whole.
        ValueError: ``num_envs`` is not 1. The benchmark builds a part of its robot in the process's first simulation
            whatever simulation it is making, so the others would lack it.
    """

    def __init__(self, config: SuiteConfig, num_envs: int) -> None:
        _check(config)
        if num_envs != 1:
            raise ValueError(
                f"CALVIN was asked for {num_envs} simulations in a process; it must be 1, because the benchmark puts a "
                "part of every robot into the first. Set workers.envs_per_actor=1 and workers.num_actors for more."
            )
        self._root = find_clone(config)
        self._size = config.image_size
        self._scene, self._limit = str(config.options.get("scene", SCENE)), _limit(config)
        variant = "" if self._limit == SUBTASK_STEPS else f"subtask_steps={self._limit}"
        spec = EnvSpec(
            suite=config.name,
            task=config.task,
            robot="Franka Panda",
            action=ACTION,
            cameras=tuple(Camera(name=name, height=self._size, width=self._size) for name in CAMERAS),
            state_names=STATE_NAMES,
            control_hz=CONTROL_HZ,
            chunk_size=config.chunk_size,
            max_episode_steps=config.max_episode_steps,
            num_evaluation_states=CHAINS,
            tasks=TASKS[:1],
            evaluation_states_per_task=(CHAINS,),
            variant=variant,
        )
        super().__init__(config, num_envs, spec, render_every_step=bool(config.options.get("render_every_step", False)))

    def _make(self, task: int) -> World:
        from rlvla_envs.calvin_world import World

        return World(self._root, self._scene, self._size, self._limit)

    def _see(self, slot: Slot[World]) -> Look:
        assert slot.world is not None
        return slot.world.see()


def find_clone(config: SuiteConfig) -> Path:
    """The user's clone.

    Raises:
        NotReadyError: nobody says where it is, or it lacks something.
    """
    root = named_clone(config, VARIABLE, absent="CALVIN's code and meshes are in no package: clone them", fix=CLONE)
    scene = config.options.get("scene", SCENE)
    wanted = [*FILES, f"calvin_env/conf/scene/{scene}.yaml", "calvin_env/data"]
    absent = [name for name in wanted if not (root / name).exists()]
    if absent:
        hint = " Its submodules were not cloned." if not any((root / "calvin_env").glob("*")) and root.exists() else ""
        raise NotReadyError(
            f"{root} is no clone of mees/calvin, or one of another version: {absent[0]} is missing.{hint}", fix=CLONE
        )
    _check_git(root)
    return root


def _limit(config: SuiteConfig) -> int:
    return int(config.options.get("subtask_steps", SUBTASK_STEPS))


def _check_git(root: Path) -> None:
    """The benchmark asks git for its own version when a world is made, and breaks where there is none."""
    above = [root / "calvin_env", root, *root.parents]
    if not any((folder / ".git").exists() for folder in above):
        raise NotReadyError(
            f"{root} is no git repository, which CALVIN asks for its version: clone it, or make it one with `git init "
            "&& git add -A && git commit -m calvin`.",
            fix=CLONE,
        )


def _check(config: SuiteConfig) -> None:
    check_slotted(config, OPTIONS, who="CALVIN", largest_image=MAX_IMAGE_SIZE, states=CHAINS, kind="chains")
    if config.task not in TASKS:
        raise ValueError(f"suite.task is {config.task!r}; CALVIN has one, chains: five subtasks in a row.")
    if _limit(config) < 1:
        raise ValueError(f"suite.options.subtask_steps is {_limit(config)}; it must be at least 1. Usual: 360.")
    if config.max_episode_steps < LENGTH * _limit(config):
        raise ValueError(
            f"suite.max_episode_steps is {config.max_episode_steps}; a chain of {LENGTH} subtasks of {_limit(config)} "
            f"steps needs {LENGTH * _limit(config)}."
        )


def outline(config: SuiteConfig) -> dict[str, int]:
    """See `rlvla_envs.suites.outline`."""
    return {TASKS[0]: CHAINS}


def check_ready(config: SuiteConfig) -> Ready:
    """See `rlvla_envs.suites.check_ready`."""
    _check(config)
    ready = ready_at_home(config, HOME)
    find_clone(config)
    return ready


def memory_mb(config: SuiteConfig, num_envs: int) -> int:
    """What one process with ``num_envs`` environments takes."""
    return MB_PER_PROCESS + MB_PER_WORLD * num_envs
