"""When a run goes back: significance by hand, what is remembered, and which checkpoint is kept for it."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rlvla.checkpoints import Checkpoints, TrainState
from rlvla.config import ConfigError, SafeguardConfig
from rlvla.run import Run
from rlvla.run_folder import read_run
from rlvla.safeguard import Watch, best_checkpoint, guard, look, significantly_below

CONFIG = SafeguardConfig(enabled=True)


def test_significance_by_hand() -> None:
    # 60 and 40 of 100, pooled with one of each added: 101/202 = 1/2, so the error is sqrt(1/4 x 2/100) = 0.0707 and the
    # difference of 0.2 is 2.83 of it.
    assert significantly_below(40, 100, 60, 100, 2.8)
    assert not significantly_below(40, 100, 60, 100, 2.85)
    # The other way about it is no collapse, and few episodes say nothing.
    assert not significantly_below(60, 100, 40, 100, 1.0)
    assert not significantly_below(0, 2, 2, 2, 3.0)
    assert significantly_below(0, 100, 100, 100, 3.0)


def test_the_later_of_two_equally_good_iterations_is_the_best() -> None:
    watch = Watch()
    for iteration, success in enumerate([0.4, 0.6, 0.5, 0.6, 0.55]):
        watch, back = look(watch, CONFIG, iteration, success, 100)
        assert not back
    assert (watch.best, watch.successes, watch.episodes) == (3, 60, 100)


def test_a_collapse_returns_lowers_the_rate_each_time_and_ends() -> None:
    watch, _ = look(Watch(), CONFIG, 0, 0.6, 100)
    found = []
    for iteration in range(1, 6):
        watch, back = look(watch, CONFIG, iteration, 0.1, 100)
        found.append((back, watch.returns, watch.caution))
    assert found == [(True, 1, 0.5), (True, 2, 0.25), (True, 3, 0.125), (False, 3, 0.125), (False, 3, 0.125)]
    assert watch.best == 0


def state_of(iterations: int, watch: Watch | None) -> TrainState:
    return TrainState(
        iterations=iterations,
        env_steps=0,
        difficulty={},
        unseen_evaluation=None,
        metrics_bytes=0,
        success=None,
        watch=asdict(watch) if watch else None,
    )


def save(checkpoints: Checkpoints, iterations: int, watch: Watch | None) -> None:
    def write(folder: Path) -> None:
        (folder / "learner.pt").write_text("x")

    checkpoints.save(state_of(iterations, watch), write)


@pytest.mark.parametrize(("watch", "left"), [(Watch(best=1, episodes=9), [1, 3, 4]), (None, [3, 4])])
def test_the_best_checkpoint_is_kept_for_the_safeguard(watch: Watch | None, left: list[int], tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for iterations in range(5):
        save(checkpoints, iterations, watch)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"iteration-{i:04d}" for i in left]
    newest = checkpoints.newest(pytest.fail)
    assert newest is not None
    assert newest[1].watch == (asdict(watch) if watch else None)


def test_a_damaged_best_checkpoint_is_not_gone_back_to(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    watch = Watch(best=0, episodes=9)
    save(checkpoints, 0, watch)
    assert best_checkpoint(checkpoints, watch) == tmp_path / "iteration-0000"
    (tmp_path / "iteration-0000" / "learner.pt").write_text("y")
    assert best_checkpoint(checkpoints, watch) is None


BEST = Watch(best=0, successes=60, episodes=100)


class Iteration:
    """One whose rollouts the safeguard looks at: where it had the ranks go back to, and what it said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=2)
        save(self.checkpoints, 0, BEST)
        self.returned: list[tuple[str, float]] = []

    def play(
        self, success: float, episodes: int = 100, watch: Watch = BEST, config: SafeguardConfig = CONFIG
    ) -> dict[str, float] | None:
        row: dict[str, Any] = {"iteration": 5, "rollout/success": success, "rollout/episodes": episodes}

        def go_back(folder: Path, caution: float) -> None:
            self.returned.append((folder.name, caution))

        with Run(self.folder, "train", 1) as record:
            return guard(config, row, state_of(5, watch), self.checkpoints, record, go_back)

    @property
    def alarms(self) -> list[str]:
        return [alarm["message"] for alarm in read_run(self.folder).alarms]


@pytest.fixture
def iteration(tmp_path: Path) -> Iteration:
    return Iteration(tmp_path)


def test_a_collapse_has_the_ranks_go_back_to_the_best_weights_and_says_so(iteration: Iteration) -> None:
    watch = Watch(best=0, successes=60, episodes=100, returns=1, caution=0.5)
    assert iteration.play(0.1, watch=watch) == asdict(
        Watch(best=0, successes=60, episodes=100, returns=2, caution=0.25)
    )
    assert iteration.returned == [("iteration-0000", 0.25)]
    [said] = iteration.alarms
    assert said.startswith(
        "collapse: rollouts succeed in 10%, those of iteration 0 in 60%. Went back to iteration-0000"
    )
    assert "0.25 times what they were (return 2 of at most 3)" in said


def test_a_better_iteration_is_remembered_in_silence(iteration: Iteration) -> None:
    assert iteration.play(0.7) == asdict(Watch(best=5, successes=70, episodes=100))
    assert (iteration.returned, iteration.alarms) == ([], [])


def test_where_the_best_checkpoint_is_gone_the_run_goes_on_and_a_return_is_not_used_up(iteration: Iteration) -> None:
    watch = Watch(best=3, successes=60, episodes=100)
    assert iteration.play(0.1, watch=watch) == asdict(watch)
    assert iteration.returned == []
    assert ["gone or damaged" in said for said in iteration.alarms] == [True]


def test_a_collapse_after_the_last_return_is_said_and_left_alone(iteration: Iteration) -> None:
    used_up = Watch(best=0, successes=60, episodes=100, returns=3, caution=0.125)
    assert iteration.play(0.1, watch=used_up) == asdict(used_up)
    assert iteration.returned == []
    assert ["max_returns is used up" in said for said in iteration.alarms] == [True]


def test_after_the_last_return_a_success_that_is_merely_lower_is_no_alarm(iteration: Iteration) -> None:
    used_up = Watch(best=0, successes=60, episodes=100, returns=3, caution=0.125)
    assert iteration.play(0.55, watch=used_up) == asdict(used_up)
    assert iteration.alarms == []


def test_an_iteration_that_lost_all_its_episodes_says_nothing(iteration: Iteration) -> None:
    assert iteration.play(0.0, episodes=0) == asdict(BEST)
    assert (iteration.returned, iteration.alarms) == ([], [])


def test_without_a_safeguard_nothing_is_watched(iteration: Iteration) -> None:
    assert iteration.play(0.0, config=SafeguardConfig()) is None
    assert (iteration.returned, iteration.alarms) == ([], [])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"confidence": 0.0}, "confidence"), ({"slowdown": 1.5}, "slowdown"), ({"max_returns": 0}, "max_returns")],
)
def test_senseless_settings_are_refused(wrong: dict[str, float], message: str) -> None:
    build: Callable[..., SafeguardConfig] = SafeguardConfig
    with pytest.raises(ConfigError, match=f"safeguard.{message}"):
        build(**wrong)
