"""What a number of pairs can show: by hand, by enumerating every outcome, by simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from rlvla_algos.power import (
    detectable_difference,
    fewest_changes,
    mcnemar_power,
    one_way_needed,
    trials_needed,
)
from rlvla_algos.statistics import mcnemar_exact


def test_five_changes_are_never_enough_and_six_are_when_all_go_one_way() -> None:
    # 2 / 2^5 = 0.0625, 2 / 2^6 = 0.03125.
    assert fewest_changes() == 6
    assert one_way_needed(5) is None
    assert one_way_needed(6) == 6
    # Twelve: 2 (1 + 12 + 66) / 4096 = 0.0386 for ten one way, 2 (79 + 220) / 4096 = 0.146 for nine.
    assert one_way_needed(12) == 10


@given(changed=st.integers(0, 80), alpha=st.sampled_from([0.05, 0.01, 0.05 / 10]))
def test_what_is_needed_is_the_smallest_lopsided_split_that_scipy_calls_significant(changed: int, alpha: float) -> None:
    significant = [k for k in range(math.ceil(changed / 2), changed + 1) if changed and p(k, changed) < alpha]
    assert one_way_needed(changed, alpha) == (min(significant) if significant else None)


def p(gained: int, changed: int) -> float:
    return float(binomtest(gained, changed, 0.5).pvalue)


def test_power_of_six_sure_gains_is_one_and_of_five_nought() -> None:
    assert mcnemar_power(6, 1.0, 0.0) == pytest.approx(1)
    assert mcnemar_power(5, 1.0, 0.0) == 0
    # Six pairs, all must be gained: one half to the sixth.
    assert mcnemar_power(6, 0.5, 0.0) == pytest.approx(1 / 64)


@pytest.mark.parametrize(("trials", "gain", "loss"), [(7, 0.6, 0.1), (8, 0.3, 0.3), (8, 0.05, 0.9)])
def test_power_is_the_share_of_all_outcomes_that_the_test_rejects(trials: int, gain: float, loss: float) -> None:
    chance = {1: gain, -1: loss, 0: 1 - gain - loss}
    expected = 0.0
    for outcome in itertools.product((1, 0, -1), repeat=trials):
        before, after = [o < 0 for o in outcome], [o > 0 for o in outcome]
        if mcnemar_exact(before, after) < 0.05:
            expected += math.prod(chance[o] for o in outcome)
    assert mcnemar_power(trials, gain, loss) == pytest.approx(expected)


def test_power_equals_a_sum_over_scipys_binomials() -> None:
    trials, gain, loss, alpha = 216, 0.15, 0.04, 0.05 / 4
    expected = 0.0
    for changed in range(trials + 1):
        needed = one_way_needed(changed, alpha)
        if needed is not None:
            share = gain / (gain + loss)
            tails = binom.sf(needed - 1, changed, share) + binom.cdf(changed - needed, changed, share)
            expected += binom.pmf(changed, trials, gain + loss) * tails
    assert mcnemar_power(trials, gain, loss, alpha) == pytest.approx(expected, abs=1e-9)


def test_without_a_change_the_test_errs_less_often_than_its_level() -> None:
    assert 0 < mcnemar_power(200, 0.1, 0.1) < 0.05


def test_the_trials_needed_have_the_power_and_a_tenth_fewer_have_not() -> None:
    for gain, loss in ((0.3, 0.05), (0.12, 0.08), (0.05, 0.0), (0.02, 0.2)):
        needed = trials_needed(gain, loss)
        assert needed is not None
        assert mcnemar_power(needed, gain, loss) >= 0.8
        assert mcnemar_power(int(0.9 * needed), gain, loss) < 0.8


def test_the_trials_needed_decide_four_simulated_comparisons_in_five() -> None:
    gain, loss = 0.2, 0.08
    needed = trials_needed(gain, loss)
    assert needed is not None
    draws = np.random.default_rng(0).multinomial(needed, [gain, loss, 1 - gain - loss], size=1_000)
    found = sum(int(g) + int(b) > 0 and p(int(g), int(g) + int(b)) < 0.05 for g, b, _ in draws)
    assert 760 < found < 850


def test_no_number_of_trials_shows_that_nothing_changed() -> None:
    assert trials_needed(0.1, 0.1) is None
    # A tenth of a point in pairs that mostly agree: more than anyone plays, and still a number.
    assert (trials_needed(0.0510, 0.05) or 0) > 100_000


def test_a_stricter_level_and_fewer_trials_find_larger_changes_only() -> None:
    at = [detectable_difference(n, 0.05) for n in (24, 100, 400)]
    assert None not in at
    assert at == sorted(at, reverse=True, key=lambda d: d or 0)
    found, stricter = detectable_difference(100, 0.05), detectable_difference(100, 0.05, alpha=0.005)
    assert (stricter or 0) > (found or 0) > 0
    # It is the border: a point less has not the power.
    assert mcnemar_power(100, 0.05 + (found or 0), 0.05) >= 0.8 > mcnemar_power(100, 0.04 + (found or 0), 0.05)


def test_five_trials_detect_nothing() -> None:
    assert detectable_difference(5, 0.0) is None


def test_shares_that_are_no_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a gain of 0\.8 and a loss of 0\.4"):
        mcnemar_power(10, 0.8, 0.4)
