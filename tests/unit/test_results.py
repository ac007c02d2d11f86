"""Results on disk: found again by what decided them, and by nothing else."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rlvla.config import ConfigError, EvalConfig
from rlvla.results import RESULT, Result, ResultStore, describe_suite, identify, policy_digest, read_results, write_json
from rlvla_envs import toy
from rlvla_envs.base import SuiteConfig

MakeResult = Callable[..., Result]
SETTINGS = EvalConfig(shuffled_images=False)


def identity(suite: SuiteConfig | None = None, settings: EvalConfig = SETTINGS, batch: int = 16) -> str:
    described = describe_suite(suite or SuiteConfig())
    return json.dumps(identify("policy", described, settings, batch), sort_keys=True)


def test_whatever_can_change_an_episode_is_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    same = identity()
    others = [
        identity(SuiteConfig(chunk_size=4)),
        identity(SuiteConfig(instruction="do nothing")),
        identity(settings=EvalConfig(shuffled_images=False, trials=7)),
        identity(settings=EvalConfig(shuffled_images=False, temperature=1.0)),
        identity(settings=EvalConfig(shuffled_images=False, seed=1)),
        identity(settings=EvalConfig(shuffled_images=False, noise_seeds=2)),
        identity(batch=8),
    ]
    monkeypatch.setattr(toy, "VERSION", "2", raising=False)
    others.append(identity())
    assert len({same, *others}) == len(others) + 1


def test_films_and_the_place_of_the_interpreter_are_not_another_result() -> None:
    import sys

    assert identity(settings=EvalConfig(shuffled_images=False, videos=9)) == identity()
    # Another interpreter is asked for its versions; here it is the same one.
    assert identity(SuiteConfig(python=sys.executable)) == identity()


def test_a_policy_is_its_files_and_not_its_place(tmp_path: Path) -> None:
    first = tmp_path / "one"
    first.mkdir()
    for name in ("config.yaml", "model.safetensors", "action_stats.json", "tokenizer.json"):
        (first / name).write_text(name)
    digest = policy_digest(first)
    shutil.copytree(first, tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("mine")
    assert policy_digest(tmp_path / "two") == digest
    for name in ("config.yaml", "model.safetensors", "action_stats.json", "tokenizer.json"):
        (tmp_path / "two" / name).write_text("other")
        assert policy_digest(tmp_path / "two") != digest
        (tmp_path / "two" / name).write_text(name)


def test_what_was_saved_is_found(tmp_path: Path, make_result: MakeResult) -> None:
    store, result = ResultStore(tmp_path), make_result("sim", {"carrot": [1, 0, 1], "spoon": [0]})
    assert store.find(result.identity) == (None, "")
    store.save(result)
    assert store.find(result.identity) == (result, "")
    assert store.find(make_result("sim", {"carrot": [1, 0, 1], "spoon": [0]}, trials=3).identity) == (None, "")


@pytest.mark.parametrize("damage", ["cut", "swapped", "miscounted", "old"])
def test_a_damaged_result_is_measured_again_and_says_so(tmp_path: Path, make_result: MakeResult, damage: str) -> None:
    store, result = ResultStore(tmp_path), make_result("sim", {"carrot": [1, 0, 1]})
    store.save(result)
    path = store.folder(result.identity) / RESULT
    content = json.loads(path.read_text())
    if damage == "swapped":
        content["identity"]["policy"] = "another"
    elif damage == "miscounted":
        content["evaluation"]["outcomes"] = [1]
    elif damage == "old":
        content["identity"]["format"] = 0
    path.write_text(json.dumps(content)[: 100 if damage == "cut" else None])
    found, said = store.find(result.identity)
    assert found is None
    assert "is measured again" in said


def test_a_film_that_is_gone_is_not_listed(tmp_path: Path, make_result: MakeResult) -> None:
    store, result = ResultStore(tmp_path), make_result("sim", {"carrot": [1, 0, 1]})
    for state in (0, 1):
        store.add_film(
            result.identity, {"state": state, "file": f"film-{state}.mp4", "success": True, "instruction": ""}
        )
        (store.folder(result.identity) / f"film-{state}.mp4").write_bytes(b"x")
    store.add_film(result.identity, {"state": 2, "file": None, "success": None, "instruction": ""})
    assert [film["state"] for film in store.films(result.identity)] == [0, 1, 2]
    (store.folder(result.identity) / "film-0.mp4").unlink()
    assert [film["state"] for film in store.films(result.identity)] == [1, 2]


def test_a_result_file_is_of_one_policy(tmp_path: Path, make_result: MakeResult) -> None:
    one, other = (make_result("sim", {"carrot": [1]}, policy=name) for name in ("sft", "ppo"))
    write_json(tmp_path / "one.json", {"results": [one.to_dict()]})
    assert read_results(tmp_path / "one.json") == [one]
    write_json(tmp_path / "single.json", one.to_dict())
    assert read_results(tmp_path / "single.json") == [one]
    write_json(tmp_path / "two.json", {"results": [one.to_dict(), other.to_dict()]})
    with pytest.raises(ConfigError, match="results of 2 policies"):
        read_results(tmp_path / "two.json")
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(ConfigError, match="no result file that can be read"):
        read_results(tmp_path / "torn.json")


def test_conditions_are_everything_but_the_policy(make_result: MakeResult) -> None:
    one = make_result("sim", {"carrot": [1, 0]}, policy="sft")
    assert one.conditions == make_result("sim", {"carrot": [0, 0]}, policy="ppo").conditions
    assert one.conditions != make_result("sim", {"carrot": [1, 0]}, notes=("stand-in: a slab",)).conditions
    other = replace(one, evaluation=replace(one.evaluation, initial_states=[0, 5]))
    assert one.conditions != other.conditions
