"""RoboCasa-GR1's 24 tabletop tasks for a humanoid's two arms, hands and waist: 29 absolute joint targets.

Tasks: `robocasa_gr1_tasks`; one simulation: `robocasa_gr1_world`; what replaces assets that are not there:
`robocasa_gr1_standins`. The suite lives in an interpreter of its own (`HOME`); docs/how-to/robocasa-gr1.md says what a
user has to know.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rlvla_envs.base import ActionComponent, Camera, EnvSpec, SuiteConfig
from rlvla_envs.robocasa_gr1_standins import ASSETS, generate, missing_files
from rlvla_envs.robocasa_gr1_standins import VERSION as STAND_INS_VERSION
from rlvla_envs.robocasa_gr1_tasks import STATE_NAMES, STATES_PER_TASK, STREAMS, chosen_tasks
from rlvla_envs.slots import Slot, SlottedEnv, check_slotted, ready_at_home
from rlvla_envs.stand_ins import FOLDER as STAND_INS
from rlvla_envs.stand_ins import Assets, is_current
from rlvla_envs.suite_home import Home
from rlvla_envs.suites import NotReadyError, Ready

if TYPE_CHECKING:
    from rlvla_envs.robocasa_gr1_world import World

VERSION = "2"
"""2: each simulation of a process is drawn with its own meshes and textures."""

HOME = Home(
    name="robocasa_gr1",
    modules=("robocasa_gr1", "robosuite", "mujoco"),
    python=(3, 11),
    megabytes=950,
    download_megabytes=350,
    newest=(3, 13),  # numba 0.61
)

DOWNLOAD = "-m robocasa_gr1.scripts.download_tabletop_assets -y"
"""After the environment's Python: fetches the official assets, gigabytes, from Hugging Face and box.com."""

ACTION = tuple(
    ActionComponent(name=name, size=size, convention="absolute, joint targets, radians", low=-math.pi, high=math.pi)
    for name, size in STREAMS
)
"""The benchmark declares [-1, 1], which its own demonstrations leave: an elbow rests at -2.1."""
CAMERAS = ("ego_view", "ego_view_cropped")
"""The whole picture with black bars, or the part of it that GR00T's own data shows."""
CONTROL_HZ = 20.0
MAX_IMAGE_SIZE = 256
"""Pixels; the benchmark scales its picture to this before anyone sees it."""

OPTIONS = {"camera", "render_every_step"}

RENDERER = "mujoco"
PACKAGES = ("praxis-robocasa-gr1", "praxis-robosuite", "mujoco")

MB_PER_PROCESS = 600
"""Python, MuJoCo, robosuite and numba, and the process that speaks to them."""
MB_PER_WORLD = 1100
"""One simulation and its picture buffers. With both, 1.7 GB were measured, on stand-ins."""


class RoboCasaGR1Env(SlottedEnv["World"]):
    """A `VecEnv` of RoboCasa-GR1's tasks.

    ``config.task`` is ``all``, one task, or several joined with ``+``.
    ``config.options``:
        camera: ``ego_view`` (the default) or ``ego_view_cropped``.
        render_every_step: draw after every action as the benchmark does, for benchmarks and tests only.

    Raises:
        NotReadyError: there are neither official assets nor stand-ins.
    """

    def __init__(self, config: SuiteConfig, num_envs: int) -> None:
        _check(config)
        self._tasks = chosen_tasks(config.task)
        self._camera, self._size = _camera(config), config.image_size
        self._assets = find_assets(Path(sys.prefix))
        spec = EnvSpec(
            suite=config.name,
            task=config.task,
            robot="Fourier GR1",
            arms="two arms, hands and waist",
            action=ACTION,
            cameras=(Camera(name=self._camera, height=self._size, width=self._size),),
            state_names=STATE_NAMES,
            control_hz=CONTROL_HZ,
            chunk_size=config.chunk_size,
            max_episode_steps=config.max_episode_steps,
            num_evaluation_states=STATES_PER_TASK * len(self._tasks),
            tasks=self._tasks,
            evaluation_states_per_task=(STATES_PER_TASK,) * len(self._tasks),
            notes=(f"stand-in: every asset in {self._assets.folder}",) if self._assets.unscored else (),
            unscored=self._assets.unscored,
        )
        super().__init__(config, num_envs, spec, render_every_step=bool(config.options.get("render_every_step", False)))

    def _make(self, task: int) -> World:
        from rlvla_envs.robocasa_gr1_world import World

        return World(self._tasks[task], self._size, self._assets.folder, cropped=self._camera == CAMERAS[1])

    def _worded(self, slot: Slot[World]) -> str:
        assert slot.world is not None
        return slot.world.language


def find_assets(prefix: Path) -> Assets:
    """The official assets where they are whole, else stand-ins where `make_stand_ins` has put some.

    Args:
        prefix: folder of the virtual environment.

    Raises:
        NotReadyError: neither; with the command that brings the official ones.
    """
    package, official = _package(prefix), f"{prefix / 'bin/python'} {DOWNLOAD}"
    absent = missing_files(package, package / ASSETS)
    if not absent:
        return Assets(package / ASSETS, "")
    if is_current(prefix / STAND_INS, STAND_INS_VERSION):
        return Assets(
            prefix / STAND_INS,
            f"its assets in {prefix / STAND_INS} are boxes and grey pictures that `rlvla suites setup` generated. A "
            f"score needs the official ones ({official}). Without a score: "
            "`rlvla eval policy=PATH suite=robocasa_gr1 smoke_test=true`.",
        )
    other = " (its stand-ins are of another release of rlvla)" if (prefix / STAND_INS).exists() else ""
    raise NotReadyError(
        f"robocasa_gr1 has no assets{other}: {len(absent)} files and folders of objects are missing, the first is "
        f"{absent[0]}. Download the official ones, gigabytes: {official}. Or, to try things without a score, generate "
        f"stand-ins: {HOME.cure} stand_ins=true.",
        fix=official,
    )


def make_stand_ins(prefix: Path) -> int:
    """Write stand-ins into an environment, beside what it has; returns how many files."""
    return generate(_package(prefix), prefix / STAND_INS)


def _package(prefix: Path) -> Path:
    if prefix == Path(sys.prefix):
        found = importlib.util.find_spec("robocasa_gr1")
        if found is not None and found.origin is not None:
            return Path(found.origin).parent
    installed = sorted(prefix.glob("lib/python3*/site-packages/robocasa_gr1"))
    if not installed:
        raise NotReadyError(f"{prefix} has no package robocasa_gr1.", fix=HOME.cure)
    return installed[-1]


def _camera(config: SuiteConfig) -> str:
    return str(config.options.get("camera", CAMERAS[0]))


def _check(config: SuiteConfig) -> None:
    states = STATES_PER_TASK * len(chosen_tasks(config.task))
    check_slotted(
        config, OPTIONS, who="RoboCasa-GR1", largest_image=MAX_IMAGE_SIZE, states=states, kind="evaluation states"
    )
    if _camera(config) not in CAMERAS:
        raise ValueError(f"suite.options.camera is {_camera(config)!r}; it must be one of {', '.join(CAMERAS)}.")


def outline(config: SuiteConfig) -> dict[str, int]:
    """See `rlvla_envs.suites.outline`."""
    return dict.fromkeys(chosen_tasks(config.task), STATES_PER_TASK)


def check_ready(config: SuiteConfig) -> Ready:
    """See `rlvla_envs.suites.check_ready`. The note says that no score can be had."""
    _check(config)
    ready = ready_at_home(config, HOME)
    if config.python is not None:
        return ready
    prefix = Path(sys.prefix) if HOME.is_here() else HOME.folder()
    assets = find_assets(prefix)
    official = f"{prefix / 'bin/python'} {DOWNLOAD}"
    return Ready(("stand-in assets: it runs, and gives no score",), official) if assets.unscored else ready


def memory_mb(config: SuiteConfig, num_envs: int) -> int:
    """What one process with ``num_envs`` environments takes."""
    return MB_PER_PROCESS + MB_PER_WORLD * (num_envs + (len(chosen_tasks(config.task)) > 1))
