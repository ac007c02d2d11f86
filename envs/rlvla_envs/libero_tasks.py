"""LIBERO's suites as data: tasks, instructions, step limits, and which initial states there are. Needs no simulator.

docs/how-to/libero.md has the sources of the limits, and what each perturbation of LIBERO-PRO changes.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rlvla_envs.libero_names import NAMES

if TYPE_CHECKING:
    from jaxtyping import Float

STATES_PER_TASK = 50
"""Initial states that the benchmark stores for every task, of LIBERO and of LIBERO-PRO alike."""

STEP_LIMITS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Those of OpenVLA's evaluation, which most published numbers use. The files of configs/suite set them."""

PERTURBATIONS = ("lan", "object", "swap", "task")
"""LIBERO-PRO: other words, other objects, other places, another goal."""
PERTURBED_WORDS = ("lan", "task")
"""Perturbations whose instruction is that of the perturbed task. The other two keep LIBERO's own."""
PRO = "_pro"
PERTURBED_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")

SUITE_NAMES = (*NAMES, *(suite + PRO for suite in PERTURBED_SUITES))

_SCENE = re.compile(r"^[A-Z_]+SCENE\d+_")


class Task(NamedTuple):
    """One task of the benchmark."""

    name: str
    """Unique in its suite; ``swap/NAME`` in a suite of LIBERO-PRO."""
    folder: str
    """Of its files in the benchmark."""
    file: str
    """Name of its files, without suffix."""
    perturbation: str = ""

    def instruction(self, perturbed: str) -> str:
        """What the policy is told.

        LIBERO's evaluations take the words from the file's name, not from the task definition, whose words differ
        ("Pick the akita black bowl ...").

        Args:
            perturbed: the words of the task definition.
        """
        return perturbed.strip() if self.perturbation in PERTURBED_WORDS else words_of(self.file)


def words_of(file: str) -> str:
    """The instruction in a file's name.

    >>> words_of("KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet")
    'close the top drawer of the cabinet'
    """
    return _SCENE.sub("", file).replace("_", " ")


def all_tasks(suite: str) -> tuple[Task, ...]:
    """Tasks of a suite in the order of the benchmark; of LIBERO-PRO, perturbation after perturbation."""
    if not suite.endswith(PRO):
        return tuple(Task(name, suite, name) for name in NAMES[suite])
    base = suite.removesuffix(PRO)
    return tuple(Task(f"{kind}/{name}", f"{base}_{kind}", name, kind) for kind in PERTURBATIONS for name in NAMES[base])


def chosen_tasks(suite: str, choice: str) -> tuple[Task, ...]:
    """Tasks that ``suite.task`` chooses: names joined with ``+``, ``all``, or a perturbation of LIBERO-PRO.

    A number stands for the name at that place of the benchmark, counted from 0.

    Raises:
        ValueError: an unknown task, or one that is named twice.
    """
    tasks = all_tasks(suite)
    by_name = {task.name: task for task in tasks}
    chosen: list[Task] = []
    for word in choice.split("+"):
        if word == "all":
            chosen += tasks
        elif word in by_name:
            chosen.append(by_name[word])
        elif word.isdecimal() and int(word) < len(tasks):
            chosen.append(tasks[int(word)])
        elif word and any(task.perturbation == word for task in tasks):
            chosen += [task for task in tasks if task.perturbation == word]
        else:
            close = difflib.get_close_matches(word, [*by_name, "all"], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            kinds = f", one of {', '.join(PERTURBATIONS)}" if suite.endswith(PRO) else ""
            raise ValueError(
                f"suite.task is {choice!r}; {word!r} is no task of {suite}.{hint} It must be all{kinds}, a number "
                f"below {len(tasks)}, or names as `rlvla suites {suite}` lists them, joined with +."
            )
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"suite.task is {choice!r}, which names a task twice.")
    return tuple(chosen)


# --- what the simulator says, as policies of LIBERO know it


def axis_angle(quaternion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3"]:
    """Rotation vector in radians of a unit quaternion (x, y, z, w).

    Angles lie in [0, 2 pi], as in LIBERO's data: q and -q, the same rotation, give different vectors.
    """
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3] * (2.0 * np.arccos(w) / sine))


def proprioception(
    position: Float[np.ndarray, "3"], quaternion: Float[np.ndarray, "4"], gripper: Float[np.ndarray, "2"]
) -> Float[np.ndarray, "8"]:
    """The state that LIBERO's data has: hand position (metres, world), its axis-angle, both finger joints (metres)."""
    return np.concatenate([position, axis_angle(quaternion), gripper]).astype(np.float32)


STATE_NAMES = (
    *(f"eef_position.{i}" for i in range(3)),
    *(f"eef_axis_angle.{i}" for i in range(3)),
    *(f"gripper.{i}" for i in range(2)),
)
