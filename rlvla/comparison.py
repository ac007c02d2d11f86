"""Two policies on the same episodes: what changed, task by task and suite by suite, and whether the trials show it.

Pure: results in, numbers out. Claims rest on the exact paired test alone; intervals say how large a change may be.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlvla.config import ConfigError
from rlvla.evaluate import Evaluation
from rlvla.results import Result, differences
from rlvla.seeding import Stream, keyed_rng
from rlvla_algos.power import detectable_difference, fewest_changes, one_way_needed, trials_needed
from rlvla_algos.statistics import (
    average_interval,
    holm,
    macro_difference_interval,
    mcnemar_exact,
    paired_difference_interval,
)

LEVEL = 0.05
"""Of each family of tests: all tasks, all suites, the two groups of suites."""
POWER = 0.8
TRAINED, HELD_OUT = "trained on", "held out"


@dataclass(frozen=True)
class Support:
    """What the number of trials can carry."""

    level: float
    """p below which the first claim of the family is made: 0.05 / number of tests, Holm's first step."""
    changes_needed: int
    """With fewer changed episodes nothing can be significant."""
    one_way_needed: int | None
    """How many of the episodes that did change would have to have changed the same way; None: not even all."""
    detectable: float | None
    """Smallest change in success that so many trials show four times in five; None: no change."""
    trials_needed: int | None
    """About how many trials show the change that was seen, four times in five; None where none was seen."""


@dataclass(frozen=True)
class Change:
    """Before against after on one task, one suite or one group of suites. Rates are means over tasks."""

    suite: str
    """Or the group."""
    task: str
    """Empty for a suite or a group."""
    group: str
    num_tasks: int
    trials: int
    before: float
    after: float
    before_interval: tuple[float, float]
    """95%: Wilson's for a task, those of several added as squares."""
    after_interval: tuple[float, float]
    gained: int
    kept: int
    lost: int
    never: int
    p_value: float
    """Exact McNemar, two-sided, over all its episodes."""
    p_holm: float
    """Adjusted for its family."""
    interval: tuple[float, float]
    """Of the change, 95%: Newcombe's for a task, a paired bootstrap over initial states for what has several."""
    support: Support

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def shown(self) -> bool:
        """Whether the trials show that something changed."""
        return self.p_holm < LEVEL


@dataclass(frozen=True)
class Comparison:
    tasks: Sequence[Change]
    suites: Sequence[Change]
    groups: Sequence[Change]
    notes: Sequence[str]
    """What a reader has to know: stand-ins for assets, other software on one side, and so on."""


@dataclass(frozen=True)
class _Pairs:
    """One task: successes by episode, and its episodes' initial states."""

    suite: str
    task: str
    before: list[int]
    after: list[int]
    states: list[int]

    def by_state(self) -> np.ndarray:
        """Change at each initial state, the mean over its visits: visits of a state are not independent draws."""
        change: dict[int, list[int]] = {}
        for state, b, a in zip(self.states, self.before, self.after, strict=True):
            change.setdefault(state, []).append(a - b)
        return np.array([np.mean(visits) for visits in change.values()])


def compare_results(before: Sequence[Result], after: Sequence[Result], trained_on: Sequence[str]) -> Comparison:
    """Compare results of two policies, suite by suite in the order given.

    Args:
        trained_on: labels of the suites that the policy after was trained on.

    Raises:
        ConfigError: two of them were not measured alike.
    """
    require_same_conditions(before, after)
    pairs = [
        _task_pairs(b.label, name, b.evaluation, a.evaluation)
        for b, a in zip(before, after, strict=True)
        for name in b.evaluation.by_task
    ]
    seed = int(before[0].identity["settings"]["seed"])
    group_of = {b.label: TRAINED if b.label in trained_on else HELD_OUT for b in before}
    groups: dict[str, list[_Pairs]] = {}
    for pair in pairs:
        groups.setdefault(group_of[pair.suite], []).append(pair)
    return Comparison(
        tasks=_family([(p.suite, p.task, group_of[p.suite], [p]) for p in pairs], seed),
        suites=_family(
            [(name, "", group, [p for p in pairs if p.suite == name]) for name, group in group_of.items()], seed
        ),
        groups=_family([(name, "", name, groups[name]) for name in (TRAINED, HELD_OUT) if name in groups], seed),
        notes=_notes(before, after),
    )


def require_same_conditions(before: Sequence[Result], after: Sequence[Result]) -> None:
    """Raise ConfigError, with both sides as a table, unless the results were measured alike suite by suite."""
    ours, theirs = ({result.label: result.conditions for result in results} for results in (before, after))
    found = list(differences(ours, theirs))
    if not found:
        return
    rows = [("setting", "before", "after"), *((key, _short(b), _short(a)) for key, b, a in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = "\n".join("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    policies = [results[0].policy if results else "POLICY" for results in (before, after)]
    raise ConfigError(
        f"the two were not measured alike, and episodes of other conditions are no pairs:\n{table}\n"
        f"Measure both with one command, which plays what is missing: `rlvla compare {policies[0]} {policies[1]} "
        "suites=[...]` with the policies' folders and the settings that are right."
    )


def _short(text: str) -> str:
    return "nothing" if text == "null" else text if len(text) <= 60 else f"{text[:57]}..."


def _task_pairs(suite: str, task: str, before: Evaluation, after: Evaluation) -> _Pairs:
    index = list(before.by_task).index(task)
    mine = [i for i, of in enumerate(before.task_index) if of == index]
    first, second = ([side.outcomes[i] for i in mine] for side in (before, after))
    return _Pairs(suite, task, first, second, [before.initial_states[i] for i in mine])


def _family(members: Sequence[tuple[str, str, str, list[_Pairs]]], seed: int) -> list[Change]:
    """Changes that are claimed together: their p-values are adjusted for each other."""
    outcomes = [
        ([bool(x) for p in pairs for x in p.before], [bool(x) for p in pairs for x in p.after])
        for _, _, _, pairs in members
    ]
    p_values = [mcnemar_exact(before, after) for before, after in outcomes]
    return [
        _change(name, task, group, pairs, p_value, adjusted, LEVEL / len(members), seed)
        for (name, task, group, pairs), p_value, adjusted in zip(members, p_values, holm(p_values), strict=True)
    ]


def _change(
    suite: str, task: str, group: str, pairs: list[_Pairs], p_value: float, p_holm: float, level: float, seed: int
) -> Change:
    before = [bool(x) for p in pairs for x in p.before]
    after = [bool(x) for p in pairs for x in p.after]
    trials = len(before)
    counts = {
        "gained": sum(a and not b for b, a in zip(before, after, strict=True)),
        "kept": sum(a and b for b, a in zip(before, after, strict=True)),
        "lost": sum(b and not a for b, a in zip(before, after, strict=True)),
    }
    if len(pairs) == 1:
        interval = paired_difference_interval(before, after)
    else:
        # Keyed by what is averaged: another suite beside it changes nothing.
        named = hashlib.sha256(repr([(p.suite, p.task) for p in pairs]).encode()).digest()
        rng = keyed_rng(seed, Stream.BOOTSTRAP, int.from_bytes(named[:4], "big"))
        interval = macro_difference_interval([p.by_state() for p in pairs], rng)
    return Change(
        suite=suite,
        task=task,
        group=group,
        num_tasks=len(pairs),
        trials=trials,
        before=float(np.mean([np.mean(p.before) for p in pairs])),
        after=float(np.mean([np.mean(p.after) for p in pairs])),
        before_interval=average_interval([(sum(p.before), len(p.before)) for p in pairs]),
        after_interval=average_interval([(sum(p.after), len(p.after)) for p in pairs]),
        never=trials - sum(counts.values()),
        p_value=p_value,
        p_holm=p_holm,
        interval=interval,
        support=_support(trials, counts["gained"], counts["lost"], level),
        **counts,
    )


def _support(trials: int, gained: int, lost: int, level: float) -> Support:
    return Support(
        level=level,
        changes_needed=fewest_changes(level),
        one_way_needed=one_way_needed(gained + lost, level),
        detectable=detectable_difference(trials, min(gained, lost) / trials, level, POWER),
        trials_needed=trials_needed(gained / trials, lost / trials, level, POWER),
    )


def _notes(before: Sequence[Result], after: Sequence[Result]) -> list[str]:
    notes: dict[str, None] = {}
    for result in before:
        notes |= {f"{result.label}: {note}": None for note in result.evaluation.notes}
        visits = len(result.evaluation.initial_states) - len(set(result.evaluation.initial_states))
        if visits:
            notes[
                f"{result.label}: initial states were visited again with other noise ({visits} episodes). The test is "
                "about these states; the bootstrap draws states, not visits."
            ] = None
    for b, a in zip(before, after, strict=True):
        for side, result in (("before", b), ("after", a)):
            if result.evaluation.quarantined:
                states = ", ".join(map(str, result.evaluation.quarantined))
                notes[f"{result.label}, {side}: states {states} killed their simulator and count as failures."] = None
        others = [f"{key} {x} and {y}" for key, x, y in differences(_software(b.versions), _software(a.versions))]
        if others:
            notes[f"{b.label}: before and after ran with other software or machines: {'; '.join(others)}."] = None
    if before and before[0].policy_sha256 == after[0].policy_sha256:
        notes["Before and after are the same policy."] = None
    return list(notes)


def _software(versions: Mapping[str, str]) -> dict[str, str]:
    # The commit of rlvla changes daily; what it changes in a measurement is in the suite's version and the format.
    return {key: value for key, value in versions.items() if key != "git_commit"}


def verdict(change: Change) -> str:
    """One sentence on a group of suites, a suite or a task; points are percentage points."""
    rates = f"from {100 * change.before:.1f} to {100 * change.after:.1f}%"
    spread = (
        f"{points(change.difference)} points, 95% interval {points(change.interval[0])} to "
        f"{points(change.interval[1])}, p = {p_text(change.p_holm)}"
    )
    if change.shown:
        verb = "rose" if change.gained > change.lost else "fell"
        return f"success {verb} {rates} ({spread})"
    if change.gained + change.lost == 0:
        return f"no episode changed, {100 * change.after:.1f}%"
    return f"no change is shown: {rates} ({spread})"


def support_sentence(change: Change) -> str:
    """Why the trials do not show a change, and how many would; empty where they show one."""
    if change.shown:
        return ""
    has, needs = change.support, change.support.changes_needed
    changed = change.gained + change.lost
    if changed < needs:
        first = f"{changed} of {change.trials} episodes changed; below {needs} nothing can be significant"
    else:
        first = f"{max(change.gained, change.lost)} of {changed} changes went one way; it takes {has.one_way_needed}"
    parts = [first]
    against = min(change.gained, change.lost)
    given = f" while {against} go{'es' if against == 1 else ''} the other way" if against else ""
    if has.detectable is None:
        parts.append(f"{change.trials} trials cannot be counted on to show any change{given}")
    else:
        parts.append(f"{change.trials} trials show {100 * has.detectable:.0f} points or more{given}")
    if has.trials_needed is not None:
        parts.append(f"the {points(change.difference)} seen would take about {_rounded(has.trials_needed)}")
    return "; ".join(parts) + "."


def _rounded(trials: int) -> str:
    """Two digits: it is a plan."""
    step = 10 ** max(0, len(str(trials)) - 2)
    return f"{-(-trials // step) * step:,} trials"


def points(difference: float) -> str:
    """A difference of rates in percentage points, signed; nothing is 0.0."""
    return f"{100 * difference:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0")


def p_text(p: float) -> str:
    return f"{p:.3f}".rstrip("0").rstrip(".") if p >= 0.001 or p == 0 else f"{p:.0e}".replace("e-0", "e-")
