"""Before against after: numbers worked by hand, refusals, and what the tables and the page say."""

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from rlvla.compare import telling_states
from rlvla.compare_page import render
from rlvla.compare_tables import compared_markdown, compared_rows, csv_text, measured_markdown, policy_names
from rlvla.comparison import Comparison, compare_results, points, support_sentence, verdict
from rlvla.config import ConfigError
from rlvla.results import Result
from rlvla_algos.statistics import holm, mcnemar_exact

MakeResult = Callable[..., Result]

BEFORE = {"carrot": [1] * 4 + [0] * 8, "spoon": [0] * 12}
AFTER = {"carrot": [1] * 3 + [0] * 9, "spoon": [1] * 12}


@pytest.fixture
def pair(make_result: MakeResult) -> tuple[list[Result], list[Result]]:
    """Two suites; the spoon is learnt in one of them, nothing happens in the other."""
    other = {"far": [1, 0, 1, 0, 0, 0]}
    return (
        [make_result("sim", BEFORE, "sft"), make_result("ood", other, "sft", notes=("stand-in: a slab",))],
        [make_result("sim", AFTER, "ppo"), make_result("ood", other, "ppo", notes=("stand-in: a slab",))],
    )


def compared(pair: tuple[list[Result], list[Result]]) -> Comparison:
    return compare_results(*pair, trained_on=["sim"])


def test_counts_rates_and_p_values_by_hand(pair: tuple[list[Result], list[Result]]) -> None:
    carrot, spoon, far = compared(pair).tasks
    assert (carrot.gained, carrot.kept, carrot.lost, carrot.never) == (0, 3, 1, 8)
    assert (carrot.before, carrot.after) == pytest.approx((4 / 12, 3 / 12))
    # One change: 2 / 2. Twelve for the better: 2 / 2^12. None: 1.
    assert [t.p_value for t in (carrot, spoon, far)] == [1.0, 2 / 2**12, 1.0]
    # Three tests: the smallest times three.
    assert [t.p_holm for t in (carrot, spoon, far)] == pytest.approx([1.0, 6 / 2**12, 1.0])
    assert [t.shown for t in (carrot, spoon, far)] == [False, True, False]


def test_a_suite_is_the_mean_of_its_tasks_and_its_test_counts_all_episodes(
    pair: tuple[list[Result], list[Result]],
) -> None:
    sim, ood = compared(pair).suites
    # (4/12 + 0) / 2 before, (3/12 + 1) / 2 after; twelve gained, one lost.
    assert (sim.before, sim.after) == pytest.approx((1 / 6, 5 / 8))
    assert sim.p_value == pytest.approx(2 * (1 + 13) / 2**13)
    assert [sim.p_holm, ood.p_holm] == pytest.approx(holm([sim.p_value, 1.0]))
    assert (sim.num_tasks, sim.trials, sim.group) == (2, 24, "trained on")
    assert ood.group == "held out"
    assert sim.interval[0] < sim.difference < sim.interval[1]


def test_a_large_task_weighs_no_more_than_a_small_one(make_result: MakeResult) -> None:
    before = [make_result("sim", {"large": [0] * 90, "small": [0] * 10})]
    after = [make_result("sim", {"large": [0] * 90, "small": [1] * 10})]
    (suite,) = compare_results(before, after, []).suites
    assert suite.after == 0.5


def test_other_suites_beside_it_change_no_interval(pair: tuple[list[Result], list[Result]]) -> None:
    alone = compare_results([pair[0][0]], [pair[1][0]], ["sim"])
    assert alone.suites[0].interval == compared(pair).suites[0].interval


def test_the_bootstrap_draws_initial_states_and_not_visits(make_result: MakeResult) -> None:
    # Ten states, five of them gained, each visited eight times with the same outcome: that is ten draws, not eighty.
    def interval(visits: int) -> tuple[float, float]:
        tasks = {name: ([1] * 5 + [0] * 5) * visits for name in ("a", "b")}
        nothing = {name: [0] * 10 * visits for name in tasks}
        sides = ([make_result("sim", side, visits=visits)] for side in (nothing, tasks))
        return compare_results(*sides, trained_on=[]).suites[0].interval

    assert interval(8) == interval(1)


def test_the_test_agrees_with_one_on_random_outcomes(make_result: MakeResult) -> None:
    rng = np.random.default_rng(3)
    before, after = ({"t": rng.integers(0, 2, 40).tolist()} for _ in range(2))
    (task,) = compare_results([make_result("s", before)], [make_result("s", after)], []).tasks
    assert task.p_value == mcnemar_exact([bool(x) for x in before["t"]], [bool(x) for x in after["t"]])
    assert task.gained + task.kept + task.lost + task.never == 40


def test_other_settings_are_refused_with_both_sides_and_the_cure(make_result: MakeResult) -> None:
    before = [make_result("sim", {"a": [1, 0]}, "sft", temperature=0.6)]
    after = [make_result("sim", {"a": [1, 0]}, "ppo", temperature=1.0)]
    with pytest.raises(ConfigError, match=r"sim\.settings\.temperature +0\.6 +1\.0\n.*rlvla compare runs/sft/policy"):
        compare_results(before, after, [])


def test_a_stand_in_on_one_side_is_refused(make_result: MakeResult) -> None:
    sides = ([make_result("sim", {"a": [1]}, notes=notes)] for notes in ((), ("stand-in: a slab",)))
    with pytest.raises(ConfigError, match=r"sim\.suite\.assets +\[\] +\[\"stand-in: a slab\"\]"):
        compare_results(*sides, trained_on=[])


def test_other_software_on_one_side_is_said(pair: tuple[list[Result], list[Result]]) -> None:
    before, after = pair
    after = [replace(result, versions={"torch": "3.0"}) for result in after]
    said = compare_results(before, after, []).notes
    assert any("other software" in note and "2.9" in note and "3.0" in note for note in said)


def test_a_policy_compared_with_itself_says_so(make_result: MakeResult) -> None:
    one = [make_result("sim", {"a": [1, 0]})]
    assert "Before and after are the same policy." in compare_results(one, one, []).notes


def test_too_few_trials_say_what_they_could_show_and_how_many_would(make_result: MakeResult) -> None:
    before, after = make_result("s", {"a": [0] * 20}), make_result("s", {"a": [1] * 4 + [0] * 16})
    (task,) = compare_results([before], [after], []).tasks
    # Four changes, p = 2 / 16; six would be needed.
    said = support_sentence(task)
    assert said.startswith("4 of 20 episodes changed; below 6 nothing can be significant")
    assert task.support.changes_needed == 6
    assert task.support.trials_needed is not None
    assert task.support.trials_needed > 20
    assert "the +20.0 seen would take about" in said
    assert verdict(task).startswith("no change is shown: from 0.0 to 20.0%")


def test_a_change_that_is_shown_needs_no_excuse(pair: tuple[list[Result], list[Result]]) -> None:
    spoon = compared(pair).tasks[1]
    assert support_sentence(spoon) == ""
    assert verdict(spoon).startswith("success rose from 0.0 to 100.0% (+100.0 points")
    lost = compare_results([pair[1][0]], [pair[0][0]], []).tasks[1]
    assert verdict(lost).startswith("success fell from 100.0 to 0.0%")


def test_the_states_to_film_are_the_first_gained_and_the_first_lost(pair: tuple[list[Result], list[Result]]) -> None:
    # The carrot loses state 3; spoons begin at state 12.
    assert telling_states(pair[0][0], pair[1][0]) == [12, 3]
    assert telling_states(pair[0][1], pair[1][1]) == []


def test_markdown_has_the_table_the_tests_and_what_is_not_shown(pair: tuple[list[Result], list[Result]]) -> None:
    text = compared_markdown(compared(pair), *pair)
    assert "|  | sim (trained on) | ood (held out) |" in text
    assert "| before | 16.7 | 33.3 |" in text
    assert "| after | 62.5 | 33.3 |" in text
    assert "* ood: stand-in: a slab" in text
    assert "no episode changed, 33.3%" in text
    assert "What the trials cannot show" in text
    assert "-0.0" not in text


def test_csv_has_every_number_in_a_row_a_program_can_read(pair: tuple[list[Result], list[Result]]) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(compared_rows(compared(pair))))))
    assert [row["kind"] for row in rows] == ["group"] * 2 + ["suite"] * 2 + ["task"] * 3
    spoon = next(row for row in rows if row["task"] == "spoon")
    assert float(spoon["p_value"]) == 2 / 2**12
    assert spoon["shown"] == "True"


def test_measurements_side_by_side(make_result: MakeResult) -> None:
    text = measured_markdown({name: [make_result("sim", BEFORE, name, notes=("slab",))] for name in ("sft", "ppo")})
    assert "| sft | 16.7 |" in text
    assert "| sim | carrot | 33.3 [13.8, 60.9], 4 of 12 | 33.3 [13.8, 60.9], 4 of 12 |" in text
    assert "* sim: slab" in text


class Tags(HTMLParser):
    """Opened and not closed, and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "line", "rect", "circle"):
            self.open.append(tag)
        found: Mapping[str, str | None] = dict(attrs)
        self.fetched += [str(found[key]) for key in ("src", "href") if key in found]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass


def test_the_page_needs_nothing_else_and_names_stand_ins(pair: tuple[list[Result], list[Result]]) -> None:
    page = render(compared(pair), *pair)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert all(source.startswith("data:") for source in tags.fetched)
    assert "default-src 'none'" in page
    assert "Not the published conditions: ood." in page
    assert "ood: stand-in: a slab" in page
    assert "Nothing is here to show" in page


def test_a_hostile_name_stays_text(make_result: MakeResult) -> None:
    name = "<script>alert(1)</script>"
    before, after = ([make_result(name, {name: [0, 1]}, policy, notes=(name,))] for policy in (name, "b"))
    page = render(compare_results(before, after, []), before, after)
    assert "<script>alert" not in page


def test_policies_get_names_that_tell_them_apart() -> None:
    from pathlib import Path

    assert policy_names([Path("runs/sft/policy"), Path("runs/ppo/policy")]) == ["sft", "ppo"]
    assert policy_names([Path("a/x/policy"), Path("b/x/policy")]) == ["x-1", "x-2"]


@pytest.mark.parametrize(
    ("difference", "shown"), [(0.125, "+12.5"), (-0.0001, "0.0"), (0.0, "0.0"), (-0.0051, "-0.5"), (-0.2, "-20.0")]
)
def test_points_have_a_sign_and_nothing_has_none(difference: float, shown: str) -> None:
    assert points(difference) == shown


def test_the_interval_of_a_suite_holds_its_rate_where_trials_differ(make_result: MakeResult) -> None:
    sides = {"large": [1] * 190 + [0] * 10, "small": [0] * 10}
    (suite,) = compare_results([make_result("s", sides)], [make_result("s", sides)], []).suites
    assert suite.before == pytest.approx(0.475)
    assert suite.before_interval[0] < suite.before < suite.before_interval[1] < 0.7
