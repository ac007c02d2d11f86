"""What a run says by itself: each alarm at its threshold, and silence when all is well."""

from pathlib import Path
from typing import Any

import pytest

from rlvla.config import AlgoConfig
from rlvla.iteration_row import sound_alarms
from rlvla.run import Run
from rlvla.run_folder import read_run

HEALTHY = {
    "kind": "iteration",
    "iteration": 7,
    "ppo/critic_only": 0.0,
    "ppo/kl": 0.1,
    "ppo/target_kl": 0.1,
    "ppo/clip_fraction": 0.3,
    "value/explained_variance": 0.2,
}


def alarms(tmp_path: Path, **changes: Any) -> list[str]:
    with Run(tmp_path, "train", 1) as record:
        sound_alarms(record, {**HEALTHY, **changes}, AlgoConfig(target_kl=0.1), "algo.noise_level (now 0.5)")
    return [f"{alarm['where']}: {alarm['message']}" for alarm in read_run(tmp_path).alarms]


def test_a_healthy_iteration_sounds_none(tmp_path: Path) -> None:
    assert alarms(tmp_path, **{"rollout/sde_gap": -0.1}) == []


@pytest.mark.parametrize(
    ("key", "just_below", "above", "said"),
    [
        ("ppo/kl", 0.39, 0.41, "over 4x"),
        ("ppo/clip_fraction", 0.49, 0.51, "51% of the ratios are clipped"),
        ("value/explained_variance", 0.01, -0.01, "explained variance is negative"),
        ("rollout/sde_gap", -0.24, -0.26, r"succeed -26 points from their evaluation"),
        ("rollout/sde_gap", 0.24, 0.26, r"succeed +26 points from their evaluation"),
        ("ppo/critic_only", 0.0, 1.0, "trained the critic only"),
    ],
)
def test_each_alarm_sounds_above_its_threshold_and_says_where(
    tmp_path: Path, key: str, just_below: float, above: float, said: str
) -> None:
    assert alarms(tmp_path, **{key: just_below}) == []
    [message] = alarms(tmp_path, **{key: above})
    assert message.startswith("iteration 7: ")
    assert said in message


def test_a_young_critic_and_a_planned_critic_only_iteration_are_no_alarm(tmp_path: Path) -> None:
    assert alarms(tmp_path, **{"iteration": 4, "value/explained_variance": -1.0}) == []
    assert alarms(tmp_path, **{"iteration": 0, "ppo/critic_only": 1.0}) == []
