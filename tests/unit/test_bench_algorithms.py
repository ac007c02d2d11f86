"""What scripts/bench_algorithms.py runs for hours is a run that begins."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
from bench_algorithms import NAMES, settings_of_variant
from make_train import settings_of
from toy_cells import TRAIN

from rlvla.compose import compose

WORDS = {"toy": TRAIN, "push_cube": settings_of("push_cube", None)["train"]}


@pytest.mark.parametrize(("suite", "name"), [(suite, name) for suite, names in NAMES.items() for name in names])
def test_every_cell_of_every_table_composes(suite: str, name: str) -> None:
    config = compose("train", ["policy=x", *settings_of_variant(name, WORDS[suite])])
    assert config.suite.name == ("toy" if suite == "toy" else "maniskill")
