"""How sure a success rate is: intervals and the paired test, exact where exact is cheap; many tests at once.

How many trials a claim takes is in `rlvla_algos.power`.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

PRIOR_GROUPS = 3


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion, 95% by default (Wilson 1927).

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials is not a proportion.")
    p = successes / trials
    denominator = 1 + z**2 / trials
    centre = (p + z**2 / (2 * trials)) / denominator
    half = z * math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2)) / denominator
    # At 0 and at n successes the bound is exactly 0 or 1; rounding must not push it past.
    return max(0.0, centre - half), min(1.0, centre + half)


def average_interval(counts: Sequence[tuple[int, int]], z: float = 1.959963984540054) -> tuple[float, float]:
    """Interval of the mean of several independent proportions, 95% by default, each weighing the same.

    Zou and Donner 2008: the distances of the Wilson bounds from each proportion are added as squares. That of one
    proportion is its Wilson interval; it has a width at 0 and at 1 too.

    Args:
        counts: (successes, trials) of each.

    Raises:
        ValueError: none, or one that is not a proportion.
    """
    if not counts:
        raise ValueError("an average needs at least one proportion.")
    rates = [successes / trials if trials else 0.0 for successes, trials in counts]
    bounds = [wilson_interval(successes, trials, z) for successes, trials in counts]
    average = sum(rates) / len(rates)
    down = math.sqrt(sum((rate - low) ** 2 for rate, (low, _) in zip(rates, bounds, strict=True))) / len(rates)
    up = math.sqrt(sum((high - rate) ** 2 for rate, (_, high) in zip(rates, bounds, strict=True))) / len(rates)
    return max(0.0, average - down), min(1.0, average + up)


def pooled_lower_bound(successes: Sequence[int], trials: Sequence[int], z: float = 1.959963984540054) -> float:
    """Lower end of the Wilson interval of a success rate over several groups, such as the seeds of a setting.

    Where the groups differ by more than chance allows, the pooled trials count less: their number is divided by
    the quasi-binomial's dispersion, Pearson's chi-squared over its degrees of freedom, if that is above 1. Of two or
    three groups that is hardly known, so it is drawn towards 1 as if `PRIOR_GROUPS` more had differed as chance has it.

    Raises:
        ValueError: no groups, a group without trials, or more successes than trials.
    """
    pairs = list(zip(successes, trials, strict=False))
    if not pairs or len(successes) != len(trials) or not all(0 <= s <= n and n > 0 for s, n in pairs):
        raise ValueError(f"{list(successes)} successes in {list(trials)} trials are not proportions.")
    total = sum(trials)
    p = sum(successes) / total
    if p == 0:
        # Which rounding would miss.
        return 0.0
    dispersion = 1.0
    if len(trials) > 1 and 0 < p < 1:
        chi2 = sum((s - n * p) ** 2 / (n * p * (1 - p)) for s, n in zip(successes, trials, strict=True))
        dispersion = max(1.0, (chi2 + PRIOR_GROUPS) / (len(trials) - 1 + PRIOR_GROUPS))
    n = total / dispersion
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, (p + z**2 / (2 * n) - half) / (1 + z**2 / n))


def mcnemar_exact(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided exact McNemar test of paired outcomes on the same initial states.

    Only the pairs that changed count: with g gained and l lost, the p-value is that of g or a more
    lopsided split of g + l fair coin tosses. It is 1 when nothing changed.

    Raises:
        ValueError: the two have different lengths, so they are not pairs.
    """
    if len(before) != len(after):
        raise ValueError(
            f"{len(before)} outcomes before and {len(after)} after are not pairs; evaluate both on the same states."
        )
    gained = sum(bool(a) and not b for b, a in zip(before, after, strict=True))
    lost = sum(bool(b) and not a for b, a in zip(before, after, strict=True))
    changed, fewer = gained + lost, min(gained, lost)
    tail = float(sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed)
    return min(1.0, 2 * tail)


def paired_difference_interval(
    before: Sequence[bool], after: Sequence[bool], z: float = 1.959963984540054
) -> tuple[float, float]:
    """Interval of the change in success rate on common initial states (Newcombe 1998, method 10).

    Built from the two Wilson intervals with the correlation of the pairs; stays inside [-1, 1].
    """
    n = len(before)
    a = sum(bool(x) and bool(y) for x, y in zip(before, after, strict=True))
    b = sum(bool(x) and not y for x, y in zip(before, after, strict=True))
    c = sum(not x and bool(y) for x, y in zip(before, after, strict=True))
    d = n - a - b - c
    p_before, p_after = (a + b) / n, (a + c) / n
    low_before, high_before = wilson_interval(a + b, n, z)
    low_after, high_after = wilson_interval(a + c, n, z)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    correlation = 0.0
    if margins:
        numerator = float(a * d - b * c)
        if numerator > 0:
            numerator = max(numerator - n / 2, 0)
        correlation = numerator / math.sqrt(margins)
    change = p_after - p_before
    down_after, up_after = p_after - low_after, high_after - p_after
    down_before, up_before = p_before - low_before, high_before - p_before
    low = change - math.sqrt(max(0.0, down_after**2 - 2 * correlation * down_after * up_before + up_before**2))
    high = change + math.sqrt(max(0.0, up_after**2 - 2 * correlation * up_after * down_before + down_before**2))
    return low, high


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, adjusted so that the chance of one false claim among them keeps the level.

    Holm 1979: the i-th smallest of m is multiplied by m - i + 1, and none becomes smaller than the one before it. The
    tests may depend on each other in any way. In the order given.

    Examples:
        >>> [round(p, 4) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]

    Raises:
        ValueError: a value that is no probability.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"{list(p_values)} holds a value outside [0, 1]; those are not p-values.")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def macro_difference_interval(
    differences: Sequence[Float[np.ndarray, " _"]],
    rng: np.random.Generator,
    *,
    draws: int = 10_000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of the macro average, over tasks, of the change in success rate: paired bootstrap, percentiles.

    The initial states of each task are drawn again with replacement, each with its pair; tasks are fixed, so the
    interval is about these tasks. It has no width where no state changed, and is too narrow by sqrt((n - 1) / n) where
    every task has n states.

    Args:
        differences: of each task, the change at each of its initial states: success after minus success before, in
            [-1, 1]; where a state was visited several times, the mean over the visits.
        rng: equal generators give equal intervals.

    Raises:
        ValueError: no task, or one without states.
    """
    if not differences or any(len(of_task) == 0 for of_task in differences):
        raise ValueError("a macro average needs at least one task, and every task at least one initial state.")
    total = np.zeros(draws)
    for of_task in differences:
        # How often each distinct change is drawn is multinomial; that is cheaper than drawing states.
        values, counts = np.unique(np.asarray(of_task, dtype=np.float64), return_counts=True)
        n = len(of_task)
        total += rng.multinomial(n, counts / n, size=draws) @ values / n
    low, high = np.quantile(total / len(differences), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
