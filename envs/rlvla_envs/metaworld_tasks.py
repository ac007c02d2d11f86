"""Meta-World's tasks as data: names, words, which suite has which, and what a policy may know. Needs no simulator."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

WORDS = {
    "assembly-v3": "pick up the ring by its handle and put it over the peg",
    "basketball-v3": "pick up the basketball and drop it into the hoop",
    "bin-picking-v3": "take the cube out of its bin and put it into the other bin",
    "box-close-v3": "pick up the lid and put it on the box",
    "button-press-topdown-v3": "press the button down from above",
    "button-press-topdown-wall-v3": "reach over the wall and press the button down from above",
    "button-press-v3": "press the button",
    "button-press-wall-v3": "go around the wall and press the button",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine to the goal",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "lift the ring off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "turn the lock to lock the door",
    "door-open-v3": "open the door",
    "door-unlock-v3": "turn the lock to unlock the door",
    "hand-insert-v3": "put the hand into the hole",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-open-v3": "turn the faucet on",
    "faucet-close-v3": "turn the faucet off",
    "hammer-v3": "pick up the hammer and drive the nail into the wall",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "pick-place-wall-v3": "pick up the puck and bring it over the wall to the goal",
    "pick-out-of-hole-v3": "pick the puck out of the hole and bring it to the goal",
    "pick-place-v3": "pick up the puck and bring it to the goal",
    "plate-slide-v3": "slide the plate forward into the cabinet",
    "plate-slide-side-v3": "slide the plate sideways into the cabinet",
    "plate-slide-back-v3": "slide the plate back out of the cabinet",
    "plate-slide-back-side-v3": "slide the plate sideways out of the cabinet",
    "peg-insert-side-v3": "pick up the peg and insert it into the hole in the side",
    "peg-unplug-side-v3": "pull the peg out of the hole in the side",
    "soccer-v3": "push the ball into the goal",
    "stick-push-v3": "pick up the stick and push the bottle to the goal with it",
    "stick-pull-v3": "pick up the stick and pull the bottle to the goal with it",
    "push-v3": "push the puck to the goal",
    "push-wall-v3": "push the puck around the wall to the goal",
    "push-back-v3": "push the block back to the goal",
    "reach-v3": "move the hand to the goal",
    "reach-wall-v3": "move the hand over the wall to the goal",
    "shelf-place-v3": "pick up the block and put it on the shelf",
    "sweep-into-v3": "sweep the block into the hole",
    "sweep-v3": "sweep the block off the table",
    "window-open-v3": "slide the window open",
    "window-close-v3": "slide the window closed",
}
"""Every task in the order of the benchmark's MT50, and our words for it: the benchmark has none."""

MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)
ML10_TRAIN = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "sweep-v3",
    "basketball-v3",
)
ML10_TEST = ("drawer-open-v3", "door-close-v3", "shelf-place-v3", "sweep-into-v3", "lever-pull-v3")
ML45_TEST = ("bin-picking-v3", "box-close-v3", "hand-insert-v3", "door-lock-v3", "door-unlock-v3")

SUITE_TASKS = {
    "metaworld_mt10": MT10,
    "metaworld_mt50": tuple(WORDS),
    "metaworld_ml10_train": ML10_TRAIN,
    "metaworld_ml10_test": ML10_TEST,
    "metaworld_ml45_train": tuple(name for name in WORDS if name not in ML45_TEST),
    "metaworld_ml45_test": ML45_TEST,
}
"""The benchmark's own sets."""

STATES_PER_TASK = 50
"""Evaluation states of every task: as many as the benchmark has goals."""

STEP_LIMIT = 500
"""That of the benchmark; docs/how-to/metaworld.md has others. The files of configs/suite set it."""


def chosen_tasks(suite: str, choice: str) -> tuple[str, ...]:
    """Tasks that ``suite.task`` chooses: ``all``, names of the suite's tasks joined with ``+``, or their numbers.

    Raises:
        ValueError: an unknown task, or one that is named twice.
    """
    tasks = SUITE_TASKS[suite]
    chosen: list[str] = []
    for word in choice.split("+"):
        if word == "all":
            chosen += tasks
        elif word in tasks:
            chosen.append(word)
        elif word.isdecimal() and int(word) < len(tasks):
            chosen.append(tasks[int(word)])
        else:
            raise ValueError(
                f"suite.task is {choice!r}; {word!r} is no task of {suite}.{_hint(suite, word)} It must be all, a "
                f"number below {len(tasks)}, or names as `rlvla suites {suite}` lists them, joined with +."
            )
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"suite.task is {choice!r}, which names a task twice.")
    return tuple(chosen)


def _hint(suite: str, word: str) -> str:
    if word in WORDS:
        homes = [name for name, tasks in SUITE_TASKS.items() if word in tasks]
        return f" It is one of {', '.join(homes)}."
    close = difflib.get_close_matches(word, [*SUITE_TASKS[suite], "all"], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


STATE_NAMES = ("hand_position.0", "hand_position.1", "hand_position.2", "gripper")


def proprioception(observation: Float[np.ndarray, "39"]) -> Float[np.ndarray, "4"]:
    """What a robot knows of itself: hand position (metres, world), and how far the gripper is open, in [0, 1].

    The benchmark's observation goes on with poses of objects, those of the step before, and the goal. A policy that
    was told these would have nothing to look for in the picture.
    """
    return np.asarray(observation[:4], dtype=np.float32)
