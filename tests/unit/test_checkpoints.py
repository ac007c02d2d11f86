"""Checkpoints are whole or absent: what a crash, a full disk or a flipped bit leaves is never loaded."""

from dataclasses import replace
from pathlib import Path

import pytest

from rlvla.checkpoints import Checkpoints, TrainState, read_state, verify

STATE = TrainState(
    iterations=1, env_steps=100, difficulty={"push": 0.5}, unseen_evaluation=None, metrics_bytes=7, success=None
)


def save(checkpoints: Checkpoints, iterations: int, success: float | None = None) -> Path:
    def write(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights").write_text(f"weights of {iterations}")

    return checkpoints.save(replace(STATE, iterations=iterations, success=success), write)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    saved = save(checkpoints, 3)
    found = checkpoints.newest(pytest.fail)
    assert found == (saved, replace(STATE, iterations=3))
    assert (saved / "policy" / "weights").read_text() == "weights of 3"


def test_where_nothing_was_saved_there_is_no_newest(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "absent", keep=1).newest(pytest.fail) is None


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for iterations, success in [(0, 0.3), (1, None), (2, 0.8), (3, 0.8), (4, None), (5, 0.1), (6, None), (7, None)]:
        save(checkpoints, iterations, success)
    assert names(tmp_path) == ["iteration-0003", "iteration-0006", "iteration-0007"]


@pytest.mark.parametrize("file", ["policy/weights", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["changed", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, file: str, harm: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    before, newest = save(checkpoints, 1), save(checkpoints, 2)
    path = newest / file
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if harm == "cut" else bytes([content[0] ^ 1]) + content[1:])
    told: list[str] = []
    found = checkpoints.newest(told.append)
    assert found is not None
    assert found[0] == before
    assert len(told) == 1
    assert "iteration-0002" in told[0]
    # Saving that iteration again replaces it.
    save(checkpoints, 2)
    assert verify(newest) == ""


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_do_not_push_out_what_is_saved_next(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep=keep)
    save(checkpoints, 2, success=0.9)
    for iterations in (6, 7):
        (save(checkpoints, iterations) / "state.json").write_text("{")
    found = checkpoints.newest(lambda _: None)
    assert found is not None
    assert found[1].iterations == 2
    saved = [save(checkpoints, iterations) for iterations in (3, 4)]
    assert saved[-1].exists()
    assert checkpoints.newest(pytest.fail) == (saved[-1], replace(STATE, iterations=4))


def test_when_all_are_damaged_it_says_so_instead_of_starting_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    (save(checkpoints, 1) / "state.json").unlink()
    with pytest.raises(ValueError, match="every checkpoint .* damaged"):
        checkpoints.newest(lambda _: None)


@pytest.mark.parametrize(
    "error",
    [
        OSError("No space left on device"),
        RuntimeError("PytorchStreamWriter failed"),
        KeyboardInterrupt(),
        ValueError("x"),
    ],
)
def test_a_save_that_fails_leaves_nothing_and_harms_nothing(tmp_path: Path, error: BaseException) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    kept = save(checkpoints, 1)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("written")
        raise error

    full_disk = isinstance(error, OSError | RuntimeError)
    with pytest.raises(RuntimeError if full_disk else type(error), match="goes on" if full_disk else None):
        checkpoints.save(replace(STATE, iterations=2), fail)
    assert names(tmp_path) == [kept.name]
    assert read_state(kept).iterations == 1


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".stage-iteration-0004" / "policy").mkdir(parents=True)
    Checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == []
