"""The transfer benchmark: what it would run, what it keeps, and what its page says. The runs themselves take hours."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlvla.compose import compose
from rlvla.results import Result

ROOT = Path(__file__).resolve().parents[2]
# Scripts import each other by their bare names, as Python lets them when one is run.
sys.path.append(str(ROOT / "scripts"))

import bench_transfer  # noqa: E402


def arguments(root: Path, *more: str) -> Any:
    return bench_transfer.parse(["--output", str(root), "--page", str(root / "transfer.md"), *more])


def test_every_cell_is_a_command_that_composes_and_comes_after_what_it_needs(tmp_path: Path) -> None:
    cells = bench_transfer.plan(arguments(tmp_path, "--with", *bench_transfer.FOREIGN))
    assert [cell.name for cell in cells] == [
        "data-simpler_env",
        "data-libero_spatial",
        "data-libero_object",
        "data-metaworld_mt10",
        "sft",
        "ppo",
        "compare-simpler_env",
        "compare-simpler_env_ood",
        "compare-libero_spatial",
        "compare-libero_object",
        "compare-metaworld_mt10",
    ]
    known: set[str] = set()
    for cell in cells:
        compose(cell.verb, [*cell.words, f"output={cell.folder}"])
        assert known.issuperset(cell.needs)
        known.add(cell.name)


def test_sft_mixes_all_and_ppo_sees_simpler_env_alone(tmp_path: Path) -> None:
    cells = {cell.name: cell for cell in bench_transfer.plan(arguments(tmp_path, "--foreign-weight", "0.5"))}
    sft = compose("sft", list(cells["sft"].words))
    assert (sft.dataset, sft.weight) == (str(tmp_path / "data-simpler_env"), 2)
    assert [(each.dataset, each.weight) for each in sft.more] == [
        (str(tmp_path / "data-libero_spatial"), 0.5),
        (str(tmp_path / "data-libero_object"), 0.5),
    ]
    assert compose("train", list(cells["ppo"].words)).suite.name == "simpler_env"
    for suite in ("simpler_env_ood", "libero_object"):
        words = list(cells[f"compare-{suite}"].words)
        found = compose("compare", words)
        assert list(found.suites) == [suite]
        assert (found.before, found.after) == (str(tmp_path / "sft/policy"), str(tmp_path / "ppo/policy"))
        assert found.eval.trials == (10 if suite == "libero_object" else 96)


def test_a_setting_of_a_recipe_is_replaced_and_not_doubled() -> None:
    words = ["suite=toy", "suite.image_size=160", "steps=4000"]
    assert bench_transfer.replaced(words, steps=5, suite__image_size=32) == [
        "suite=toy",
        "steps=5",
        "suite.image_size=32",
    ]


def pretend(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """Commands that only write what shows that they are done; the list of those that ran."""
    ran: list[str] = []
    finished = {"collect": "meta/info.json", "sft": "summary.json", "train": "report.html", "compare": "compare.json"}

    def rlvla(verb: str, words: list[str], output: Path) -> None:
        ran.append(output.name)
        path = output / finished[verb]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")

    monkeypatch.setattr(bench_transfer, "rlvla", rlvla)
    return ran


def test_what_is_there_is_kept_and_what_is_missing_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, given = pretend(monkeypatch, tmp_path), arguments(tmp_path)
    cells = bench_transfer.plan(given)
    (tmp_path / "data-simpler_env" / "meta").mkdir(parents=True)
    (tmp_path / "data-simpler_env" / "meta" / "info.json").write_text("{}")
    # Begun and not finished: data cannot go on and makes way, a PPO run goes on.
    for name in ("data-libero_object", "ppo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "begun").write_text("")
    bench_transfer.run(cells, [], given.output)
    assert ran == [cell.name for cell in cells][1:]
    assert not (tmp_path / "data-libero_object" / "begun").exists()
    assert (tmp_path / "ppo" / "begun").exists()
    assert set(json.loads((tmp_path / "minutes.json").read_text())) == set(ran)
    ran.clear()
    bench_transfer.run(bench_transfer.plan(given), [], given.output)
    assert ran == []


def test_numbers_that_were_made_with_other_options_are_not_shown_under_todays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = pretend(monkeypatch, tmp_path)
    few = ["--output", str(tmp_path), "--page", str(tmp_path / "transfer.md"), "--sft-steps", "10", "--only"]
    bench_transfer.main([*few, "data-simpler_env", "data-libero_spatial", "data-libero_object", "sft"])
    count = len(ran)
    with pytest.raises(SystemExit, match=r"sft was begun with other settings \(steps=10, steps=5000\)") as caught:
        bench_transfer.main(["--output", str(tmp_path), "--page", str(tmp_path / "transfer.md")])
    assert str(tmp_path / "sft") in str(caught.value)
    assert len(ran) == count
    # What is the same goes on.
    bench_transfer.main([*few, "sft"])
    assert len(ran) == count


def test_a_cell_without_what_it_needs_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran, given = pretend(monkeypatch, tmp_path), arguments(tmp_path, "--only", "data-simpler_env", "ppo")
    bench_transfer.run(bench_transfer.plan(given), given.only, given.output)
    assert ran == ["data-simpler_env"]
    assert "ppo needs sft first" in capsys.readouterr().err


def test_the_list_says_what_is_there_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = pretend(monkeypatch, tmp_path)
    bench_transfer.main(["--output", str(tmp_path), "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert ran == []
    assert lines[0].startswith("missing data-simpler_env: rlvla collect suite=simpler_env")
    with pytest.raises(SystemExit, match="there is no cell pp; cells: data-simpler_env"):
        bench_transfer.main(["--output", str(tmp_path), "--only", "pp"])


def test_the_page_has_what_is_finished_and_names_what_is_missing(
    tmp_path: Path, make_result: Callable[..., Result]
) -> None:
    given = arguments(tmp_path)
    cells = bench_transfer.plan(given)
    assert bench_transfer.write_page(cells, given)["page"] is None
    # Measured with other numbers of trials and noises, as the cells are.
    for suite, outcomes, visits in (
        ("simpler_env", {"carrot": ([0, 0, 1, 0], [1, 1, 1, 0])}, 2),
        ("libero_object", {"butter": ([1, 0], [0, 0]), "milk": ([0, 1], [0, 1])}, 1),
    ):
        results = {
            side: [
                make_result(
                    suite, {task: both[i] for task, both in outcomes.items()}, side, visits, trials=len(outcomes)
                ).to_dict()
            ]
            for i, side in enumerate(("before", "after"))
        }
        folder = tmp_path / f"compare-{suite}"
        folder.mkdir(parents=True)
        (folder / "compare.json").write_text(json.dumps({"results": results}))
    (tmp_path / "minutes.json").write_text('{"sft": 37.4}')
    found = bench_transfer.write_page(cells, given)
    assert found["success"] == {"simpler_env": [0.25, 0.75], "libero_object": [0.5, 0.25]}
    assert "compare-libero_spatial" in found["missing"]
    page = given.page.read_text()
    assert "| before | 25.0 | 50.0 |" in page
    assert "| after | 75.0 | 25.0 |" in page
    assert "simpler_env (trained on)" in page
    assert "**Not there yet:** data-simpler_env" in page
    assert "Of each task of the other suites 10 of 50 initial states" in page
    assert "sft 37" in page
    assert str(tmp_path) not in page
    assert page.count("\n# ") == 0


def test_some_tasks_of_another_suite_are_collected_and_compared(tmp_path: Path) -> None:
    given = arguments(tmp_path, "--foreign-task", "libero_object=0+3", "--foreign-trials", "6")
    cells = {cell.name: cell for cell in bench_transfer.plan(given)}
    for name, cell in cells.items():
        assert ("suite.task=0+3" in cell.words) == name.endswith("libero_object")
    with pytest.raises(SystemExit, match=r"--foreign-task names libero_10; it must be one of --with: libero_spatial"):
        bench_transfer.plan(arguments(tmp_path, "--foreign-task", "libero_10=0"))


def test_the_page_has_the_call_that_makes_it_elsewhere(tmp_path: Path) -> None:
    given = ["--with", "libero_object", "--foreign-task", "libero_object=0+3", "--foreign-weight", "0.5"]
    words = bench_transfer.asked_for(arguments(tmp_path, *given, "--trials", "36", "--no-run"))
    script, *options = words.split()
    assert script == "scripts/bench_transfer.py"
    assert sorted(options) == sorted([*given, "--trials", "36"]), "and no folder of this machine"
