"""Intervals and the paired test, against published numbers and scipy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rlvla_algos.statistics import (
    average_interval,
    holm,
    macro_difference_interval,
    mcnemar_exact,
    paired_difference_interval,
    wilson_interval,
)

outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def paired(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Outcomes before and after with these counts."""
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    after = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return before, after


def test_wilson_of_three_in_ten() -> None:
    assert wilson_interval(3, 10) == pytest.approx((0.108, 0.603), abs=5e-4)


@given(trials=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_equals_scipy(trials: int, share: float) -> None:
    successes = round(share * trials)
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(trials=st.integers(1, 5000))
def test_wilson_stays_inside_zero_and_one_at_the_ends(trials: int) -> None:
    for successes in (0, trials // 2, trials):
        low, high = wilson_interval(successes, trials)
        assert 0 <= low < high <= 1
    assert wilson_interval(0, trials)[0] == pytest.approx(0, abs=1e-12)
    assert wilson_interval(trials, trials)[1] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (4, 3), (-1, 3)])
def test_wilson_refuses_what_is_not_a_proportion(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes in {trials} trials is not a proportion"):
        wilson_interval(successes, trials)


def test_mcnemar_by_hand() -> None:
    # Five changed, one of them for the worse: 2 (1 + 5) / 2^5 = 0.375; the seven that stayed do not count.
    assert mcnemar_exact(*paired(4, 4, 1, 3)) == pytest.approx(0.375)
    # Nothing lost in six: 2 / 64.
    assert mcnemar_exact(*paired(0, 6, 0, 0)) == pytest.approx(0.03125)


@pytest.mark.parametrize("cells", [(10, 0, 0, 10), (0, 3, 3, 0), (5, 0, 0, 0)])
def test_mcnemar_is_one_when_nothing_changed_or_as_much_was_lost_as_gained(cells: tuple[int, ...]) -> None:
    assert mcnemar_exact(*paired(*cells)) == 1


@given(both=st.integers(0, 20), gained=st.integers(0, 60), lost=st.integers(0, 60), neither=st.integers(0, 20))
def test_mcnemar_is_a_fair_coins_binomial_test(both: int, gained: int, lost: int, neither: int) -> None:
    expected = binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar_exact(*paired(both, gained, lost, neither)) == pytest.approx(expected)


@given(pairs=outcomes)
def test_mcnemar_does_not_care_which_side_is_before(pairs: list[tuple[bool, bool]]) -> None:
    before, after = zip(*pairs, strict=True)
    assert mcnemar_exact(before, after) == mcnemar_exact(after, before)


def test_outcomes_that_are_not_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 outcomes before and 3 after are not pairs"):
        mcnemar_exact([True, False], [True, False, True])
    with pytest.raises(ValueError):  # noqa: PT011  (zip's own words)
        paired_difference_interval([True, False], [True, False, True])


@pytest.mark.parametrize(
    ("cells", "interval"),
    [
        # Newcombe 1998, Statistics in Medicine 17:2635, table III, method 10: cells e, f, g, h, and the limits of
        # (f - g) / n.
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((20, 12, 2, 16), (0.0562, 0.3292)),
        ((18, 12, 2, 18), (0.0562, 0.3290)),
        ((36, 14, 0, 0), (0.1528, 0.4167)),
        ((35, 14, 0, 1), (0.1461, 0.4175)),
        ((18, 14, 0, 18), (0.1441, 0.3963)),
        ((2, 97, 1, 0), (0.8721, 0.9854)),
        ((1, 97, 1, 1), (0.8736, 0.9850)),
        ((0, 30, 0, 0), (0.8395, 1.0)),
        ((54, 0, 0, 0), (-0.0664, 0.0664)),
        ((53, 0, 0, 1), (-0.0729, 0.0729)),
        ((30, 0, 0, 24), (-0.0358, 0.0358)),
    ],
)
def test_the_paired_interval_reproduces_newcombes_table(cells: tuple[int, ...], interval: tuple[float, float]) -> None:
    assert paired_difference_interval(*paired(*cells)) == pytest.approx(interval, abs=1e-4)


@given(pairs=outcomes)
def test_the_paired_interval_contains_the_change_and_stays_in_range(pairs: list[tuple[bool, bool]]) -> None:
    before, after = zip(*pairs, strict=True)
    low, high = paired_difference_interval(before, after)
    change = (sum(after) - sum(before)) / len(pairs)
    assert -1 - 1e-12 <= low <= change <= high <= 1 + 1e-12


@given(pairs=outcomes)
def test_swapping_before_and_after_mirrors_the_interval(pairs: list[tuple[bool, bool]]) -> None:
    before, after = zip(*pairs, strict=True)
    low, high = paired_difference_interval(before, after)
    assert paired_difference_interval(after, before) == pytest.approx((-high, -low), abs=1e-12)


def test_holm_by_hand() -> None:
    # The smallest times 3, the next times 2, and the largest cannot fall below it.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferronis(p_values: list[float]) -> None:
    # A hypothesis falls where every set of hypotheses that holds it falls by Bonferroni.
    everyone = range(len(p_values))
    sets = [s for size in everyone for s in itertools.combinations(everyone, size + 1)]
    for i, adjusted in enumerate(holm(p_values)):
        worst = max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s)
        assert adjusted == pytest.approx(worst)


def test_holm_refuses_what_is_no_p_value() -> None:
    with pytest.raises(ValueError, match="not p-values"):
        holm([0.5, 1.5])


def test_the_macro_bootstrap_is_every_possible_resample_weighed_alike() -> None:
    # Two tasks of four and three states: all 256 x 27 resamples.
    tasks = [np.array([1.0, 0.0, 0.0, -1.0]), np.array([1.0, 1.0, 0.0])]
    means = [[float(np.mean(s)) for s in itertools.product(t, repeat=len(t))] for t in tasks]
    every = [(a + b) / 2 for a in means[0] for b in means[1]]
    expected = np.quantile(every, [0.025, 0.975])
    found = macro_difference_interval(tasks, np.random.default_rng(0), draws=100_000)
    # Resampled averages are multiples of 1/24; the quantile is one of them.
    assert found == pytest.approx(tuple(expected), abs=1e-9)


def test_a_task_counts_once_however_many_states_it_has() -> None:
    large, small = np.ones(400), np.zeros(4)
    assert macro_difference_interval([large, small], np.random.default_rng(0)) == (0.5, 0.5)


def test_equal_generators_give_equal_intervals_and_others_nearly_so() -> None:
    tasks = [np.tile([1.0, 0.0, -1.0, 1.0], 20)]
    one, same, other = (macro_difference_interval(tasks, np.random.default_rng(s)) for s in (1, 1, 2))
    assert one == same
    assert other == pytest.approx(one, abs=0.02)
    assert one[0] < 0.25 < one[1]


def test_a_macro_average_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        macro_difference_interval([], np.random.default_rng(0))
    with pytest.raises(ValueError, match="at least one initial state"):
        macro_difference_interval([np.zeros(0)], np.random.default_rng(0))


def test_the_interval_of_an_average_by_hand() -> None:
    # Wilson of 3 in 10 is (.108, .603), that of 0 in 10 (0, .278): the average is .15,
    # down sqrt(.192^2 + 0) / 2 = .096, up sqrt(.303^2 + .278^2) / 2 = .206.
    assert average_interval([(3, 10), (0, 10)]) == pytest.approx((0.054, 0.356), abs=1e-3)


@given(successes=st.integers(0, 30), more=st.integers(0, 30))
def test_the_interval_of_an_average_of_one_is_wilsons(successes: int, more: int) -> None:
    trials = successes + more + 1
    assert average_interval([(successes, trials)]) == pytest.approx(wilson_interval(successes, trials))


def test_the_interval_of_an_average_holds_it_in_nineteen_of_twenty_simulations() -> None:
    rng = np.random.default_rng(0)
    rates, trials = np.array([0.05, 0.5, 0.9]), np.array([24, 63, 20])
    drawn = rng.binomial(trials, rates, size=(2_000, 3))
    held = 0
    for counts in drawn.tolist():
        low, high = average_interval(list(zip(counts, trials.tolist(), strict=True)))
        held += low <= rates.mean() <= high
    assert 0.935 < held / 2_000 < 0.975


def test_an_average_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one proportion"):
        average_interval([])
