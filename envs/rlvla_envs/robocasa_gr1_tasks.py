"""RoboCasa-GR1's tasks as data: names, numbers of states, the order of channels. Needs no simulator."""

from __future__ import annotations

from rlvla_envs.common import chosen_names

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
    """See `rlvla_envs.common.chosen_names`."""
    return chosen_names("robocasa_gr1", TASKS, choice)
