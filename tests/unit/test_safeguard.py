"""When a run goes back: significance by hand, what is remembered, and which checkpoint is kept for it."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from rlvla.checkpoints import Checkpoints, TrainState
from rlvla.config import ConfigError, SafeguardConfig
from rlvla.safeguard import Watch, best_checkpoint, look, significantly_below

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


def save(checkpoints: Checkpoints, iterations: int, watch: Watch | None) -> None:
    def write(folder: Path) -> None:
        (folder / "learner.pt").write_text("x")

    checkpoints.save(
        TrainState(
            iterations=iterations,
            env_steps=0,
            difficulty={},
            unseen_evaluation=None,
            metrics_bytes=0,
            success=None,
            watch=asdict(watch) if watch else None,
        ),
        write,
    )


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"confidence": 0.0}, "confidence"), ({"slowdown": 1.5}, "slowdown"), ({"max_returns": 0}, "max_returns")],
)
def test_senseless_settings_are_refused(wrong: dict[str, float], message: str) -> None:
    build: Callable[..., SafeguardConfig] = SafeguardConfig
    with pytest.raises(ConfigError, match=f"safeguard.{message}"):
        build(**wrong)
