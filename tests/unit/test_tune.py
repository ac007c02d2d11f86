"""What a study decides, apart from running anything: spaces, objective, rungs, journal, best.yaml, report."""

import json
import math
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rlvla import tune, tune_space
from rlvla.compose import compose, config_dir
from rlvla.config import ConfigError, Reduction
from rlvla.config.tune import Sampler, TuneConfig
from rlvla.tune_halving import every, goes_on, rung_iterations, step_of
from rlvla.tune_process import read_checkups, read_env_steps
from rlvla.tune_report import StudyView, best_of, comparable, render, write_best
from rlvla.tune_space import Choices, Range, parse_space
from rlvla.tune_study import Study, TrialRecord, importances
from rlvla.tune_words import train_words
from rlvla_algos.statistics import pooled_lower_bound, wilson_interval

LR = {"algo.policy_lr": {"low": 1e-5, "high": 1e-3, "log": True}}
SMALL = {**LR, "algo.epochs": {"low": 2, "high": 6}, "algo.reduction": {"choices": ["sum", "mean"]}}


def tune_config(*words: str) -> TuneConfig:
    config = compose("tune", ["policy=some/policy", "suite=toy", *words])
    assert isinstance(config, TuneConfig)
    return config


def study(path: Path, space: Mapping[str, Any] = SMALL, sampler: Sampler = Sampler.random, **changes: Any) -> Study:
    settings: dict[str, Any] = {"seed": 0, "startup": 4, "liar": False}
    return Study(path, parse_space(space, "space"), sampler, **settings | changes)


def record(number: int, success: float, state: str = "complete", **changes: Any) -> TrialRecord:
    result = {"seed": 0, "successes": round(100 * success), "trials": 100, "before": 0.4, "env_steps": 10, "minutes": 1}
    settings: dict[str, Any] = {
        "values": {"algo.policy_lr": 1e-5 * 1.2**number, "algo.epochs": 2 + number % 5, "algo.reduction": "sum"},
        "objective": success - 0.1,
        "results": [result],
        "env_steps": 10,
    }
    return TrialRecord(number=number, state=state, **settings | changes)


def view(folder: Path, *trials: TrialRecord, words: tuple[str, ...] = ()) -> StudyView:
    config = tune_config(f"output={folder}", *words)
    base = train_words(tune._best_config(config))
    return StudyView(folder, config, parse_space(SMALL, "space"), base, trials, 3.0)


# The search space.


@pytest.mark.parametrize("file", sorted((config_dir() / "space").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_spaces_that_come_along_can_run_from_the_defaults_and_hold_them(file: Path) -> None:
    space, config = tune_space.read_space(file.stem), tune_config()
    tune_space.check_space(space, config)
    assert tune_space.own_point(space, config) is not None


def test_a_range_knows_its_ends_and_an_option_of_whole_numbers_gets_whole_numbers() -> None:
    space = parse_space(SMALL, "space")
    assert space["algo.policy_lr"].ends() == (1e-5, 1e-3)
    assert space["algo.epochs"] == Range(2, 6, whole=True)
    assert space["algo.reduction"] == Choices(("sum", "mean"))
    drawn = tune_space.fitted(space, {"algo.policy_lr": 0.000123456, "algo.epochs": 3, "algo.reduction": "mean"})
    assert tune_space.words(drawn) == ["algo.policy_lr=0.0001235", "algo.epochs=3", "algo.reduction=mean"]


def test_the_middle_of_a_log_range_is_its_geometric_mean() -> None:
    # sqrt(1e-5 * 1e-3) = 1e-4
    assert Range(1e-5, 1e-3, log=True).place(1e-4) == pytest.approx(0.5)
    assert Range(2.0, 6.0).place(3.0) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"algo.polcy_lr": LR["algo.policy_lr"]}, "not an option of `rlvla train`. Did you mean 'algo.policy_lr'"),
        ({"epochs": {"low": 1, "high": 2}}, "Did you mean 'algo.epochs'"),
        ({"eval.trials": {"low": 1, "high": 2}}, "cannot be searched: it decides what is measured"),
        ({"policy": {"choices": ["a"]}}, "cannot be searched"),
        ({"algo.policy_lr": {"low": "1e-5", "high": 1e-3}}, "Write 1.0e-4, not 1e-4"),
        ({"algo.policy_lr": {"low": 1e-3, "high": 1e-5}}, "above its high"),
        ({"algo.policy_lr": {"low": 0, "high": 1e-5, "log": True}}, "must be positive"),
        ({"algo.policy_lr": {"low": 1e-5, "high": 1e-3, "logarithmic": True}}, "has logarithmic"),
        ({"algo.policy_lr": {"low": 1e-5}}, "it must be {low: 0.1"),
        ({"algo.gae_lambda": {"low": 0.8, "high": 1.0, "step": 0.3}}, "lead from 0.8 to 1"),
        ({"algo.gae_lambda": {"low": 0.8, "high": 1.0, "step": 0.1, "log": True}}, "log: true and step"),
        ({"algo.epochs": {"low": 1.5, "high": 3}}, "whole number"),
        ({"algo.reduction": {"low": 1, "high": 3}}, "takes no range"),
        ({"algo.epochs": {"choices": []}}, "at least one value"),
        ({"algo.epochs": {"choices": [3, "3"]}}, "names a value twice"),
        ({}, "must be a mapping"),
        ([1], "must be a mapping"),
    ],
    ids=str,
)
def test_a_space_that_makes_no_sense_is_refused_with_the_cure(content: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_space(content, "my.yaml")
    assert said in str(error.value)
    assert "my.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        ({"algo.clip_epsilon": {"low": 0.1, "high": 1.5}}, [], "algo.clip_epsilon=1.5, which cannot run"),
        ({"algo.reduction": {"choices": ["sum", "median"]}}, [], "algo.reduction=median, which cannot run"),
        # The default max_policy_lr is 2e-3.
        ({"algo.policy_lr": {"low": 1e-5, "high": 5e-3}}, [], "it must be at least algo.policy_lr (0.005)"),
        ({"algo.target_kl": {"low": 0.01, "high": 0.2}}, ["algo.final_target_kl=0.03"], "in (0, algo.target_kl]"),
        # Each fits the defaults; together they do not.
        (
            {"algo.policy_lr": {"low": 1e-5, "high": 1e-3}, "algo.max_policy_lr": {"low": 2e-4, "high": 2e-3}},
            [],
            "algo.policy_lr=0.001 with algo.max_policy_lr=0.0002, which cannot run",
        ),
    ],
    ids=str,
)
def test_a_range_that_contradicts_a_rule_is_found_before_anything_runs(
    content: Any, words: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        tune_space.check_space(parse_space(content, "space"), tune_config(*words))
    assert said in str(error.value)


def test_the_commands_own_settings_are_a_point_of_the_space_or_they_are_not() -> None:
    space = parse_space(SMALL, "space")
    point = tune_space.own_point(space, tune_config("algo.epochs=4", "algo.reduction=mean"))
    assert point == {"algo.policy_lr": 1e-4, "algo.epochs": 4, "algo.reduction": "mean"}
    assert tune_space.own_point(space, tune_config("algo.epochs=8", "algo.reduction=mean")) is None
    assert tune_space.own_point(space, tune_config("algo.epochs=4")) is None


def test_a_grid_has_every_combination_once() -> None:
    content = {
        "algo.epochs": {"low": 2, "high": 6, "step": 2},
        "algo.gae_lambda": {"low": 0.9, "high": 1.0, "step": 0.1},
        "algo.reduction": {"choices": ["sum", "mean"]},
    }
    points = [tuple(point.values()) for point in tune_space.grid(parse_space(content, "space"))]
    assert points[:3] == [(2, 0.9, "sum"), (2, 0.9, "mean"), (2, 1.0, "sum")]
    assert len(set(points)) == len(points) == 3 * 2 * 2


def test_a_grid_wants_steps_and_enough_trials(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="algo.policy_lr is 1e-05 to 0.001 on a log scale; give it a step"):
        tune_space.grid(parse_space(LR, "space"))
    space = parse_space({"algo.epochs": {"low": 1, "high": 5}}, "space")
    config = tune_config("tune.sampler=grid", "tune.trials=4", "algo.epochs=3")
    with pytest.raises(ConfigError, match="tune.trials is 4; it must be at least 5"):
        tune._plan(config, space)
    config.tune.trials = 5
    assert len(tune._plan(config, space).grid) == 5


def test_two_spaces_are_compared_by_what_they_hold() -> None:
    before = tune_space.to_text(parse_space(SMALL, "space"))
    other = {**SMALL, "algo.epochs": {"low": 2, "high": 8}, "algo.gamma": {"low": 0.9, "high": 1.0}}
    del other["algo.reduction"]
    now = tune_space.to_text(parse_space(other, "space"))
    assert tune_space.differences(before, before) == []
    assert tune_space.differences(before, now) == [
        "algo.epochs was 2 to 6 and is 2 to 8",
        "algo.reduction is gone",
        "algo.gamma is new",
    ]


# The objective.


def test_the_objective_of_two_seeds_that_differ_is_a_number_worked_by_hand() -> None:
    # p = 140 / 200 = .7; chi2 = (10^2 + 10^2) / (100 * .7 * .3) = 9.524; dispersion (9.524 + 3) / (1 + 3) = 3.131;
    # n = 200 / 3.131 = 63.88. With z = 1: (.7 + 1 / 127.8 - sqrt(.21 / 63.88 + 1 / (4 * 63.88^2))) / (1 + 1 / 63.88)
    # = (.7 + .007827 - sqrt(.0032874 + .0000613)) / 1.015655 = (.707827 - .057868) / 1.015655 = .63994
    assert pooled_lower_bound([60, 80], [100, 100], z=1.0) == pytest.approx(0.63994, abs=2e-5)


def test_the_objective_of_one_seed_and_of_seeds_that_agree_is_wilsons_bound() -> None:
    assert pooled_lower_bound([8], [10]) == pytest.approx(0.4902, abs=1e-4)
    assert pooled_lower_bound([30, 30], [50, 50]) == pytest.approx(wilson_interval(60, 100)[0])
    assert pooled_lower_bound([50, 50], [50, 50]) == pytest.approx(wilson_interval(100, 100)[0])
    assert pooled_lower_bound([0, 0], [50, 50]) == 0.0


def test_seeds_that_disagree_lower_the_objective_and_more_seeds_raise_it() -> None:
    agreeing, disagreeing = pooled_lower_bound([70, 70], [100, 100]), pooled_lower_bound([50, 90], [100, 100])
    assert disagreeing < agreeing - 0.05
    assert pooled_lower_bound([70, 70, 70], [100, 100, 100]) > agreeing > pooled_lower_bound([70], [100])


@pytest.mark.parametrize(("successes", "trials"), [([], []), ([3], [2]), ([1], [0]), ([1, 1], [2])])
def test_what_is_no_proportion_has_no_bound(successes: list[int], trials: list[int]) -> None:
    with pytest.raises(ValueError, match="are not proportions"):
        pooled_lower_bound(successes, trials)


# Stopping early.


def test_the_rungs_of_sixteen_iterations_are_at_four_and_eight() -> None:
    spacing = every(16, rungs=2, halving=2)
    assert spacing == 4
    assert rung_iterations(16, spacing, rungs=2, halving=2) == [4, 8]
    assert rung_iterations(16, every(16, rungs=2, halving=2, wanted=6), rungs=2, halving=2) == [6, 12]
    assert rung_iterations(1, every(1, rungs=2, halving=2), rungs=2, halving=2) == []
    assert every(16, rungs=0, halving=2) == 0
    assert rung_iterations(16, 0, rungs=0, halving=2) == []


def test_rungs_are_in_the_order_in_which_a_trial_comes_to_them() -> None:
    steps = [step_of(seed, iteration, 16) for seed in (0, 1) for iteration in (4, 8, None)]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("halving", [2, 3])
def test_of_many_trials_about_one_in_halving_goes_on_and_the_best_always_does(halving: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.permutation(np.linspace(0, 1, 301)).tolist()
    on = [goes_on(value, values[:i], halving) for i, value in enumerate(values)]
    assert 300 / halving <= sum(on) <= 300 / halving * 1.15
    assert on[values.index(1.0)]
    assert not on[values.index(0.0)]


def test_the_fifth_trial_must_be_among_the_best_three() -> None:
    # 5 / 2, rounded up
    assert [goes_on(value, [0.2, 0.4, 0.6, 0.8], 2) for value in (0.3, 0.4, 0.5)] == [False, True, True]
    # 7 / 3, rounded up: three again
    assert [goes_on(value, [0.1, 0.2, 0.3, 0.4, 0.6, 0.8], 3) for value in (0.35, 0.45)] == [False, True]


def test_the_first_ones_and_those_that_tie_go_on() -> None:
    assert goes_on(0.0, [], 2)
    assert goes_on(0.0, [0.9, 0.9], 2)
    assert not goes_on(0.0, [0.9, 0.9, 0.9], 2)
    assert goes_on(0.0, [0.0] * 9, 2)


# The journal.


def test_a_study_that_was_stopped_proposes_what_it_would_have_proposed(tmp_path: Path) -> None:
    straight = study(tmp_path / "straight")
    expected = []
    for _ in range(6):
        trial = straight.ask()
        straight.end(trial.number, "failed", 0, "x")
        expected.append(trial.values)
    found = []
    for _ in range(6):
        again = study(tmp_path / "again")
        trial = again.ask()
        again.end(trial.number, "failed", 0, "x")
        found.append(trial.values)
    assert found == expected
    assert len({tuple(values.values()) for values in found}) == 6


def test_a_trial_that_was_running_is_found_with_its_settings_and_what_it_had_shown(tmp_path: Path) -> None:
    one = study(tmp_path / "journal")
    first = one.ask()
    one.set_objective(first.number, 0.5)
    one.end(first.number, "complete", 100)
    second = one.ask()
    one.add_rung(second.number, 4, 3, 10, True, "iteration 4")
    one.add_result(second.number, {"seed": 0, "successes": 6, "trials": 10})
    del one
    (found,) = study(tmp_path / "journal").interrupted()
    assert found.number == second.number
    assert found.values == second.values
    assert found.rungs == {4: {"successes": 3, "trials": 10, "goes_on": True, "where": "iteration 4"}}
    assert found.success == 0.6


def test_a_trial_that_was_killed_while_its_settings_were_drawn_is_given_up_or_planned_again(tmp_path: Path) -> None:
    point = {"algo.policy_lr": 1e-4, "algo.epochs": 3, "algo.reduction": "sum"}
    one = study(tmp_path / "journal")
    one.plan([point], own=True)
    one.ask()
    # The journal as it is when the process dies between the first setting and the second.
    lines = (tmp_path / "journal").read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if "param_name" in line)
    (tmp_path / "journal").write_text("".join(lines[: first + 1]) + lines[first + 1][:20])
    again = study(tmp_path / "journal")
    assert again.interrupted() == []
    assert again.trials() == []
    trial = again.ask()
    assert trial.values == point
    assert trial.own
    assert [record.state for record in again.trials()] == ["running"]


def test_a_grid_is_worked_through_once_however_often_the_study_is_stopped(tmp_path: Path) -> None:
    content = {"algo.epochs": {"low": 1, "high": 4}, "algo.reduction": {"choices": ["sum", "mean"]}}
    points = tune_space.grid(parse_space(content, "space"))
    for _ in range(4):
        one = study(tmp_path / "journal", content, Sampler.grid)
        one.plan(points)
        for _ in range(2):
            one.end(one.ask().number, "failed", 0, "x")
    assert [dict(record.values) for record in study(tmp_path / "journal", content, Sampler.grid).trials()] == points


def test_a_damaged_journal_is_named_with_its_line(tmp_path: Path) -> None:
    study(tmp_path / "journal").ask()
    lines = (tmp_path / "journal").read_text().splitlines(keepends=True)
    (tmp_path / "journal").write_text("".join([*lines[:2], "garbage\n", *lines[2:]]))
    with pytest.raises(ConfigError, match=r"line 3 of the study's journal .* is damaged"):
        study(tmp_path / "journal")


def test_tpe_comes_closer_to_what_did_well_than_random_does(tmp_path: Path) -> None:
    distance: dict[Sampler, list[float]] = {Sampler.tpe: [], Sampler.random: []}
    for sampler, found in distance.items():
        for seed in range(3):
            one = study(tmp_path / f"{sampler}-{seed}", LR, sampler, startup=6, seed=seed)
            for number in range(24):
                trial = one.ask()
                decades = abs(math.log10(float(trial.values["algo.policy_lr"])) + 4)
                one.set_objective(trial.number, 1 - decades)
                one.end(trial.number, "complete", 0)
                if number >= 14:
                    found.append(decades)
    # Measured: .27 and .42.
    assert np.mean(distance[Sampler.tpe]) < 0.8 * np.mean(distance[Sampler.random])


def test_what_made_the_difference_has_the_largest_share() -> None:
    rng = np.random.default_rng(0)
    space = parse_space(SMALL, "space")
    points = [
        (
            {"algo.policy_lr": 10 ** rng.uniform(-5, -3), "algo.epochs": int(rng.integers(2, 7)), "algo.reduction": r},
            0.0,
        )
        for r in ("sum", "mean") * 20
    ]
    scored = [(values, -abs(math.log10(float(str(values["algo.policy_lr"]))) + 4)) for values, _ in points]
    found = importances(space, scored)
    assert next(iter(found)) == "algo.policy_lr"
    assert found["algo.policy_lr"] > 0.7
    assert sum(found.values()) == pytest.approx(1)
    assert importances(space, scored[:7]) == {}
    assert importances(space, points) == {}


# What a run shows while it goes.


def test_checkups_are_read_from_a_file_that_is_being_written(tmp_path: Path) -> None:
    rows = [
        {"kind": "evaluation", "name": "before", "success": 0.2, "trials": 40},
        {"kind": "iteration", "iteration": 3, "env_steps": 900},
        {"kind": "evaluation", "name": "iteration-0004", "success": 0.3, "trials": 10},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "evaluation", "name": "iter')
    (found,) = read_checkups(tmp_path)
    assert (found.iteration, found.successes, found.trials) == (4, 3, 10)
    assert read_env_steps(tmp_path) == 900
    assert read_checkups(tmp_path / "nothing") == []


# Back to words, and best.yaml.


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["suite=simpler_env", "suite.task=stack_cube", "task_weights.stack_cube=1"],
        ["suite=maniskill", "suite.task=LiftPegUpright-v1"],
        # All but the camera of suite=pick_cube, which cannot be taken back.
        ["suite=maniskill", "suite.task=PickCube-v1", "suite.max_episode_steps=80"],
        ["suite=pick_cube", "algo.value_hidden_sizes=[64,32]", "algo.value_clip=null", "schedule=async"],
        ["suite=toy", "policy=a folder, [odd] {names} it's", "suite.instruction='null'", "suite.python='1e5'"],
        ["@configs/recipe/simpler_env_cpu.yaml"],
    ],
    ids=str,
)
def test_the_words_of_a_configuration_compose_to_it(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config_dir().parent)
    config = compose("train", ["policy=p", *words])
    found = train_words(config)
    assert compose("train", found) == config
    assert len(found) < 25


def test_best_yaml_is_what_rlvla_train_takes_and_gives_the_best_trials_settings(tmp_path: Path) -> None:
    best = record(1, 0.9, values={"algo.policy_lr": 3e-4, "algo.epochs": 5, "algo.reduction": "sqrt"})
    words = ("iterations=7", "algo.value_hidden_sizes=[8]", "algo.epochs=2", "eval.temperature=1.0", "seed=4")
    write_best(view(tmp_path, record(0, 0.5), best, words=words))
    config = compose("train", [f"@{tmp_path / 'best.yaml'}", "output=elsewhere", "seed=9"])
    assert (config.algo.policy_lr, config.algo.epochs, config.algo.reduction) == (3e-4, 5, Reduction.sqrt)
    assert (config.policy, config.suite.name, config.iterations, config.seed) == ("some/policy", "toy", 7, 9)
    assert config.algo.value_hidden_sizes == (8,)
    # What trials leave out to be quick is measured again.
    assert config.eval == compose("train", ["policy=x", "eval.temperature=1.0"]).eval
    assert compose("train", [f"@{tmp_path / 'best.yaml'}", "algo.epochs=3"]).algo.epochs == 3
    keys = [word.partition("=")[0] for word in yaml.safe_load((tmp_path / "best.yaml").read_text())["train"]]
    assert len(set(keys)) == len(keys)
    assert "trial 1" in (tmp_path / "best.yaml").read_text()


@pytest.mark.parametrize("recipe", sorted((config_dir() / "recipe").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_can_be_given_as_a_settings_file(recipe: Path) -> None:
    wanted = compose("train", ["policy=x", *yaml.safe_load(recipe.read_text())["train"]])
    assert compose("train", [f"@{recipe}", "policy=x"]) == wanted
    # Whatever takes the options of train takes its part of a recipe.
    assert compose("tune", [f"@{recipe}", "policy=x"]).iterations == wanted.iterations


def test_a_settings_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the settings file"):
        compose("train", ["@nowhere.yaml", "policy=x"])
    file = tmp_path / "x.yaml"
    for text in ("train: 3", "sft: [a=1]", "- a=1", "train: [1]"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="has no settings for `rlvla train`"):
            compose("train", [f"@{file}", "policy=x"])
    file.write_text("train: [algo.epoch=3]")
    with pytest.raises(ConfigError, match="Did you mean 'algo.epochs'"):
        compose("train", [f"@{file}", "policy=x"])


# The report.


def test_the_best_is_the_complete_trial_with_the_highest_bound_and_the_fewest_steps() -> None:
    trials = [record(0, 0.9, "stopped"), record(1, 0.7), record(2, 0.7, env_steps=5), record(3, 0.99, "failed")]
    found = best_of(trials)
    assert found is not None
    assert found.number == 2
    assert best_of(trials[:1]) is None


def test_trials_are_compared_where_most_were_measured_alike() -> None:
    def at(*steps: int) -> dict[int, dict[str, Any]]:
        return {s: {"successes": s, "trials": 10, "goes_on": True, "where": f"iteration {s}"} for s in steps}

    trials = [
        record(0, 0.5, "stopped", rungs=at(2, 4)),
        record(1, 0.5, "stopped", rungs=at(2, 4)),
        record(2, 0.5, rungs=at(2)),
    ]
    where, points = comparable(trials)
    assert where == "iteration 2"
    assert [success for _, success in points] == [0.2] * 3
    assert comparable(trials[:2])[0] == "iteration 4"
    assert comparable([record(0, 0.5)])[0] == "the end"


def test_a_report_shows_every_trial_and_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    trials = [record(i, float(rng.uniform(0.2, 0.9)), own=i == 0) for i in range(12)]
    stop = {4: {"successes": 1, "trials": 10, "goes_on": False, "where": "iteration 4"}}
    trials += [
        record(12, 0.1, "stopped", results=[], rungs=stop, objective=None),
        record(13, 0.0, "failed", results=[], objective=None, error="Traceback\nrlvla: <b>no</b> memory"),
        record(14, 0.0, "running", results=[], objective=None),
    ]
    page = render(view(tmp_path, *trials))
    assert "&lt;b&gt;no&lt;/b&gt; memory" in page
    assert "<b>no</b>" not in page
    assert "stopped at iteration 4" in page
    assert page.count('class="strand') == 13
    assert "default-src 'none'" in page
    assert "http://" not in page
    assert "src=" not in page.replace("default-src", "").replace("style-src", "")
    best = best_of(trials)
    assert best is not None
    assert f"in trial {best.number}" in page
    assert "PED-ANOVA" in page


def test_a_study_without_results_says_so(tmp_path: Path) -> None:
    page = render(view(tmp_path))
    assert "there are no best settings" in page
    assert "None was begun" in page
    write_best(view(tmp_path))
    assert not (tmp_path / "best.yaml").exists()


# At the door.


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("tune.trials=0", "tune.trials is 0; it must be at least 1"),
        ("tune.halving=1", "tune.halving is 1; it must be at least 2"),
        ("tune.confidence=1", "tune.confidence is 1.0; it must be in (0, 1)"),
        ("tune.sampler=cmaes", "tune.sampler"),
        ("tune.trails=3", "Did you mean 'tune.trials'"),
        ("max_env_steps=0", "max_env_steps is 0; it must be positive"),
    ],
)
def test_an_impossible_study_is_refused(word: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        tune_config(word)
    assert said in str(error.value)


def test_runs_at_once_are_bounded_by_cores_memory_and_what_tpe_can_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr(tune, "available_mb", lambda: 10_000)
    local = ["workers.kind=local", "device=cpu"]
    assert tune._parallel(tune_config(*local, "tune.sampler=random")) == 3
    monkeypatch.setattr(tune, "available_mb", lambda: None)
    assert tune._parallel(tune_config(*local, "tune.sampler=random")) == 16
    assert tune._parallel(tune_config(*local, "tune.trials=20")) == 4
    assert tune._parallel(tune_config("device=cpu", "workers.num_actors=8", "tune.sampler=random")) == 2
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert tune._parallel(tune_config(*local)) == 1


def test_an_interrupt_that_python_dropped_is_raised_at_the_next_turn() -> None:
    before = signal.getsignal(signal.SIGINT)
    with tune._Interrupts() as interrupts:
        interrupts.check()
        # As in a callback of an import, which has nobody to raise to.
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_ends_at_its_budget_of_environment_steps() -> None:
    from rlvla.train import limit_reached

    config = compose("train", ["policy=x", "max_env_steps=1000", "max_minutes=5"])
    assert limit_reached(config, 4.9, 999) == ""
    assert limit_reached(config, 4.9, 1000) == "max_env_steps=1000"
    assert limit_reached(config, 5.0, 0) == "max_minutes=5"
