"""What a benchmark's page says about sample efficiency, by hand."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
from learning_curve import blocks, steps_to, steps_to_gain, success_at_first, success_until


def rows(*success: float, episodes: int = 128) -> list[dict[str, float]]:
    """Iterations of 100 environment steps."""
    return [
        {"rollout/success": rate, "env_steps": 100 * (i + 1), "rollout/episodes": episodes}
        for i, rate in enumerate(success)
    ]


def test_a_block_is_four_iterations_and_the_last_may_be_shorter() -> None:
    assert blocks(rows(0.1, 0.2, 0.3, 0.4, 0.6)) == [(400, pytest.approx(0.25)), (500, pytest.approx(0.6))]


def test_512_episodes_in_a_row_must_succeed_on_average() -> None:
    # Means of four: .275, .35, .45, .55.
    curve = rows(0.1, 0.5, 0.1, 0.4, 0.4, 0.9, 0.5)
    assert steps_to(curve, 0.45) == 600
    assert steps_to(curve, 0.46) == 700
    assert steps_to(curve, 0.56) is None
    assert steps_to(rows(0.9, 0.9, 0.9), 0.5) is None


def test_small_iterations_are_averaged_over_as_many_episodes_as_large_ones() -> None:
    # Of 256 episodes two make a stretch: .3, .3, .25, .4; of 512 and more each is one.
    curve = (0.1, 0.5, 0.1, 0.4, 0.4)
    assert steps_to(rows(*curve, episodes=256), 0.4) == 500
    assert steps_to(rows(*curve, episodes=512), 0.4) == 200
    assert steps_to(rows(*curve, episodes=3000), 0.4) == 200


def test_a_gain_is_upon_the_mean_first_iteration_of_all_runs() -> None:
    lucky, unlucky = rows(0.5, 0.5, 0.5, 0.5, 0.7), rows(0.3, 0.5, 0.6, 0.6, 0.7)
    # Upon .4: the means of four are .5 and .55, .5 and .6.
    assert steps_to_gain([lucky, unlucky], 0.12) == [500, 500]
    assert steps_to_gain([lucky, unlucky], 0.18) == [None, 500]


def test_the_first_iterations_count_by_their_episodes() -> None:
    # 128 episodes at .5 and 32 at .3: (64 + 9.6) / 160.
    assert success_at_first([rows(0.5, 0.9), rows(0.3, 0.9, episodes=32)]) == pytest.approx(0.46)


def test_success_until_is_of_equally_many_episodes_however_large_an_iteration_is() -> None:
    def run(episodes: int, successes: list[float]) -> list[dict[str, float]]:
        return [
            {"env_steps": episodes * (i + 1), "rollout/success": rate, "rollout/episodes": episodes}
            for i, rate in enumerate(successes)
        ]

    large, small = run(256, [0.1, 0.2, 0.4, 0.9]), run(128, [0.1, 0.1, 0.2, 0.2, 0.3, 0.5, 0.9, 0.9])
    # The second and third 256 episodes of each: a mean of .3; what ended later does not count.
    assert success_until(large, 800) == pytest.approx(0.3)
    assert success_until(small, 800) == pytest.approx(0.3)
