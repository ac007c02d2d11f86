"""The benchmarks run in small, say what they compared, and make a page whose numbers are theirs."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"
SMALL = ["rollout", "policy_inference", "update", "gae_and_loss", "evaluation", "end_to_end", "data_path"]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a script of scripts/bench, which finds its siblings as it does when it is run."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)

    def named(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield named
    # Their plain names would hide other modules from other tests.
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def measured(module: ModuleType, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = module.measure(module.arguments_of().parse_args([*module.SMOKE, *words]))
    # As it would come from its file.
    again: dict[str, Any] = json.loads(json.dumps(found))
    return again


def check(found: dict[str, Any], layer: str) -> None:
    assert found["layer"] == layer
    assert found["machine"]["cpu"]
    assert found["versions"]["torch"]
    assert found["claims"], "nothing is compared with its reference"
    for one in (*found["rows"], *found["claims"]):
        assert one["low"] <= one["median"] <= one["high"]


@pytest.mark.parametrize("layer", SMALL)
def test_a_benchmark_runs_in_small_and_compares_with_its_reference(load: Any, layer: str) -> None:
    found = measured(load(layer))
    check(found, layer)
    # What is counted does not depend on size or speed.
    claims = {claim["name"]: claim for claim in found["claims"]}
    assert all(claim["median"] == claim["exactly"] for claim in claims.values() if "exactly" in claim)


def test_a_checkpoint_is_measured_where_it_was_asked_for_and_leaves_nothing(load: Any, tmp_path: Path) -> None:
    check(measured(load("checkpoint"), "--folder", str(tmp_path)), "checkpoint")
    assert not list(tmp_path.iterdir())


@pytest.mark.simulator
@pytest.mark.slow
def test_chunk_stepping_runs_in_small_on_a_real_simulator(load: Any) -> None:
    found = measured(load("chunk_stepping"))
    check(found, "chunk_stepping")
    # Targets are those of 128 pixels and 16 steps.
    assert not any("least" in claim or "most" in claim for claim in found["claims"])


def test_loops_take_turns_and_warm_up_is_not_counted(load: Any) -> None:
    order: list[str] = []
    loops = {name: lambda name=name: order.append(name) or 3 for name in ("a", "b")}
    turns = load("measuring").in_turns(loops, 2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert {name: [turn.amount for turn in of] for name, of in turns.items()} == {"a": [3, 3], "b": [3, 3]}


def test_a_ratio_is_formed_of_each_pair_of_turns(load: Any) -> None:
    measuring = load("measuring")
    ours = [measuring.Turn(10, 1.0), measuring.Turn(10, 10.0)]
    theirs = [measuring.Turn(10, 2.0), measuring.Turn(10, 20.0)]
    # Ten times slower in the second round, both of them: the ratio is 2 in each.
    assert measuring.over(ours, theirs) == [2.0, 2.0]
    assert measuring.Spread.of([2.0, 2.0]) == measuring.Spread(2.0, 2.0, 2.0, 2)


RESULT = {
    "layer": "update",
    "about": "two updates, in turns",
    "command": "scripts/bench/update.py",
    "machine": {
        "cpu": "A CPU, 2 cores",
        "memory_gb": 25.0,
        "load_before": 0.5,
        "load_after": 7.25,
        "date": "2026-01-02",
    },
    "versions": {"python": "3.11.7", "torch": "2.9", "git_commit": "abc"},
    "seconds": 90.0,
    "rows": [{"name": "an update", "unit": "decisions/s", "median": 1234.5, "low": 1000.0, "high": 2000.0, "n": 3}],
    "claims": [
        {"name": "passes", "median": 2.0, "low": 2.0, "high": 2.0, "n": 1, "exactly": 1},
        {"name": "faster", "median": 6.5, "low": 6.0, "high": 7.0, "n": 3, "least": 6.0},
        {"name": "no target", "median": 3.25, "low": 3.0, "high": 4.0, "n": 3},
    ],
    "notes": ["A note."],
}


def test_the_page_shows_targets_beside_what_was_measured_with_machine_and_command(load: Any) -> None:
    text = load("page").render({"update": RESULT}, "make bench")
    assert "| Update | passes | exactly 1 | 2 | **no** |" in text
    assert "| Update | faster | at least 6 | 6.5 [6, 7] | yes |" in text
    assert "| no target | 3.25 [3, 4] |" in text
    assert "| an update | decisions/s | 1234 [1000, 2000] |" in text
    assert "A CPU, 2 cores" in text
    assert "1.5 minutes" in text
    assert "0.5 to 7.2" in text
    assert "`scripts/bench/update.py`" in text
    assert "Not measured so far: `chunk_stepping`" in text


def test_what_people_wrote_on_the_page_stays_when_it_is_written_again(load: Any, tmp_path: Path) -> None:
    run = load("run")
    (tmp_path / "update.json").write_text(json.dumps(RESULT))
    words = ["--no-run", "--output", str(tmp_path), "--page", str(tmp_path / "page.md")]
    assert run.main(words) == 0
    page = tmp_path / "page.md"
    page.write_text(page.read_text().replace(run.COMMENTS[0], run.COMMENTS[0] + "\nTwo cores, and both were busy.\n"))
    first = page.read_text()
    assert run.main(words) == 0
    assert page.read_text() == first
    assert "Two cores, and both were busy." in first


def test_a_layer_that_was_measured_is_not_measured_again_unless_asked(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load("run")
    (tmp_path / "update.json").write_text(json.dumps(RESULT))
    asked: list[str] = []
    monkeypatch.setattr(run, "run", lambda layer, output, smoke: not asked.append(layer))
    words = ["--layers", "update", "gae_and_loss", "--output", str(tmp_path), "--page", str(tmp_path / "page.md")]
    assert run.main(words) == 0
    assert asked == ["gae_and_loss"]
    run.main([*words, "--again"])
    assert asked == ["gae_and_loss", "update", "gae_and_loss"]


def test_a_benchmark_that_fails_leaves_its_log_and_no_result(load: Any, tmp_path: Path) -> None:
    run = load("run")
    run.smallest = lambda layer: ["--policy", "no_such_policy"]
    assert not run.run("update", tmp_path, smoke=True)
    assert "no_such_policy" in (tmp_path / "update.log").read_text()
    assert not (tmp_path / "update.json").exists()


def test_every_benchmark_of_the_page_has_a_script_with_a_small_size(load: Any) -> None:
    run, page = load("run"), load("page")
    for layer in page.TITLES:
        assert run.smallest(layer)


def test_a_copy_of_an_image_counts_once_and_a_view_not_at_all(load: Any) -> None:
    copies = load("image_copies")
    pixels = np.zeros((4, 8, 8, 3), dtype=np.uint8).view(copies.Followed)
    with copies.counting_copies() as found:
        pixels[1:3]
        pixels[:, None]
    assert found.total() == 0
    with copies.counting_copies() as found:
        np.stack([pixels[0], pixels[1]])
    assert found.total() == 2 * 8 * 8 * 3
    with copies.counting_copies() as found:
        np.concatenate([pixels[[0, 1]], pixels[2:]])
    # Two rows picked, then all four put together.
    assert found.total() == (2 + 4) * 8 * 8 * 3


def test_copies_of_tensors_are_counted_where_they_are_made(load: Any) -> None:
    import torch

    copies = load("image_copies")
    images = torch.zeros((4, 1, 8, 8, 3), dtype=torch.uint8)
    with copies.counting_copies() as found:
        images.flatten(0, 1)[:2].float()
        images.new_zeros((6, 1, 8, 8, 3))
    assert found.total() == 0
    with copies.counting_copies() as found:
        kept = images.new_zeros((6, 1, 8, 8, 3))
        kept[torch.tensor([1, 2, 3, 4])] = images
        kept[torch.tensor([True, False, False, False, False, True])]
        torch.cat([images, images])
    assert found.total() == (4 + 2 + 8) * 8 * 8 * 3
    with copies.counting_copies() as found:
        kept[torch.tensor([5])] = images[:1]
    assert found.total() == 8 * 8 * 3


def test_where_slots_go_in_step_the_simulators_own_picture_is_kept_and_copied_into_a_minibatch(load: Any) -> None:
    data_path = load("data_path")
    # As many episodes as slots, equally long: no block is filled up, nobody restarts.
    found = data_path.count("local", "equal", 4, 4, 1)
    assert found.places == {}
    assert found.filling == 0
    assert found.epoch == 1.0


def test_an_image_is_kept_where_the_simulator_put_it_and_copied_once_into_each_minibatch(load: Any) -> None:
    found = load("data_path").count("local", "unequal", 4, 12, 2)
    assert found.places == {}
    assert found.epoch == 1.0
    # Rows of restarts and of chunks are put together for the pass that decides.
    assert 0 < found.stacking <= 1.0
    # The KL reads every decision once more, the check before the first step some of them.
    assert 1.0 < found.beside < 2.0
