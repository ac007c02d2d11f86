"""What scripts/bench_algorithms.py runs for hours is a run that begins."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
from bench_algorithms import HALF, NAMES, begun_with, half_the_steps, settings_of_variant
from make_train import settings_of
from toy_cells import TRAIN

from rlvla.compose import compose

WORDS = {"toy": TRAIN, "push_cube": settings_of("push_cube", None)["train"]}


@pytest.mark.parametrize(("suite", "name"), [(suite, name) for suite, names in NAMES.items() for name in names])
def test_every_cell_of_every_table_composes(suite: str, name: str) -> None:
    config = compose("train", ["policy=x", *settings_of_variant(name, WORDS[suite])])
    assert config.suite.name == ("toy" if suite == "toy" else "maniskill")


def cell(after: int, env_steps: int, first: float = 0.5, checkpoint: str = "a", episodes: int = 256) -> dict[str, Any]:
    """Ten states of which one succeeded before and ``after`` of them afterwards."""
    return {
        "before": [True] + [False] * 9,
        "after": [True] * after + [False] * (10 - after),
        "env_steps": env_steps,
        "checkpoint": checkpoint,
        "words": [f"episodes_per_iteration={episodes}"],
        "curve": [[100, first], [200, 0.9]],
    }


def test_half_of_the_steps_is_the_recipe_with_fewer_iterations_and_nothing_else() -> None:
    changed = {
        (old, new)
        for old, new in zip(WORDS["push_cube"], settings_of_variant("half", WORDS["push_cube"]), strict=True)
        if old != new
    }
    assert changed == {("iterations=26", HALF)}


def test_half_of_the_steps_is_compared_on_seeds_that_both_have() -> None:
    half = {0: cell(6, 400), 1: cell(1, 999)}
    first = {0: cell(4, 1000), 2: cell(10, 999)}
    said = half_the_steps({"half": half, "first_recipe": first})
    # On seed 0 six of ten and four of ten succeed, of one before.
    assert "gains +50.0 points in 400 environment steps, `first_recipe`\n+30.0 in 1,000" in said
    assert "0.40 of the steps, +20.0 points (seeds 0 of both; p 5e-01)" in said
    assert half_the_steps({"half": half}) == ""


def test_what_the_sft_weights_did_is_counted_over_all_rows_from_one_checkpoint() -> None:
    # 256 episodes at .5, 128 at .2 and another checkpoint's: (128 + 25.6) / 384.
    rows = {
        "default": {0: cell(5, 100), 1: cell(5, 100, 0.7, "b")},
        "first_recipe": {0: cell(5, 100, 0.2, episodes=128)},
    }
    assert begun_with(rows) == {"a": pytest.approx(0.4), "b": pytest.approx(0.7)}
