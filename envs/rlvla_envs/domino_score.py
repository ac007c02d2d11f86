"""DOMINO's Manipulation Score of one episode, from facts that anybody can check. Needs numpy alone.

After script/eval_metrics.py of H-EmbodVis/DOMINO: MS = route completion x product of penalties.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

PENALTY_OUT_OF_BOUNDS = 0.5
"""The object left the table's bounds before it was touched."""
PENALTY_CLUTTER = 0.8
"""For every thing on the table that is no part of the task and was touched by the robot."""
NEAR, REACHED = 0.01, 0.05
"""Metres: a hand that begins nearer than the first has no way to go, and has arrived within the second."""


class EpisodeFacts(NamedTuple):
    """What the score is made of. Positions in metres, in the world's frame."""

    success: bool
    hands_first: Float[np.ndarray, "2 3"]
    """Of the left and the right hand, when the object begins to move."""
    hands_last: Float[np.ndarray, "2 3"]
    target_last: Float[np.ndarray, "3"]
    """Of the moving object: when the episode ended, or when it left the table's bounds."""
    out_of_bounds: bool = False
    clutter_touched: int = 0
    """Different things, each counted once."""


def route_completion(facts: EpisodeFacts) -> float:
    """0 to 100: all of it for a success; else how much nearer the better hand came to where the object was at last.

    >>> hands = np.array([[0.0, 0, 0], [1.0, 0, 0]])
    >>> route_completion(EpisodeFacts(False, hands, hands + [0.25, 0, 0], np.array([1.0, 0, 0])))
    50.0
    """
    if facts.success:
        return 100.0
    best = 0.0
    for first, last in zip(facts.hands_first, facts.hands_last, strict=True):
        before = float(np.linalg.norm(first - facts.target_last))
        after = float(np.linalg.norm(last - facts.target_last))
        if before < NEAR:
            best = max(best, 1.0 if after < REACHED else 0.5)
        else:
            best = max(best, (before - after) / before)
    return 100.0 * min(best, 1.0)


def manipulation_score(facts: EpisodeFacts) -> float:
    """0 to 100."""
    penalty = PENALTY_OUT_OF_BOUNDS if facts.out_of_bounds else 1.0
    return route_completion(facts) * penalty * PENALTY_CLUTTER**facts.clutter_touched
