"""Which trials go on: asynchronous successive halving, as pure functions of what the trials have shown so far."""

import math
from collections.abc import Sequence


def every(iterations: int, *, rungs: int, halving: int, wanted: int = 0) -> int:
    """Iterations between evaluations during a run, such that `rung_iterations` are among them; ``wanted`` is what the
    user asked for, 0 nothing."""
    if wanted or not rungs:
        return wanted
    return max(1, iterations // int(halving**rungs))


def rung_iterations(iterations: int, spacing: int, *, rungs: int, halving: int) -> list[int]:
    """After how many iterations a run's first seed is compared with others.

    Examples:
        >>> rung_iterations(40, 10, rungs=2, halving=2)
        [10, 20]
        >>> rung_iterations(8, 4, rungs=2, halving=2)
        [4]
    """
    if spacing < 1:
        return []
    found = [spacing * halving**k for k in range(rungs)]
    return [iteration for iteration in found if iteration < iterations]


def goes_on(value: float, others: Sequence[float], halving: int) -> bool:
    """Whether a trial is among the best 1/halving of those that have come to the same rung, itself included.

    ``others`` were there before, those that were stopped there among them. Nobody waits: who comes early meets little
    competition, and the first 2 ``halving`` - 1 none, or the second trial of a study would have to beat the first. A
    tie goes on.

    Examples:
        Four with .2 .4 .6 .8: the next one needs to be among the best three (5 / 2, rounded up).

        >>> [goes_on(v, [0.2, 0.4, 0.6, 0.8], 2) for v in (0.3, 0.4, 0.5)]
        [False, True, True]
    """
    size = len(others) + 1
    better = sum(other > value for other in others)
    return size < 2 * halving or better < math.ceil(size / halving)


def step_of(seed: int, iteration: int | None, iterations: int) -> int:
    """A rung as one number, in the order in which a trial comes to them; iteration None is the end of a seed's run."""
    return seed * (iterations + 1) + (iterations if iteration is None else iteration)
