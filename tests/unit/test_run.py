"""A run folder is begun once, continued by the same command only, and written by one process at a time."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlvla.compose import compose
from rlvla.config import ConfigError
from rlvla.run import Run, check_output


def config(folder: Path, *settings: str) -> Any:
    return compose("train", ["suite=toy", "policy=here", f"output={folder / 'run'}", *settings])


def begin(folder: Path) -> None:
    with Run.open(config(folder), "train", total=1) as record:
        record.log({"kind": "iteration", "iteration": 0, "minutes": 3.0})


def test_an_unfinished_run_goes_on_and_its_clock_too(tmp_path: Path) -> None:
    begin(tmp_path)
    with Run.open(config(tmp_path), "train", total=1) as record:
        assert record.resumed
        assert record.last("iteration") == 0
        assert 3.0 <= record.minutes() < 3.5


def test_a_new_folder_is_not_resumed(tmp_path: Path) -> None:
    with Run.open(config(tmp_path), "train", total=1) as record:
        assert not record.resumed
        assert record.minutes() < 0.5


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    begin(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"kind": "itera')
    with Run.open(config(tmp_path), "train", total=1) as record:
        record.log({"kind": "iteration", "iteration": 1})
    assert [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()] == [0, 1]


def test_what_follows_a_checkpoint_is_cut_off(tmp_path: Path) -> None:
    with Run.open(config(tmp_path), "train", total=1) as record:
        record.log({"iteration": 0})
        length = record.metrics_bytes()
        record.log({"iteration": 1})
        record.truncate_metrics(length)
        record.log({"iteration": 2})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 2]


@pytest.mark.parametrize("setting", ["workers.num_actors=1", "device=cpu", "save_every=5", "max_minutes=9"])
def test_it_may_go_on_with_settings_that_change_no_result(tmp_path: Path, setting: str) -> None:
    begin(tmp_path)
    assert check_output(config(tmp_path, setting), "train")


def test_it_may_not_go_on_with_others_and_says_which(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(ConfigError, match=r"other settings: seed was 0 and is 1; algo.gamma was 0.99 and is 0.5"):
        check_output(config(tmp_path, "algo.gamma=0.5", "seed=1"), "train")


def test_a_finished_run_a_run_of_another_verb_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(ConfigError, match="unfinished train run"):
        check_output(config(tmp_path), "eval")
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="finished train run"):
        check_output(config(tmp_path), "train")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(ConfigError, match="not empty"):
        check_output(config(tmp_path), "train")


def test_a_policy_that_changed_since_is_refused(tmp_path: Path) -> None:
    with Run.open(config(tmp_path), "train", total=1) as record:
        record.require_policy("abc")
        record.require_policy("abc")
        with pytest.raises(ConfigError, match="not those that .* started from"):
            record.require_policy("abd")


def test_two_processes_never_write_to_one_folder(tmp_path: Path) -> None:
    # flock belongs to the open file, so a second opening in this process is refused like another process's.
    with (
        Run.open(config(tmp_path), "train", total=1),
        pytest.raises(ConfigError, match="another process"),
        Run.open(config(tmp_path), "train", total=1),
    ):
        pass
    begin(tmp_path)
