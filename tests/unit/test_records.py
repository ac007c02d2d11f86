"""Cells of an experiment that were filled on other days: shown only beside cells that are like them."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
from learning_curve import steps_to
from records import Records, curve_of, record_of

WORDS = ["suite=toy", "iterations=5", "episodes_per_iteration=128"]


def finished_run(folder: Path) -> Path:
    (folder / "evaluations").mkdir(parents=True)
    summary = {"minutes": 1.5, "env_steps": 500, "success_before": 0.5, "success_after": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "evaluations" / "before.json").write_text(json.dumps({"outcomes": [1, 0]}))
    (folder / "evaluations" / "after.json").write_text(json.dumps({"outcomes": [1, 1]}))
    rows = [
        {"kind": "iteration", "iteration": i, "env_steps": 100 * (i + 1), "rollout/success": 0.2 * i} for i in range(5)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def checkpoint(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.yaml").write_text(f"made_from: {folder}")
    return folder


def test_a_record_stands_for_its_run_where_the_run_is_gone(tmp_path: Path) -> None:
    records = Records(tmp_path / "new" / "cells.jsonl")
    record = record_of(finished_run(tmp_path / "run"), "default", 3, WORDS, checkpoint(tmp_path / "a", b"1"))
    records.add(record)
    found = Records(records.path).of({"default": WORDS})["default"][3]
    assert (found["before"], found["after"]) == ([True, False], [True, True])
    # Iterations of 0, .2, .4, .6, .8: the last four, 512 episodes, are .5 on average.
    assert steps_to(curve_of(found), 0.5) == 500
    assert found["minutes"] == 1.5


def test_a_curve_needs_to_know_how_many_episodes_an_iteration_has(tmp_path: Path) -> None:
    words = ["suite=toy", "iterations=5"]
    record = record_of(finished_run(tmp_path / "run"), "default", 3, words, checkpoint(tmp_path / "a", b"1"))
    with pytest.raises(ValueError, match="default, seed 3: the words must have episodes_per_iteration="):
        curve_of(record)


def test_where_a_checkpoint_lies_is_no_part_of_what_it_is(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    here, there, other = (checkpoint(tmp_path / name, name[:1].encode()) for name in ("ab", "ac", "b"))
    hashes = [record_of(run, "default", 0, WORDS, folder)["checkpoint"] for folder in (here, there, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_seeds_are_in_their_order_whichever_was_finished_first(tmp_path: Path) -> None:
    run, began = finished_run(tmp_path / "run"), checkpoint(tmp_path / "a", b"1")
    records = Records(tmp_path / "cells.jsonl")
    for seed in (0, 2, 1):
        records.add(record_of(run, "rloo", seed, WORDS, began))
    assert list(records.of({"rloo": WORDS})["rloo"]) == [0, 1, 2]


def test_cells_of_another_checkpoint_or_other_words_share_no_table(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    records = Records(tmp_path / "cells.jsonl")
    records.add(record_of(run, "default", 0, WORDS, checkpoint(tmp_path / "a", b"1")))
    with pytest.raises(SystemExit, match=r"line 1 \(default, seed 0\) was made with other settings"):
        records.of({"default": [*WORDS, "algo.gamma=0.9"]})
    # Another seed was filled on another machine.
    records.add(record_of(run, "default", 1, WORDS, other := checkpoint(tmp_path / "b", b"2")))
    both = {"default": WORDS, "window": WORDS}
    assert set(records.of(both)["default"]) == {0, 1}
    records.add(record_of(run, "window", 0, WORDS, other))
    with pytest.raises(SystemExit, match=r"line 3 \(window, seed 0\) began with another SFT .* than line 1 of"):
        records.of(both)


def test_a_file_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert Records(tmp_path / "cells.jsonl").of({"default": WORDS}) == {}
