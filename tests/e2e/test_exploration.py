"""Every sampler trains a policy through the command line, and what one learns survives a stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlvla import cli, collect, sft
from rlvla.compose import compose
from rlvla.policies.exploration import FILE
from rlvla.policies.folder import load_policy
from tests.e2e.runs import kill_when

TOY = ["suite=toy", "workers.kind=local", "workers.num_actors=1", "workers.envs_per_actor=8"]
TRAIN = [
    "episodes_per_iteration=8",
    "inference_batch=8",
    "algo.critic_only_iterations=0",
    "algo.min_successes=0",
    "algo.epochs=1",
    "algo.minibatch_size=64",
    "eval.trials=2",
    "eval.videos=0",
    "eval.shuffled_images=false",
]
KINDS = {
    "window": ["algo.sampler.kind=window"],
    "all-steps-cosine": ["algo.sampler.kind=all_steps", "algo.sampler.schedule=cosine", "algo.match_clip=true"],
    "cps": ["algo.sampler.process=cps"],
    "learned": ["algo.sampler.kind=all_steps", "algo.sampler.process=learned", "algo.entropy_coef=0.001"],
    "latent": ["algo.sampler.kind=latent", "algo.reduction=sum", "algo.match_clip=true"],
}
LEARNED = {"learned": {"expert", "explorer"}, "latent": {"explorer"}}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exploration")
    collect.run(compose("collect", [*TOY, f"output={root / 'data'}", "episodes=4"]))
    settings = ["policy=qwen_vla_toy", "steps=20", "batch_size=8"]
    sft.run(compose("sft", ["suite=toy", *settings, f"dataset={root / 'data'}", f"output={root / 'sft'}"]))
    return root / "sft" / "policy"


def train(policy: Path, output: Path, *settings: str) -> list[dict[str, Any]]:
    """Through the command line; the iterations' lines."""
    cli.main(["train", *TOY, *TRAIN, f"policy={policy}", f"output={output}", *settings])
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "iteration"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler_trains_a_policy(kind: str, policy: Path, tmp_path: Path) -> None:
    rows = train(policy, tmp_path / "run", "iterations=2", *KINDS[kind])
    assert len(rows) == 2
    for row in rows:
        assert row["ppo/mean_error"] < 1e-3
        assert row["ppo/ratio_error"] < 1e-2
        assert row["ppo/kl"] > 0
        assert ("ppo/entropy" in row) == (kind in LEARNED)
    before, after = load_policy(policy).state_dict(), load_policy(tmp_path / "run" / "policy").state_dict()
    moved = {name.split(".")[0] for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert moved == LEARNED.get(kind, {"expert"})
    assert (tmp_path / "run" / "policy" / FILE).exists() == (kind in LEARNED)


@pytest.mark.parametrize("kind", ["learned", "latent"])
def test_a_killed_run_that_learns_its_noise_goes_on_to_the_bit(kind: str, policy: Path, tmp_path: Path) -> None:
    settings = ["iterations=3", *KINDS[kind]]
    train(policy, tmp_path / "straight", *settings)
    killed = tmp_path / "killed"
    command = [*TOY, *TRAIN, f"policy={policy}", f"output={killed}", *settings]
    kill_when((killed / "checkpoints" / "iteration-0001").exists, "train", command)
    assert not (killed / "policy").exists()
    rows = train(policy, killed, *settings)
    assert len(rows) == 3
    for file in ("model.safetensors", FILE):
        one, other = (run / "policy" / file for run in (tmp_path / "straight", killed))
        assert one.read_bytes() == other.read_bytes(), f"{file} differs"
