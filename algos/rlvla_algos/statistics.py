"""How sure a success rate is: intervals and the paired test, exact where exact is cheap."""

import math
from collections.abc import Sequence


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
