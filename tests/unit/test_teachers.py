"""A teacher answers for its own weights, takes no memory for what it has in common, and pulls."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from rlvla import collect as collect_verb
from rlvla import sft, train
from rlvla.acting import Actor
from rlvla.compose import compose
from rlvla.config import AlgoConfig, ConfigError, Distance, LoraConfig, TeacherConfig
from rlvla.learner import Learner
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.base import ValueHead, trained_groups
from rlvla.policies.folder import save_policy
from rlvla.policies.groups import require_gradients
from rlvla.policies.lora import add_lora
from rlvla.policies.policy import PolicyWithFlow as Policy
from rlvla.rollout import collect
from rlvla.samplers import FlowSampler, Sampler, training_sampler
from rlvla.teachers import ActionTeacher, add_teacher_weight, check_teacher_weights, load_teacher
from rlvla.train import add_advantages
from rlvla.workers import LocalEnvs
from rlvla_algos.flow import flow_sde_schedule
from rlvla_envs.base import FIRST_TRAINING_STATE, SuiteConfig

EPISODES = 6
SUITE = SuiteConfig(name="toy", image_size=32, max_episode_steps=16)
SAMPLER = FlowSampler(flow_sde_schedule(4, 0.5))


@pytest.fixture
def policy(make_policy: Callable[..., Policy]) -> Policy:
    return make_policy("qwen_vla_toy", LocalEnvs(SUITE, 1).spec)


def changed(policy: Policy, *groups: str) -> Policy:
    """A copy with other weights in some groups."""
    other = copy.deepcopy(policy)
    torch.manual_seed(7)
    with torch.no_grad():
        for name in groups:
            for parameter in other.parameter_groups()[name]:
                parameter += 0.05 * torch.randn_like(parameter)
    return other


def teach(student: Policy, folder: Path, **changes: Any) -> ActionTeacher:
    algo = AlgoConfig(**{"teacher": TeacherConfig(policy="start"), **changes})
    require_gradients(student, trained_groups(student, algo.train_vlm, algo.freeze))
    found = load_teacher(algo, student, folder, "cpu")
    assert found is not None
    return found


def rollout_of(
    policy: Policy, algo: AlgoConfig, *, store_inputs: bool = False, sampler: Sampler = SAMPLER
) -> TensorDict:
    head = ValueHead(policy.value_size)
    envs = LocalEnvs(SUITE, 4)
    rollout = collect(
        Actor(policy, block=4, device="cpu"),
        head,
        envs,
        [FIRST_TRAINING_STATE + i for i in range(EPISODES)],
        sampler=sampler,
        key=(0, 0),
        store_context=not algo.train_vlm,
        store_inputs=store_inputs,
    )
    rollout["version"] = torch.zeros(rollout.batch_size, dtype=torch.int64)
    add_advantages(rollout, algo)
    add_teacher_weight(rollout, envs.spec, algo.teacher)
    return rollout


def answer(teacher: ActionTeacher, data: TensorDict, rows: int) -> Tensor:
    """Means of the stored transitions."""
    mean: Tensor = teacher.answers(data, SAMPLER, rows)["mean"]
    return mean


def storages(*policies: Policy) -> int:
    """Bytes of all weights, those counted once that are in one place."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in policies for p in m.parameters()}
    return sum(found.values())


def size(policy: Policy, group: str) -> int:
    return sum(p.nbytes for p in policy.parameter_groups()[group])


@pytest.mark.parametrize(
    ("algo", "rank", "own"),
    [
        ({}, 0, ("expert",)),
        ({"train_vlm": True}, 0, ("expert", "vlm")),
        ({"train_vlm": True}, 2, ()),
    ],
)
def test_a_teacher_that_the_run_starts_from_takes_the_memory_of_what_is_trained_whole(
    policy: Policy, tmp_path: Path, algo: dict[str, Any], rank: int, own: tuple[str, ...]
) -> None:
    save_policy(policy, tmp_path / "start")
    alone = sum(size(policy, group) for group in own)
    add_lora(policy, LoraConfig(rank=rank), ("expert", "vlm"))
    before = storages(policy)
    teacher = teach(policy, tmp_path / "start", **algo)
    assert isinstance(teacher.policy, Policy)
    assert storages(policy, teacher.policy) == before + alone
    # Stored contexts are the teacher's as long as the backbone is.
    assert teacher.reads_contexts == (not algo)


def test_a_teacher_answers_from_stored_contexts_as_from_the_inputs(policy: Policy, tmp_path: Path) -> None:
    save_policy(policy, tmp_path / "start")
    save_policy(changed(policy, "expert"), tmp_path / "expert")
    algo = AlgoConfig(teacher=TeacherConfig(policy=str(tmp_path / "expert")))
    teacher = teach(policy, tmp_path / "start", teacher=algo.teacher)
    assert teacher.reads_contexts
    rollout = rollout_of(policy, algo, store_inputs=True)
    data = rollout[rollout["valid"]]
    found = answer(teacher, data, 7)
    teacher.reads_contexts = False
    torch.testing.assert_close(answer(teacher, data, 7), found, atol=1e-5, rtol=1e-4)
    assert (found - data["mean"]).abs().max() > 1e-3


def test_a_teacher_with_another_backbone_reads_the_inputs_itself(policy: Policy, tmp_path: Path) -> None:
    other = changed(policy, "vlm")
    save_policy(other, tmp_path / "other")
    algo = AlgoConfig(teacher=TeacherConfig(policy=str(tmp_path / "other")))
    teacher = teach(policy, tmp_path, teacher=algo.teacher)
    assert not teacher.reads_contexts
    rollout = rollout_of(policy, algo, store_inputs=True)
    data = rollout[rollout["valid"]]
    found = answer(teacher, data, len(data))
    assert torch.equal(found, answer(ActionTeacher(other, reads_contexts=False), data, len(data)))
    assert not torch.equal(found, answer(ActionTeacher(other, reads_contexts=True), data, len(data)))


def test_the_policy_that_collected_is_its_own_teacher_without_a_pull(policy: Policy, tmp_path: Path) -> None:
    save_policy(policy, tmp_path / "start")
    algo = AlgoConfig(teacher=TeacherConfig(policy="start"))
    teacher = teach(policy, tmp_path / "start")
    rollout = rollout_of(policy, algo)
    data = rollout[rollout["valid"]]
    data["teacher"] = teacher.answers(data, SAMPLER, 8)
    distance = SAMPLER.distance({"mean": data["mean"]}, data, "kl")
    assert (distance * data["mask"]).sum(dim=(1, 2)).max() < 1e-6


def test_a_policy_with_a_distribution_has_a_teacher_too_and_no_velocity(make_policy: Callable[..., Any]) -> None:
    student = make_policy("vlm4vla_toy", LocalEnvs(SUITE, 1).spec)
    other = changed(student, "expert")
    algo = AlgoConfig(teacher=TeacherConfig(policy="start"))
    sampler = training_sampler(student, algo)
    data = rollout_of(student, algo, sampler=sampler)
    data = data[data["valid"]]
    for teacher, is_near in ((student, True), (other, False)):
        data["teacher"] = ActionTeacher(teacher, reads_contexts=True).answers(data, sampler, 8)
        nats = (sampler.distance(dict(data["parameters"].items()), data, "kl") * data["mask"]).sum(dim=(1, 2))
        assert bool((nats.abs() < 1e-5).all()) == is_near
    # Worked out by torch: of the teacher from the student, an entry of the first channel.
    location, log_std = (data["teacher", name] for name in ("location", "log_std"))
    mine = data["parameters"]
    oracle = kl_divergence(
        Normal(location, log_std.exp().expand_as(location)),
        Normal(mine["location"], mine["log_std"].exp().expand_as(location)),
    )
    gaussian = ~data["teacher", "binary"].expand_as(location)
    found = sampler.distance(dict(mine.items()), data, "kl")
    torch.testing.assert_close(found[gaussian], oracle[gaussian], atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="algo.teacher.distance is velocity; it must be kl"):
        training_sampler(student, AlgoConfig(teacher=TeacherConfig(policy="start", distance=Distance.velocity)))


def update(student: Policy, teacher: ActionTeacher | None, algo: AlgoConfig) -> tuple[dict[str, float], Learner]:
    student = copy.deepcopy(student)
    torch.manual_seed(0)
    head = ValueHead(student.value_size)
    learner = Learner(student, head, algo, SAMPLER, seed=0, total_iterations=1, teacher=teacher)
    inputs = teacher is not None and not teacher.reads_contexts
    return learner.update(rollout_of(student, algo, store_inputs=inputs), 0, consume=True), learner


@pytest.mark.parametrize("part", ["expert", "vlm"])
def test_a_teacher_pulls_the_policy_towards_itself(policy: Policy, tmp_path: Path, part: str) -> None:
    save_policy(changed(policy, part), tmp_path / "other")
    common: dict[str, Any] = {
        "critic_only_iterations": 0,
        "min_successes": 0,
        "kl_stop_factor": 1e6,
        "epochs": 6,
        "minibatch_size": 8,
        "policy_lr": 3e-4,
    }

    def divergence(coef: float) -> float:
        config = AlgoConfig(**common, teacher=TeacherConfig(policy=str(tmp_path / "other"), coef=coef))
        teacher = teach(policy, tmp_path, teacher=config.teacher)
        assert teacher.reads_contexts == (part == "expert")
        row, _ = update(policy, teacher, config)
        assert row["ppo/teacher_coef"] == coef
        assert row["loss/teacher"] > 0
        return row["ppo/teacher_kl"]

    ignored, near = divergence(1e-6), divergence(100.0)
    assert near < 0.5 * ignored
    row, _ = update(policy, None, AlgoConfig(**common))
    assert not [key for key in row if "teacher" in key]


def test_the_coefficient_is_steered_and_goes_on_where_it_was(policy: Policy, tmp_path: Path) -> None:
    save_policy(changed(policy, "expert"), tmp_path / "other")
    config = AlgoConfig(
        critic_only_iterations=0,
        min_successes=0,
        epochs=1,
        teacher=TeacherConfig(policy=str(tmp_path / "other"), coef=0.2, target_kl=1e-6),
    )
    teacher = teach(policy, tmp_path, teacher=config.teacher)
    row, learner = update(policy, teacher, config)
    assert row["ppo/teacher_coef"] == 0.2
    state = learner.state_dict()
    assert state["teacher_coef"] == pytest.approx(0.3)
    _, again = update(policy, teacher, config)
    again._teacher_coef = 7.0
    again.load_state_dict(state)
    assert again._teacher_coef == state["teacher_coef"]


def test_each_task_has_its_weight_and_the_others_one(policy: Policy) -> None:
    spec = replace(
        policy.env_spec, tasks=("open", "close", "stack"), evaluation_states_per_task=(2, 2, 2), num_evaluation_states=6
    )
    states = torch.tensor([FIRST_TRAINING_STATE + i for i in range(4)])[:, None].expand(4, 2)
    rollout = TensorDict({"initial_state": states}, batch_size=[4, 2])
    config = TeacherConfig(policy="start", weights={"open": 0.0, "stack": 2.5})
    check_teacher_weights(config, spec)
    add_teacher_weight(rollout, spec, config)
    of_task = {"open": 0.0, "close": 1.0, "stack": 2.5}
    expected = [of_task[spec.task_names()[spec.task_of(int(state))]] for state in states[:, 0]]
    assert set(expected) == {0.0, 1.0, 2.5}
    assert rollout["teacher_weight"].tolist() == [[weight, weight] for weight in expected]
    with pytest.raises(ConfigError, match=r"algo.teacher.weights has push; the tasks of toy are open, close, stack"):
        check_teacher_weights(replace(config, weights={"push": 1.0}), spec)


def test_a_teacher_whose_velocities_mean_something_else_is_refused(
    make_policy: Callable[..., Policy], policy: Policy, tmp_path: Path
) -> None:
    other = copy.deepcopy(policy)
    other.stats = ActionStats(policy.stats.q01, policy.stats.q99 + 0.1, policy.stats.state_mean, policy.stats.state_std)
    save_policy(other, tmp_path / "stats")
    with pytest.raises(ValueError, match="normalised by other statistics"):
        teach(policy, tmp_path / "stats")
    longer = make_policy("qwen_vla_toy", policy.env_spec, "policy.num_denoising_steps=5")
    save_policy(longer, tmp_path / "longer")
    with pytest.raises(ValueError, match="it takes 5 denoising steps, not 4"):
        teach(policy, tmp_path / "longer")
    wider = make_policy("qwen_vla_tiny", policy.env_spec)
    save_policy(wider, tmp_path / "wider")
    with pytest.raises(ValueError, match="its action tensor is 8 x 8, the policy's 8 x 2"):
        teach(policy, tmp_path / "wider")
    with pytest.raises(ValueError, match="there is no policy folder"):
        teach(policy, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algo.teacher.policy=start", "algo.teacher.coef=0"], "algo.teacher.coef is 0"),
        (["algo.teacher.policy=start", "algo.teacher.target_kl=-1"], "algo.teacher.target_kl is -1"),
        (["algo.teacher.policy=start", "algo.teacher.weights.reach=-1"], "algo.teacher.weights.reach is -1"),
        (["algo.teacher.target_kl=0.5"], "algo.teacher.target_kl is 0.5; it must be left out without"),
    ],
)
def test_a_teacher_that_means_nothing_is_refused_before_anything_is_read(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose("train", ["policy=PATH", *words])


def test_a_run_with_adapters_and_its_start_as_teacher(tmp_path: Path) -> None:
    toy = ["suite=toy", "suite.image_size=32"]
    local = ["workers.kind=local", "workers.num_actors=1", "workers.envs_per_actor=4"]
    collect_verb.run(compose("collect", [*toy, *local, f"output={tmp_path / 'data'}", "episodes=2"]))
    few = ["policy=qwen_vla_toy", "steps=2", "batch_size=4", f"dataset={tmp_path / 'data'}"]
    sft.run(compose("sft", [*toy, *few, f"output={tmp_path / 'sft'}"]))
    settings = [
        f"policy={tmp_path / 'sft' / 'policy'}",
        f"output={tmp_path / 'run'}",
        "iterations=2",
        "episodes_per_iteration=4",
        "algo.min_successes=0",
        "algo.epochs=1",
        "eval.trials=2",
        "eval.videos=0",
        "algo.train_vlm=true",
        "lora.rank=2",
        "algo.teacher.policy=start",
        "algo.teacher.target_kl=100",
    ]
    train.run(compose("train", [*toy, *local, *settings]))
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    # The first iteration trains the critic alone. After the second the coefficient falls: the target is far away.
    assert '"ppo/teacher_kl": ' in log
    assert '"ppo/teacher_coef": 0.1' in log
    stored = torch.load(tmp_path / "run/checkpoints/iteration-0002/learner.pt", weights_only=True)
    assert stored["teacher_coef"] == pytest.approx(0.1 / 1.5)
    assert (tmp_path / "run" / "policy" / "adapter_model.safetensors").is_file()
