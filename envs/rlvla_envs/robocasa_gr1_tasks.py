"""RoboCasa-GR1's tasks as data: names, numbers of states, the order of channels. Needs no simulator."""

from __future__ import annotations

import difflib

_CLOSE = ("CupToDrawer", "PotatoToMicrowave", "MilkToMicrowave", "BottleToCabinet", "WineToCabinet", "CanToDrawer")
_NOVEL = (
    ("Cuttingboard", ("Basket", "Cardboardbox", "Pan", "Pot", "Tieredbasket")),
    ("Placemat", ("Basket", "Bowl", "Plate", "Tieredshelf")),
    ("Plate", ("Bowl", "Cardboardbox", "Pan", "Plate")),
    ("Tray", ("Cardboardbox", "Plate", "Pot", "Tieredbasket", "Tieredshelf")),
)
TASKS = (
    *(f"PnP{name}Close" for name in _CLOSE),
    *(f"PosttrainPnPNovelFrom{source}To{target}SplitA" for source, targets in _NOVEL for target in targets),
)
"""The 24 of the published evaluations: six that close a door behind the object, 18 between containers."""

STATES_PER_TASK = 50
"""Evaluation states of every task; the benchmark has no list, each is a seed."""

STREAMS = (("left_arm", 7), ("right_arm", 7), ("left_hand", 6), ("right_hand", 6), ("waist", 3))
"""Of state and action alike: 29 joints in the order of the benchmark's data."""
STATE_NAMES = tuple(f"{name}.{i}" for name, size in STREAMS for i in range(size))


def chosen_tasks(choice: str) -> tuple[str, ...]:
    """Tasks that ``suite.task`` chooses: ``all``, names joined with ``+``, or their numbers.

    Raises:
        ValueError: an unknown task, or one that is named twice.
    """
    chosen: list[str] = []
    for word in choice.split("+"):
        if word == "all":
            chosen += TASKS
        elif word in TASKS:
            chosen.append(word)
        elif word.isdecimal() and int(word) < len(TASKS):
            chosen.append(TASKS[int(word)])
        else:
            close = difflib.get_close_matches(word, [*TASKS, "all"], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"suite.task is {choice!r}; {word!r} is no task of robocasa_gr1.{hint} It must be all, a number below "
                f"{len(TASKS)}, or names as `rlvla suites robocasa_gr1` lists them, joined with +."
            )
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"suite.task is {choice!r}, which names a task twice.")
    return tuple(chosen)
