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
    for written_last in ("summary.json", "report.html"):
        (tmp_path / "run" / written_last).write_text("{}")
    with pytest.raises(ConfigError, match="a finished train run"):
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


def test_the_clock_counts_what_was_not_logged(tmp_path: Path) -> None:
    begin(tmp_path)
    # As a process leaves it that was killed in a long evaluation.
    (tmp_path / "run" / ".minutes").write_text("40.5\n")
    with Run.open(config(tmp_path), "train", total=1) as record:
        assert 40.5 <= record.minutes() < 41


def test_a_start_that_was_killed_before_it_began_anything_leaves_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for left in (".lock", "config.yaml", "versions.json"):
        (tmp_path / "run" / left).write_text("half")
    with Run.open(config(tmp_path), "train", total=1) as record:
        assert not record.resumed
    assert "algo" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_run_without_its_report_is_not_finished(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert check_output(config(tmp_path), "train")


def test_going_on_with_other_software_is_an_alarm_once(tmp_path: Path) -> None:
    begin(tmp_path)
    versions = tmp_path / "run" / "versions.json"
    versions.write_text(json.dumps(json.loads(versions.read_text()) | {"torch": "0.1"}))
    for _ in range(2):
        with Run.open(config(tmp_path), "train", total=1):
            pass
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    alarms = [row["message"] for row in rows if row["kind"] == "alarm"]
    assert len(alarms) == 1
    assert "torch 0.1 -> " in alarms[0]
    assert json.loads(versions.read_text())["torch"] == "0.1"
    assert len(json.loads(versions.read_text())["resumed_with"]) == 1


def test_another_interpreters_versions_are_noted_and_a_change_is_an_alarm(tmp_path: Path) -> None:
    with Run.open(config(tmp_path), "train", total=1, simulator="Python 3.10.1, numpy 1.26.4"):
        pass
    noted = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert noted["simulator"] == "Python 3.10.1, numpy 1.26.4"
    with Run.open(config(tmp_path), "train", total=1, simulator="Python 3.10.1, numpy 2.1.0"):
        pass
    said = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "simulator Python 3.10.1, numpy 1.26.4 -> Python 3.10.1, numpy 2.1.0" in said


def test_metrics_that_a_power_failure_shortened_are_an_alarm_and_not_padded(tmp_path: Path) -> None:
    with Run.open(config(tmp_path), "train", total=1) as record:
        record.log({"kind": "iteration", "iteration": 0})
        record.truncate_metrics(record.metrics_bytes() + 100)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["iteration", "alarm"]
    assert "lacks 100 bytes" in lines[1]["message"]


def test_two_processes_never_write_to_one_folder(tmp_path: Path) -> None:
    # flock belongs to the open file, so a second opening in this process is refused like another process's.
    with (
        Run.open(config(tmp_path), "train", total=1),
        pytest.raises(ConfigError, match="another process"),
        Run.open(config(tmp_path), "train", total=1),
    ):
        pass
    begin(tmp_path)
