"""What a number of paired trials can show, and how many it takes: the power of the exact McNemar test.

Pairs change for the better with probability ``gain`` and for the worse with ``loss``; only those that changed count.
Power is exact: the number of changed pairs is binomial, and so is the gained part of them.
"""

import math
from statistics import NormalDist

import numpy as np

EXACT_UP_TO = 5_000
"""Trials; beyond, the normal approximation is closer than anyone can plan."""


def one_way_needed(changed: int, alpha: float = 0.05) -> int | None:
    """How many of ``changed`` pairs must have changed the same way for p < ``alpha``, two-sided; None: not even all.

    Examples:
        >>> one_way_needed(6), one_way_needed(5), one_way_needed(12)
        (6, None, 10)
    """
    tail = 0
    for fewer in range(changed // 2 + 1):
        tail += math.comb(changed, fewer)
        if 2 * tail / 2**changed >= alpha:
            return changed - fewer + 1 if fewer else None
    return changed // 2 + 1


def fewest_changes(alpha: float = 0.05) -> int:
    """Below so many changed pairs no outcome is significant: 6 for 0.05."""
    return next(n for n in range(1, 1_000) if 2 / 2**n < alpha)


def mcnemar_power(trials: int, gain: float, loss: float, alpha: float = 0.05) -> float:
    """Probability that ``trials`` pairs give p < ``alpha``, two-sided, in either direction.

    Raises:
        ValueError: ``gain`` and ``loss`` are not probabilities of outcomes that exclude each other.
    """
    if not (0 <= gain <= 1 and 0 <= loss <= 1 and gain + loss <= 1 + 1e-12):
        raise ValueError(f"a gain of {gain} and a loss of {loss} must be in [0, 1] and sum to at most 1.")
    share = min(1.0, gain + loss)
    if share == 0:
        return 0.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])

    def binomial(n: int, p: float) -> np.ndarray:
        k = np.arange(n + 1)
        if p in (0.0, 1.0):
            sure: np.ndarray = (k == n * p).astype(np.float64)
            return sure
        choose = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
        mass: np.ndarray = np.exp(choose + k * math.log(p) + (n - k) * math.log1p(-p))
        return mass

    power = 0.0
    for changed, probability in enumerate(binomial(trials, share)):
        if probability < 1e-12:
            continue
        fair = 2 * np.cumsum(binomial(changed, 0.5)[: changed // 2 + 1])
        reach = int(np.count_nonzero(fair < alpha))
        if reach:
            gained = binomial(changed, gain / share)
            power += float(probability * (gained[:reach].sum() + gained[-reach:].sum()))
    return min(1.0, power)


def trials_needed(gain: float, loss: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """About how many pairs show a change of ``gain`` - ``loss`` with probability ``power``; None where it is 0.

    Raises:
        ValueError: as `mcnemar_power`.
    """
    mcnemar_power(1, gain, loss)
    change, share = abs(gain - loss), gain + loss
    if change < 1e-12:
        return None
    normal = NormalDist()
    spread = normal.inv_cdf(1 - alpha / 2) * math.sqrt(share) + normal.inv_cdf(power) * math.sqrt(share - change**2)
    # Connor 1987; it forgets that counts are whole, and so says too few.
    about = math.ceil((spread / change) ** 2)
    if about > EXACT_UP_TO:
        return about
    low, high = 0, about
    while mcnemar_power(high, gain, loss, alpha) < power:
        low, high = high, 2 * high + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if mcnemar_power(middle, gain, loss, alpha) >= power else (middle, high)
    return high


def detectable_difference(trials: int, loss: float, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The smallest change in success rate that ``trials`` pairs show with probability ``power``, where a share ``loss``
    of them changes the other way; None where no change would do."""
    if trials < 1 or mcnemar_power(trials, 1 - loss, loss, alpha) < power:
        return None
    low, high = loss, 1 - loss
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if mcnemar_power(trials, middle, loss, alpha) >= power else (middle, high)
    return high - loss
