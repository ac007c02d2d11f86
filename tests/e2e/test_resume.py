"""A process that is killed loses an iteration at most, and nobody can tell from the result that it was."""

import json
from pathlib import Path

import pytest

from tests.e2e.runs import TOY, TRAIN, assert_kills_leave_no_trace, finish, kill_when, make_policy, rows

SHORT = [*TOY, "suite.max_episode_steps=16"]
ADAPTERS = ["algo.train_vlm=true", "lora.rank=2", "lora.groups=[vlm]", "algo.learning_rates={vlm: 1e-4}"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("resume"), TOY, "policy=qwen_vla_toy", "steps=20", "batch_size=8")


@pytest.fixture(scope="module")
def straight(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's run that nobody killed."""
    output = tmp_path_factory.mktemp("undisturbed") / "straight"
    finish("train", [*SHORT, *TRAIN, f"policy={policy}", "iterations=6", f"output={output}"])
    return output


def reasoning_teacher(folder: Path) -> list[str]:
    """Settings of a teacher whose questions and coefficient must go on as well."""
    question = {"role": "user", "content": "what is there?"}
    answers = [{"role": "assistant", "content": "word " * n} for n in range(1, 9)]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"messages": [question, answer]}) for answer in answers))
    own = ["policy=start", f"datasets=[{path}]", "target_kl=1e-4", "batch_size=2"]
    return [f"algo.reasoning_teacher.{setting}" for setting in own]


@pytest.mark.parametrize(
    ("settings", "schedule", "moments"),
    [
        pytest.param([], "async", ("iteration", "checkpoint"), id="toy-one-step-off"),
        pytest.param(ADAPTERS, "sync", ("iteration", "checkpoint"), id="toy-adapters"),
    ],
)
def test_a_run_that_is_killed_ends_with_the_bits_of_one_that_was_not(
    policy: Path, settings: list[str], schedule: str, moments: tuple[str, ...], tmp_path: Path
) -> None:
    if settings is ADAPTERS:
        settings = [*ADAPTERS, *reasoning_teacher(tmp_path)]
    common = [*SHORT, *TRAIN, *settings, f"policy={policy}", "iterations=6"]
    assert_kills_leave_no_trace(tmp_path, common, moments=moments, undisturbed=schedule, schedule=schedule)


def test_a_run_that_is_killed_at_every_moment_ends_with_the_bits_of_one_that_was_not(
    policy: Path, straight: Path, tmp_path: Path
) -> None:
    common = [*SHORT, *TRAIN, f"policy={policy}", "iterations=6"]
    moments = ("before", "iteration", "checkpoint", "after")
    assert_kills_leave_no_trace(tmp_path, common, moments=moments, straight=straight)


def test_a_damaged_checkpoint_costs_an_iteration_and_is_reported(policy: Path, straight: Path, tmp_path: Path) -> None:
    common = [*SHORT, *TRAIN, f"policy={policy}", "iterations=6"]
    harmed = tmp_path / "harmed"
    kill_when(lambda: (harmed / "checkpoints" / "iteration-0003").exists(), "train", [*common, f"output={harmed}"])
    newest = max((harmed / "checkpoints").glob("iteration-*"))
    with (newest / "learner.pt").open("r+b") as file:
        file.seek(100)
        file.write(b"flipped")
    said = finish("train", [*common, f"output={harmed}"])
    assert f"{newest.name} is damaged (learner.pt is not what was written)" in " ".join(said.split())
    alarms = [row for row in rows(harmed) if row["kind"] == "alarm"]
    assert any("is damaged" in row["message"] for row in alarms)
    weights = [(run / "policy" / "model.safetensors").read_bytes() for run in (straight, harmed)]
    assert weights[0] == weights[1]
