"""The ten WidowX tasks as data: what lies where, what the robot is told, and which rule says that it is solved.

Nothing here needs a simulator. World frame: z up, metres; the robot stands at +x and looks along -x, so "right" of
something is +y of it and "in front of" it is +x. Quaternions are w x y z. Axes: B environments, P positions,
Q rotations.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float

from rlvla_envs.base import FIRST_TRAINING_STATE
from rlvla_envs.simpler_rules import Rule, RuleName, over_target, put_on, relation

CARROT, PLATE = "bridge_carrot_generated_modified", "bridge_plate_objaverse_larger"
SPOON, TOWEL = "bridge_spoon_generated_modified", "table_cloth_generated_shorter"
GREEN_CUBE, YELLOW_CUBE = "baked_green_cube_3cm", "baked_yellow_cube_3cm"
EGGPLANT, BASKET = "eggplant", "dummy_sink_target_plane"

TABLE_HEIGHT = 0.8695

HALF_EXTENT = {
    CARROT: (0.064, 0.017),
    PLATE: (0.055, 0.055),
    SPOON: (0.073, 0.018),
    TOWEL: (0.051, 0.051),
    GREEN_CUBE: (0.015, 0.015),
    YELLOW_CUBE: (0.015, 0.015),
}
"""Half length and width seen from above, metres, rounded up from the collision meshes."""


@dataclass(frozen=True)
class Task:
    """One task. Configuration k is position ``k // Q`` and rotation ``k % Q``, as ManiSkill's ``episode_id`` counts."""

    name: str
    instruction: str
    source: str
    target: str
    positions: Float[np.ndarray, "P 2 3"]
    """Of source and target, before they settle."""
    rotations: Float[np.ndarray, "Q 2 4"]
    rules: Mapping[RuleName, Rule]
    scene: Literal["table", "sink"] = "table"
    metadata: str = "info_bridge_custom_v0.json"
    max_steps: int = 60
    excluded: tuple[int, ...] = ()
    """Configurations that are no task at all; the docs say why."""

    @property
    def visible(self) -> tuple[str, ...]:
        """Objects that are drawn over the photograph. The basket is part of it."""
        return (self.source,) if self.scene == "sink" else (self.source, self.target)

    @cached_property
    def configurations(self) -> tuple[int, ...]:
        every = range(len(self.positions) * len(self.rotations))
        return tuple(k for k in every if k not in self.excluded)

    def layout(self, configuration: int) -> Float[np.ndarray, "2 7"]:
        """Poses (position, quaternion) of source and target in one configuration."""
        position, rotation = divmod(configuration, len(self.rotations))
        return np.concatenate([self.positions[position], self.rotations[rotation]], axis=1)

    def training_layout(self, state: int, attempt: int = 0) -> Float[np.ndarray, "2 7"]:
        """A configuration drawn by the state, with source and target moved and turned a little.

        Args:
            attempt: counts up when the objects did not come to rest where they were put.
        """
        rng = np.random.default_rng([state, attempt])
        layout = self.layout(self.configurations[rng.integers(len(self.configurations))])
        # The basket is painted on the background, so it stays; its walls leave the eggplant little room.
        moved, reach, turn = ((0,), 0.006, 0.26) if self.scene == "sink" else ((0, 1), 0.015, 0.30)
        while True:
            jittered = layout.copy()
            for i in moved:
                jittered[i, :2] += rng.uniform(-reach, reach, 2)
                jittered[i, 3:] = turned(jittered[i, 3:], rng.uniform(-turn, turn))
            if self.scene == "sink":
                # Dropped, not wedged in: a rotation of the recorded poses would meet the sink's floor.
                jittered[0, 2] += 0.01
                return jittered
            if clear_of_each_other(self.source, jittered[0], self.target, jittered[1]):
                return jittered


def turned(quaternion: Float[np.ndarray, "4"], yaw: float) -> Float[np.ndarray, "4"]:
    """A rotation followed by one about the world's z axis, radians."""
    w, x, y, z = quaternion
    c, s = np.cos(yaw / 2), np.sin(yaw / 2)
    return np.array([c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w])


def yaw_of(quaternion: Float[np.ndarray, "4"]) -> float:
    """Of something that lies flat: the angle of its x axis in the table's plane, radians."""
    w, x, y, z = quaternion
    return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))


def clear_of_each_other(
    first: str, first_pose: Float[np.ndarray, "7"], second: str, second_pose: Float[np.ndarray, "7"]
) -> bool:
    """Whether two rectangles on the table are at least 8 mm apart along some side of one of them."""
    axes: list[np.ndarray] = []
    corners: list[np.ndarray] = []
    for model, pose in ((first, first_pose), (second, second_pose)):
        yaw = yaw_of(pose[3:])
        sides = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])
        signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
        corners.append(pose[:2] + (signs * HALF_EXTENT[model]) @ sides)
        axes.extend(sides)
    for axis in axes:
        a, b = corners[0] @ axis, corners[1] @ axis
        if max(a.min() - b.max(), b.min() - a.max()) > 0.008:
            return True
    return False


def _pairs(*half_edges: float, source_height: float, target_height: float) -> Float[np.ndarray, "P 2 3"]:
    """Source and target on different corners of squares around the middle of the table."""
    found = []
    for half in half_edges:
        corners = [(-0.16 + half * x, half * y) for x in (-1, 1) for y in (-1, 1)]
        found += [
            [(*a, source_height), (*b, target_height)]
            for i, a in enumerate(corners)
            for b in corners[:i] + corners[i + 1 :]
        ]
    return np.array(found)


def _yaws(*degrees: float) -> Float[np.ndarray, "Q 2 4"]:
    """The source turned about z, the target as it is."""
    flat = np.array([1.0, 0.0, 0.0, 0.0])
    return np.array([[turned(flat, np.deg2rad(angle)), flat] for angle in degrees])


def _sink_positions() -> Float[np.ndarray, "P 2 3"]:
    x, y = np.meshgrid(np.linspace(-0.115, -0.095, 2), np.linspace(0.191, 0.221, 4), indexing="ij")
    return np.array([[(a, b, 0.933), (-0.125, 0.025, 1.0)] for a, b in zip(x.flat, y.flat, strict=True)])


# Recorded by SimplerEnv's authors: an eggplant at rest in the sink, in steps of 45 degrees from -45.
_EGGPLANT_ROTATIONS = (
    (0.543729, 0.82549, 0.0746101, 0.131747),
    (0.559342, 0.817133, -0.138906, -0.0116353),
    (0.543029, 0.789388, -0.267736, -0.101503),
    (-0.40751, -0.532897, 0.652644, 0.352154),
    (-0.157154, 0.235481, 0.75148, -0.595927),
    (-0.020137, 0.0213848, 0.953791, -0.299033),
    (-0.108854, 0.337692, 0.897378, -0.262348),
    (0.366114, 0.618434, 0.571457, 0.396152),
)

_CARROT_ON_PLATE = Task(
    name="carrot_on_plate",
    instruction="put carrot on plate",
    source=CARROT,
    target=PLATE,
    positions=_pairs(0.075, source_height=0.887529, target_height=0.869532),
    rotations=_yaws(180, -90),
    rules=put_on(),
)
_SPOON_ON_TOWEL = Task(
    name="spoon_on_towel",
    instruction="put the spoon on the towel",
    source=SPOON,
    target=TOWEL,
    positions=_pairs(0.075, source_height=0.88, target_height=0.875),
    rotations=_yaws(0, 90),
    rules=put_on(contact=False),
)
_STACK_CUBE = Task(
    name="stack_cube",
    instruction="stack the green block on the yellow block",
    source=GREEN_CUBE,
    target=YELLOW_CUBE,
    positions=_pairs(0.05, 0.1, source_height=0.887529, target_height=0.887529),
    rotations=_yaws(0),
    rules=put_on(),
    metadata="info_bridge_custom_baked_tex_v0.json",
)
_EGGPLANT_IN_BASKET = Task(
    name="eggplant_in_basket",
    instruction="put eggplant into yellow basket",
    source=EGGPLANT,
    target=BASKET,
    positions=_sink_positions(),
    rotations=np.array([[q, (1.0, 0.0, 0.0, 0.0)] for q in _EGGPLANT_ROTATIONS]),
    rules=put_on(height=0.06, contact=False),
    scene="sink",
    max_steps=120,
    # It spawns inside the sink's wall and is thrown out of the sink at once.
    excluded=(61,),
)


def _variant(base: Task, name: str, instruction: str, rules: Mapping[RuleName, Rule], **changes: object) -> Task:
    return replace(base, name=name, instruction=instruction, rules=rules, **changes)  # type: ignore[arg-type]


def _unless(base: Task, axis: int) -> tuple[int, ...]:
    """Configurations whose source is already beyond the target along an axis, and level with it on the other."""
    offset = (base.positions[:, 0] - base.positions[:, 1])[:, :2]
    already = (offset[:, axis] > 0) & (np.abs(offset[:, 1 - axis]) < 1e-6)
    return tuple(k for k in base.configurations if already[k // len(base.rotations)])


def _distance(offset: np.ndarray) -> np.ndarray:
    length: np.ndarray = np.linalg.norm(offset[:, :2], axis=1)
    return length


_OOD = (
    _variant(
        _SPOON_ON_TOWEL,
        "move_away",
        "move the spoon away from the towel",
        relation(
            lambda s: _distance(s.offset) > _distance(s.source_start - s.target_start) + 0.02,
            touching=False,
        ),
    ),
    _variant(
        _SPOON_ON_TOWEL,
        "move_right",
        "move the spoon to the right of the towel",
        relation(lambda s: (s.offset[:, 1] > 0.05) & (np.abs(s.offset[:, 0]) < 0.075), touching=False),
        excluded=_unless(_SPOON_ON_TOWEL, axis=1),
    ),
    _variant(
        _CARROT_ON_PLATE,
        "place_near",
        "put the carrot near the plate",
        relation(lambda s: (_distance(s.offset) > 0.055) & (_distance(s.offset) < 0.125), touching=False),
    ),
    _variant(
        _SPOON_ON_TOWEL,
        "place_right",
        "put the spoon on the right half of the towel",
        relation(
            lambda s: (
                over_target(s, height=0.02)
                & (s.offset[:, 1] > 0)
                & (s.offset[:, 1] < 0.06)
                & (np.abs(s.offset[:, 0]) < 0.06)
            ),
            touching=True,
        ),
    ),
    _variant(
        _CARROT_ON_PLATE,
        "put_in_front",
        "put the carrot in front of the plate",
        relation(lambda s: (s.offset[:, 0] > 0.055) & (np.abs(s.offset[:, 1]) < 0.075), touching=False),
        excluded=_unless(_CARROT_ON_PLATE, axis=0),
    ),
    _variant(
        _STACK_CUBE,
        "stack_yellow",
        "stack the yellow block on the green block",
        relation(lambda s: over_target(s, height=0.02), touching=True),
        source=YELLOW_CUBE,
        target=GREEN_CUBE,
    ),
)

SUITE_TASKS: dict[str, dict[str, Task]] = {
    "simpler_env": {t.name: t for t in (_CARROT_ON_PLATE, _SPOON_ON_TOWEL, _STACK_CUBE, _EGGPLANT_IN_BASKET)},
    "simpler_env_ood": {t.name: t for t in _OOD},
}


def chosen_tasks(suite: str, text: str) -> tuple[Task, ...]:
    """The tasks that ``suite.task`` names: one, several joined with ``+``, or ``all``.

    >>> [task.name for task in chosen_tasks("simpler_env", "stack_cube+carrot_on_plate")]
    ['stack_cube', 'carrot_on_plate']

    Raises:
        ValueError: a task that the suite does not have, or one twice.
    """
    tasks = SUITE_TASKS[suite]
    if text == "all":
        return tuple(tasks.values())
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name in tasks:
            continue
        elsewhere = [other for other, known in SUITE_TASKS.items() if name in known]
        close = difflib.get_close_matches(name, tasks, n=1, cutoff=0.5)
        hint = (
            f" It is a task of suite={elsewhere[0]}." if elsewhere else f" Did you mean {close[0]!r}?" if close else ""
        )
        raise ValueError(
            f"suite.task is {text!r}; {suite} has no task {name!r}.{hint} "
            f"Tasks: {', '.join(tasks)}, several joined with +, or all."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"suite.task is {text!r}, which names a task twice.")
    return tuple(tasks[name] for name in names)


def configuration_of(tasks: tuple[Task, ...], state: int) -> tuple[int, int | None]:
    """Index of the task an initial state belongs to, and its enumerated configuration.

    Evaluation states count through the configurations, task after task. Training states belong to task
    ``state % len(tasks)`` and have no configuration of their own (None).
    """
    if state >= FIRST_TRAINING_STATE:
        return state % len(tasks), None
    first = 0
    for index, task in enumerate(tasks):
        if 0 <= state - first < len(task.configurations):
            return index, task.configurations[state - first]
        first += len(task.configurations)
    raise ValueError(
        f"initial state {state} is neither an evaluation state (0 to {first - 1}) nor a training state "
        f"(from {FIRST_TRAINING_STATE})."
    )
