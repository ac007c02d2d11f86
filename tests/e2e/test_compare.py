"""`rlvla eval` over suites, `rlvla compare` and `rlvla suites` with real policies on the toy."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlvla import compare, evaluate_suites
from rlvla.compose import compose
from rlvla.config import ConfigError
from rlvla.policies.folder import save_policy
from rlvla.run import lock_folder
from tests.e2e.runs import kill_when, rlvla

TOY = ["suites=[toy]", "workers.kind=local", "workers.num_actors=1", "device=cpu"]
TRIALS = 24


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory, make_policy: Callable[..., Any]) -> tuple[Path, Path]:
    """Two policies that were never trained: they go somewhere, each elsewhere."""
    from rlvla_envs.base import SuiteConfig
    from rlvla_envs.suites import make_env

    root = tmp_path_factory.mktemp("policies")
    spec = make_env(SuiteConfig(name="toy", image_size=32, max_episode_steps=32), 1).spec
    policy = make_policy("qwen_vla_toy", spec)
    save_policy(policy, root / "sft" / "policy")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0)
    save_policy(policy, root / "ppo" / "policy")
    return root / "sft" / "policy", root / "ppo" / "policy"


def settings(root: Path, *more: str) -> list[str]:
    return [*TOY, f"cache={root / 'cache'}", f"eval.trials={TRIALS}", "eval.videos=0", *more]


def measured(root: Path, policy: str) -> dict[str, Any]:
    """What was measured, without what a clock or a folder says."""
    (result,) = json.loads((root / f"results-{policy}.json").read_text())["results"]
    return {key: result[key] for key in ("identity", "evaluation", "spec")}


def no_simulator(*_: object, **__: object) -> None:
    raise AssertionError("a simulator was started")


def test_an_evaluation_killed_twice_goes_on_and_gives_the_result_of_one_that_was_not(
    policies: tuple[Path, Path], tmp_path: Path
) -> None:
    one = ["workers.envs_per_actor=1", "inference_batch=4"]
    words = ["eval", str(policies[0]), *TOY, *one, f"eval.trials={TRIALS}", "eval.videos=0"]
    here = [*words, f"cache={tmp_path / 'cache'}", f"output={tmp_path / 'killed'}"]

    def played() -> int:
        logs = list((tmp_path / "cache").glob("toy-*/evaluation.episodes.jsonl"))
        return logs[0].read_text().count("\n") - 1 if logs else -1

    for episodes in (3, 9):
        kill_when(lambda least=episodes: played() >= least, "eval", here[1:])
    kept = played()
    assert 9 <= kept < TRIALS
    done = evaluate_suites.run(compose("eval", here[1:]))
    assert done["episodes_played"] == TRIALS - kept
    assert played() == -1

    straight = [*words[1:], f"cache={tmp_path / 'other'}", f"output={tmp_path / 'straight'}"]
    evaluate_suites.run(compose("eval", straight))
    assert measured(tmp_path / "killed", "sft") == measured(tmp_path / "straight", "sft")
    # A comparison of results that could not differ would show nothing.
    assert len(set(measured(tmp_path / "killed", "sft")["evaluation"]["executed_steps"])) > 3


def test_what_was_measured_once_is_never_played_again(
    policies: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = map(str, policies)
    first = evaluate_suites.run(compose("eval", [before, *settings(tmp_path, f"output={tmp_path / 'eval'}")]))
    assert first["episodes_played"] == TRIALS
    words = [before, after, *settings(tmp_path, f"output={tmp_path / 'compare'}")]
    # What it lacks is AFTER alone.
    second = compare.run(compose("compare", words))
    assert (second["episodes_played"], second["results_known"]) == (TRIALS, 1)
    page = (tmp_path / "compare" / "compare.md").read_text()

    for name in ("open_envs", "ask", "load_policy"):
        monkeypatch.setattr(evaluate_suites, name, no_simulator)
    third = compare.run(compose("compare", words))
    assert (third["episodes_played"], third["results_known"]) == (0, 2)
    assert (tmp_path / "compare" / "compare.md").read_text() == page
    # A copy of a policy is the same policy.
    import shutil

    shutil.copytree(policies[1], tmp_path / "copy")
    fourth = evaluate_suites.run(
        compose("eval", [str(tmp_path / "copy"), *settings(tmp_path, f"output={tmp_path / 'copied'}")])
    )
    assert fourth["episodes_played"] == 0


def test_films_are_made_once_and_shown_side_by_side(
    policies: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*map(str, policies), *settings(tmp_path, "eval.trials=3", "eval.videos=2", f"output={tmp_path / 'out'}")]
    compare.run(compose("compare", words))
    html = (tmp_path / "out" / "compare.html").read_text()
    assert html.count("data:video/mp4;base64,") == 4
    monkeypatch.setattr(evaluate_suites, "open_envs", no_simulator)
    compare.run(compose("compare", words))
    next((tmp_path / "cache").glob("toy-*/film-1.mp4")).unlink()
    with pytest.raises(AssertionError, match="a simulator was started"):
        compare.run(compose("compare", words))


def test_another_policy_in_the_same_folder_is_another_policy(policies: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "policy"
    shutil.copytree(policies[0], folder)
    words = [str(folder), *settings(tmp_path, "eval.trials=2")]
    evaluate_suites.run(compose("eval", [*words, f"output={tmp_path / 'one'}"]))
    shutil.rmtree(folder)
    shutil.copytree(policies[1], folder)
    with pytest.raises(ConfigError, match="weights are not those"):
        evaluate_suites.run(compose("eval", [*words, f"output={tmp_path / 'one'}"]))
    again = evaluate_suites.run(compose("eval", [*words, f"output={tmp_path / 'two'}"]))
    assert again["episodes_played"] == 2


def test_a_policy_on_suites_with_other_conventions_is_refused_before_anything_is_played(
    policies: tuple[Path, Path], tmp_path: Path
) -> None:
    done = rlvla("eval", *map(str, policies), *settings(tmp_path, "suite.chunk_size=4", f"output={tmp_path / 'out'}"))
    assert done.returncode == 2
    assert re.search(r"sft/policy and .*ppo/policy on toy: .*different conventions", done.stderr)
    assert re.search(r"chunk size H +8 +4", done.stderr)
    assert "suites.toy.chunk_size=8" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_a_suite_without_its_assets_is_refused_with_the_command_that_helps(
    policies: tuple[Path, Path], tmp_path: Path
) -> None:
    words = settings(tmp_path, "suites=[toy,simpler_env]", f"output={tmp_path / 'out'}")[1:]
    done = rlvla("compare", *map(str, policies), *words, MS_ASSET_DIR=str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "suite simpler_env cannot run here" in done.stderr
    assert "mani_skill.utils.download_asset bridge_v2_real2sim" in done.stderr
    assert not (tmp_path / "out").exists()


def test_result_files_measured_with_other_settings_are_refused_as_a_table(
    policies: tuple[Path, Path], tmp_path: Path
) -> None:
    files = []
    for policy, temperature in zip(policies, ("0.6", "1.0"), strict=True):
        output = tmp_path / temperature
        words = [
            str(policy),
            *settings(tmp_path, "eval.trials=2", f"eval.temperature={temperature}"),
            f"output={output}",
        ]
        evaluate_suites.run(compose("eval", words))
        files.append(str(next(output.glob("results-*.json"))))
    done = rlvla("compare", *files, f"output={tmp_path / 'out'}")
    assert done.returncode == 2
    assert re.search(r"toy\.settings\.temperature +0\.6 +1\.0", done.stderr)
    assert "rlvla compare" in done.stderr

    # Two files that were measured alike need neither suites nor simulators nor policies.
    same = compare.run(compose("compare", [files[0], files[0], f"output={tmp_path / 'same'}"]))
    assert same["notes"] == ["Before and after are the same policy."]
    # A file beside a policy: the settings are the command's, and the file's are not these.
    words = settings(tmp_path, "eval.trials=3", f"output={tmp_path / 'mixed'}")
    with pytest.raises(ConfigError, match=r"temperature is 1\.0 there and 0\.6 here|trials is 2 there and 3 here"):
        compare.run(compose("compare", [str(policies[0]), files[1], *words]))
    with pytest.raises(ConfigError, match="suites must be given"):
        compare.run(compose("compare", [str(policies[0]), files[1]]))


def test_two_processes_do_not_measure_the_same_thing(policies: tuple[Path, Path], tmp_path: Path) -> None:
    words = [str(policies[0]), *settings(tmp_path, "eval.trials=2")]
    evaluate_suites.run(compose("eval", [*words, f"output={tmp_path / 'one'}"]))
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "result.json").unlink()
    with lock_folder(entry), pytest.raises(ConfigError, match="another process is writing to .* give another cache="):
        evaluate_suites.run(compose("eval", [*words, f"output={tmp_path / 'two'}"]))


def test_the_output_of_one_command_is_not_overwritten_by_another(policies: tuple[Path, Path], tmp_path: Path) -> None:
    words = [str(policies[0]), *settings(tmp_path, f"output={tmp_path / 'out'}")]
    evaluate_suites.run(compose("eval", [*words, "eval.trials=2"]))
    with pytest.raises(ConfigError, match=r"results of eval_suites with other settings: eval\.trials was 2 and is 3"):
        evaluate_suites.run(compose("eval", [*words, "eval.trials=3"]))


def test_suites_are_listed_with_what_they_lack(tmp_path: Path) -> None:
    done = rlvla("suites", "toy", "simpler_env_ood", MS_ASSET_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    toy, ood = json.loads(done.stdout)["suites"]
    assert (toy["status"], toy["role"], toy["states"]) == ("ok", "training", 1000)
    assert (ood["status"], ood["role"], ood["tasks"], ood["states"]) == ("missing", "held-out", 6, 136)
    assert "download_asset" in ood["fix"]
    assert re.search(r"simpler_env_ood +held-out +6 +136 +not here", done.stderr)
