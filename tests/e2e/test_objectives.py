"""Every estimator and objective trains the toy through the command line, and keeps the system's promises."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlvla import cli, collect, sft, train
from rlvla.compose import compose
from rlvla_envs import toy

TOY = ["suite=toy", "workers.kind=local", "workers.num_actors=1", "workers.envs_per_actor=24"]
TRAIN = [
    "iterations=2",
    "episodes_per_iteration=24",
    "algo.critic_only_iterations=0",
    "algo.min_successes=1",
    "algo.epochs=1",
    "eval.trials=2",
    "eval.videos=0",
    "eval.shuffled_images=false",
]
GROUPS = ["algo.group_size=6"]
FILTER = ["algo.min_group_success=0.1", "algo.max_group_success=0.9"]
# A rate that destroys the policy in one update.
COLLAPSE = ["iterations=3", "algo.policy_lr=0.02", "algo.max_policy_lr=0.02", "algo.lr_schedule=constant"]
COLLAPSE += ["algo.epochs=3", "algo.minibatch_size=64"]
COLLAPSE += ["algo.kl_stop_factor=1e9", "safeguard.enabled=true", "safeguard.confidence=1", "keep_checkpoints=1"]


@pytest.fixture(scope="module", autouse=True)
def easy_task() -> Iterator[None]:
    """A wide gap and a large goal, so that a policy of a few steps of SFT succeeds now and then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "GAP_HALF_WIDTH", 0.4)
        patch.setattr(toy, "GOAL_RADIUS", 0.5)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations are in data/, the policy in sft/policy."""
    root = tmp_path_factory.mktemp("objectives")
    collect.run(compose("collect", [*TOY, f"output={root / 'data'}", "episodes=8"]))
    data = [f"dataset={root / 'data'}", f"output={root / 'sft'}"]
    sft.run(compose("sft", ["suite=toy", "policy=qwen_vla_toy", *data, "steps=20", "batch_size=8"]))
    return root


def rlvla_train(start: Path, output: Path, *settings: str) -> list[dict[str, Any]]:
    """What a run that succeeded has logged."""
    words = [*TOY, *TRAIN, f"policy={start / 'sft' / 'policy'}", f"output={output}", *settings]
    cli.main(["train", *words])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def moved(start: Path, output: Path) -> set[str]:
    """Parameter groups that a run has changed."""
    before, after = (load_file(folder / "policy" / "model.safetensors") for folder in (start / "sft", output))
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["algo.estimator=grpo", *GROUPS, *FILTER, "algo.clip_epsilon_high=0.28"], id="grpo-filtered"),
        pytest.param(["algo.estimator=rloo", *GROUPS], id="rloo"),
        pytest.param(["algo.estimator=reinforce_pp", *GROUPS], id="reinforce_pp"),
        pytest.param(["algo.critic.pool=attention", "algo.critic.time_to_limit=true"], id="critic"),
        pytest.param(["algo.objective=fpo", "algo.forward.draws=2"], id="fpo"),
        pytest.param(["algo.objective=nft", "algo.estimator=grpo", *GROUPS, "algo.forward.draws=2"], id="nft-grpo"),
        pytest.param(["algo.objective=clone", "algo.estimator=success", "algo.forward.draws=2"], id="clone"),
        pytest.param(["algo.objective=clone", "algo.estimator=best_of_n", *GROUPS], id="best-of-n"),
    ],
)
def test_a_run_learns_with_every_estimator_and_objective(settings: list[str], start: Path, tmp_path: Path) -> None:
    lines = rlvla_train(start, tmp_path / "run", "iterations=1", *settings)
    lines = [line for line in lines if line["kind"] == "iteration"]
    assert len(lines) == 1
    assert all(line["ppo/critic_only"] == 0 for line in lines)
    assert all(0 < line["ppo/kl"] < 10 for line in lines)
    critic = not any("estimator" in word for word in settings)
    assert all(("loss/value" in line) == ("value/explained_variance" in line) == critic for line in lines)
    assert moved(start, tmp_path / "run") == {"expert"}


def test_demonstrations_beside_rl_have_a_loss_of_their_own(start: Path, tmp_path: Path) -> None:
    lines = rlvla_train(start, tmp_path / "run", "iterations=1", f"algo.demonstrations.dataset={start / 'data'}")
    losses = [line["loss/demonstrations"] for line in lines if line["kind"] == "iteration"]
    assert len(losses) == 1
    assert 0 < losses[0] < 3


def test_a_collapse_goes_back_to_the_best_weights_and_says_so(start: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    lines = rlvla_train(start, output, *COLLAPSE)
    alarms = [line["message"] for line in lines if line["kind"] == "alarm" and "collapse" in line["message"]]
    assert alarms
    assert "Went back to iteration-0000; learning rates and KL target are 0.5 times" in alarms[0]
    cautions = [line["optim/caution"] for line in lines if line["kind"] == "iteration"]
    assert cautions[0] == 1
    assert cautions[-1] < 1
    assert "collapse" in (output / "report.html").read_text()
    assert (output / "checkpoints" / "iteration-0000").is_dir()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["algo.estimator=grpo", *GROUPS, "algo.objective=nft", "algo.forward.draws=2"], id="nft-grpo"),
        pytest.param(COLLAPSE, id="collapse"),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    settings: list[str], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in line.items() if not k.startswith(("minutes", "time/", "speed/", "memory/"))}
            for line in lines
        ]

    straight = untimed(rlvla_train(start, tmp_path / "straight", *settings))
    last = max(line["iteration"] for line in straight if line["kind"] == "iteration")
    sound = train.sound_alarms

    def stop(record: Any, row: dict[str, Any], *others: Any) -> None:
        if row["iteration"] == last:
            raise RuntimeError("stopped in the last iteration")
        sound(record, row, *others)

    with monkeypatch.context() as patch:
        patch.setattr(train, "sound_alarms", stop)
        with pytest.raises(SystemExit):
            rlvla_train(start, tmp_path / "stopped", *settings)
    assert untimed(rlvla_train(start, tmp_path / "stopped", *settings)) == straight
    weights = [(tmp_path / run / "policy" / "model.safetensors").read_bytes() for run in ("straight", "stopped")]
    assert weights[0] == weights[1]
