"""RoboTwin 2.0's tasks as data: names, step limits, seeds, the order of channels. Needs no simulator."""

from __future__ import annotations

import json
from pathlib import Path

from rlvla_envs.common import chosen_names

STEP_LIMITS = {
    "adjust_bottle": 400,
    "beat_block_hammer": 400,
    "blocks_ranking_rgb": 1200,
    "blocks_ranking_size": 1200,
    "click_alarmclock": 400,
    "click_bell": 400,
    "dump_bin_bigbin": 600,
    "grab_roller": 400,
    "handover_block": 800,
    "handover_mic": 600,
    "hanging_mug": 900,
    "lift_pot": 400,
    "move_can_pot": 400,
    "move_pillbottle_pad": 400,
    "move_playingcard_away": 400,
    "move_stapler_pad": 400,
    "open_laptop": 700,
    "open_microwave": 1500,
    "pick_diverse_bottles": 400,
    "pick_dual_bottles": 400,
    "place_a2b_left": 400,
    "place_a2b_right": 400,
    "place_bread_basket": 700,
    "place_bread_skillet": 500,
    "place_burger_fries": 500,
    "place_can_basket": 700,
    "place_cans_plasticbox": 800,
    "place_container_plate": 400,
    "place_dual_shoes": 600,
    "place_empty_cup": 500,
    "place_fan": 400,
    "place_mouse_pad": 400,
    "place_object_basket": 700,
    "place_object_scale": 400,
    "place_object_stand": 400,
    "place_phone_stand": 400,
    "place_shoe": 500,
    "press_stapler": 400,
    "put_bottles_dustbin": 1700,
    "put_object_cabinet": 700,
    "rotate_qrcode": 400,
    "scan_object": 500,
    "shake_bottle": 700,
    "shake_bottle_horizontally": 700,
    "stack_blocks_three": 1200,
    "stack_blocks_two": 800,
    "stack_bowls_three": 1200,
    "stack_bowls_two": 900,
    "stamp_seal": 400,
    "turn_switch": 400,
}
"""The 50 tasks, with the actions after which the benchmark ends an episode."""
TASKS = tuple(STEP_LIMITS)

BOX_TASKS = (
    "blocks_ranking_rgb",
    "blocks_ranking_size",
    "handover_block",
    "stack_blocks_three",
    "stack_blocks_two",
)
"""Those that want no object from the assets."""

SUITE_CONFIGS = {"robotwin_easy": "demo_clean", "robotwin_hard": "demo_randomized"}
"""The benchmark's own configurations: a bare table, or clutter, textures, lights and table heights at random."""

STATES_PER_TASK = 100
"""Evaluation states of every task."""
FIRST_SEED = 100_000
"""Of the benchmark's evaluation, as published: it counts up from here."""
MOVES = 10
"""Seeds that are tried where a scene is not stable."""

ARM_JOINTS = 6
STATE_NAMES = tuple(
    f"{side}_{part}" for side in ("left", "right") for part in (*(f"arm.{i}" for i in range(ARM_JOINTS)), "gripper")
)


def chosen_tasks(suite: str, choice: str) -> tuple[str, ...]:
    """Tasks that ``suite.task`` chooses: ``all``, names joined with ``+``, or their numbers.

    Raises:
        ValueError: an unknown task, or one that is named twice.
    """
    return chosen_names(suite, TASKS, choice)


def seeds_to_try(seed: int, moves: int = MOVES) -> list[int]:
    """A seed, and those that take its place where the scene it draws does not stand still.

    The benchmark moves on to the next number, which is another state's own; here the numbers of two states never meet.

    >>> seeds_to_try(100_007)[:3]
    [100007, 100107, 100207]
    """
    return [seed + STATES_PER_TASK * move for move in range(moves)]


def read_seeds(file: Path, tasks: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Seeds that somebody's expert solved, from ``{task: {"success_seeds": [...]}}``, RLinf's form.

    Returns:
        `STATES_PER_TASK` for each of ``tasks``.

    Raises:
        ValueError: no such file, of another form, or with too few seeds or one of them twice.
    """
    form = f'it must be {{"TASK": {{"success_seeds": [{STATES_PER_TASK} numbers]}}}}'
    try:
        said = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"suite.options.seeds={file} cannot be read: {error}; {form}.") from error
    found: dict[str, tuple[int, ...]] = {}
    for task in tasks:
        entry = said.get(task) if isinstance(said, dict) else None
        numbers = entry.get("success_seeds") if isinstance(entry, dict) else None
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**32 for n in numbers):
            raise ValueError(f"suite.options.seeds={file} has no list of seeds for {task}; {form}.")
        chosen = tuple(numbers[:STATES_PER_TASK])
        if len(set(chosen)) < STATES_PER_TASK:
            raise ValueError(f"suite.options.seeds={file} has {len(set(chosen))} different seeds for {task}; {form}.")
        found[task] = chosen
    return found
