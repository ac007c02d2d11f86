"""Twin-to-one distillation: the loss of appendix G, who may be whose teacher, and SFT with one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlvla import collect, sft
from rlvla.compose import compose
from rlvla.config import ConfigError
from rlvla.distill import TwinTeacher, feature_loss
from rlvla.policies.folder import load_policy, save_policy
from rlvla_envs.base import EnvSpec, Observation, VecEnv

TOY = ["suite=toy", "workers.kind=local", "workers.num_actors=1"]
RIGHT = ["policy.prompt.user='Instruction: {instruction} Robot Type: {robot_type}'"]
"""The right prompt of twinbrain_vla_toy."""


def test_the_loss_by_hand() -> None:
    # Row 0: tokens at squared distances 5 and 0, mean 2.5, its padding left out. Row 1: 1, 4 and 9, mean 14 / 3.
    student = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [9.0, 9.0]], [[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert feature_loss(student, torch.zeros(2, 3, 2), mask).item() == pytest.approx((2.5 + 14 / 3) / 2)


def test_the_loss_moves_the_student_and_not_the_teacher() -> None:
    student, teacher = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    feature_loss(student, teacher, torch.ones(2, 3, dtype=torch.bool)).backward()
    assert teacher.grad is None
    assert student.grad is not None
    # d/dh of the mean over 2 rows and 3 tokens of |h - t|^2.
    torch.testing.assert_close(student.grad, (2 * (student - teacher) / 6).detach())


@pytest.fixture
def world(make_toy: Callable[..., VecEnv]) -> tuple[EnvSpec, Observation]:
    env = make_toy(3)
    return env.spec, env.reset(range(3), range(3))


@pytest.fixture
def folder(make_policy: Callable[..., Any], world: tuple[EnvSpec, Observation], tmp_path: Path) -> Path:
    save_policy(make_policy("twinbrain_vla_toy", world[0]), tmp_path / "twin")
    return tmp_path / "twin"


def make_student(make_policy: Callable[..., Any], folder: Path, spec: EnvSpec, *overrides: str) -> Any:
    student = make_policy("qwen_gr00t_toy", spec, *RIGHT, *overrides)
    student.tokenizer = load_policy(folder).tokenizer
    return student


def test_a_student_with_the_right_brains_states_would_have_no_loss(
    make_policy: Callable[..., Any], world: tuple[EnvSpec, Observation], folder: Path
) -> None:
    spec, seen = world
    student = make_student(make_policy, folder, spec)
    teacher = TwinTeacher(folder, student, "cpu")
    assert not any(p.requires_grad for p in teacher.policy.parameters())
    seen = replace(seen, instruction=["go", "reach the goal and then turn around slowly, twice", "go"])
    batch = student.collate(seen)
    theirs = teacher.policy.encode(teacher.policy.collate(seen))
    # One token more than the student has: the state's.
    length = batch["mask"].shape[1]
    assert theirs.tokens.shape[1] == length + 1
    own = student.encode(batch)
    assert teacher.loss(seen, batch, own).item() > 0.1
    assert teacher.loss(seen, batch, replace(own, tokens=theirs.tokens[:, :length])).item() == 0
    # A state elsewhere does not matter to the prompt's tokens.
    assert seen.state is not None
    moved = replace(seen, state=seen.state + 1)
    assert teacher.loss(moved, batch, own).item() == teacher.loss(seen, batch, own).item()


def test_a_student_that_reads_another_prompt_is_refused(
    make_policy: Callable[..., Any], world: tuple[EnvSpec, Observation], folder: Path
) -> None:
    spec, seen = world
    student = make_student(make_policy, folder, spec, "policy.prompt.user='{instruction}'")
    batch = student.collate(seen)
    with pytest.raises(ValueError, match=r"read different prompts. Set policy.prompt.system .* right_prompt in"):
        TwinTeacher(folder, student, "cpu").loss(seen, batch, student.encode(batch))


def test_who_cannot_be_a_teacher_or_a_student_is_told_why(
    make_policy: Callable[..., Any], world: tuple[EnvSpec, Observation], folder: Path, tmp_path: Path
) -> None:
    spec, _ = world
    student = make_student(make_policy, folder, spec)
    save_policy(student, tmp_path / "one")
    with pytest.raises(ValueError, match=r"one is a qwen_gr00t policy; it must be a twinbrain_vla policy"):
        TwinTeacher(tmp_path / "one", student, "cpu")
    with pytest.raises(ValueError, match="the student has two brains as well"):
        TwinTeacher(folder, load_policy(folder), "cpu")
    other = make_student(make_policy, folder, replace(spec, control_hz=3.0))
    with pytest.raises(ValueError, match="the teacher and the student use different conventions"):
        TwinTeacher(folder, other, "cpu")
    wide = make_student(make_policy, folder, spec, "policy.vlm.hidden_size=96")
    with pytest.raises(ValueError, match="hidden_size is 96, the teacher's 64"):
        TwinTeacher(folder, wide, "cpu")


def test_a_teacher_needs_a_backbone_that_learns_and_brings_its_tokenizer() -> None:
    for other in ("train_vlm=false", "tokenizer=somewhere"):
        with pytest.raises(ConfigError, match="twin_teacher is twin; it must be null with train_vlm=false"):
            compose("sft", ["dataset=none", "policy=qwen_gr00t_toy", "twin_teacher=twin", other])


def test_sft_draws_the_student_towards_its_teacher(tmp_path: Path) -> None:
    collect.run(compose("collect", [*TOY, f"output={tmp_path / 'data'}", "episodes=4"]))
    common = ["suite=toy", f"dataset={tmp_path / 'data'}", "batch_size=8", "noise_draws=1"]
    twin = [*common, "policy=twinbrain_vla_toy", f"output={tmp_path / 'twin'}", "steps=3"]
    sft.run(compose("sft", twin))
    teacher = tmp_path / "twin/policy"
    left, right = load_policy(teacher).left, load_policy(teacher).vlm  # type: ignore[attr-defined]
    # They began as one; only the right has learnt.
    moved = [n for n, p in right.named_parameters() if not torch.equal(p, left.get_parameter(n))]
    assert len(moved) > 20

    student = [*common, *RIGHT, "policy=qwen_gr00t_toy", f"output={tmp_path / 'one'}", "steps=60"]
    sft.run(compose("sft", [*student, f"twin_teacher={teacher}"]))
    rows = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    features = [row["loss/feature"] for row in rows if row.get("kind") == "sft"]
    assert len(features) == 3
    assert features[-1] < 0.5 * features[0]
