"""The memory plan: every number against the thing itself, for policies that are small enough to be built."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from rlvla.acting import Actor
from rlvla.compose import compose
from rlvla.config import ComputeConfig, ConfigError, DoctorConfig, Precision
from rlvla.learner import Learner
from rlvla.memory import (
    FULL,
    Machine,
    Plan,
    World,
    disk_bytes,
    max_decisions,
    plan_run,
    reasoning_bytes,
    rollout_bytes,
    teacher_bytes,
    trained_bytes,
    unallocated_policy,
    value_parameters,
    worst_phases,
)
from rlvla.policies.base import ValueHead, trained_groups
from rlvla.policies.folder import save_policy
from rlvla.policies.footprint import Footprint, footprint, load_unallocated
from rlvla.policies.lora import add_lora
from rlvla.policies.numerics import MATRICES
from rlvla.policies.qwen_vla import QwenVLA
from rlvla.rollout import collect
from rlvla.samplers import training_sampler
from rlvla.train import add_advantages
from rlvla.workers import LocalEnvs
from rlvla_envs.base import FIRST_TRAINING_STATE

EPISODES = 6


def doctor(*overrides: str) -> DoctorConfig:
    config: DoctorConfig = compose("doctor", ["suite=toy", "workers.kind=local", *overrides])
    return config


@pytest.fixture(scope="module")
def policy(make_policy: Callable[..., QwenVLA]) -> QwenVLA:
    return make_policy("qwen_vla_toy", LocalEnvs(doctor().suite, 1).spec)


@pytest.fixture(scope="module")
def folder(policy: QwenVLA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy"
    save_policy(policy, path)
    return path


def world(config: DoctorConfig) -> World:
    env = LocalEnvs(config.suite, 1)
    return World(env.spec, "fly through the gap and reach the green goal", 300)


def size_of(config: DoctorConfig) -> Footprint:
    return unallocated_policy(config, world(config))[1]


def learner_of(policy: QwenVLA, config: DoctorConfig) -> Learner:
    head = ValueHead(policy.value_size, config.algo.value_hidden_sizes)
    sampler = training_sampler(policy, config.algo)
    return Learner(policy, head, config.algo, sampler, seed=0, total_iterations=1)


def rollout_of(policy: QwenVLA, config: DoctorConfig) -> TensorDict:
    rollout = collect(
        Actor(policy, block=8, device="cpu"),
        ValueHead(policy.value_size, config.algo.value_hidden_sizes),
        LocalEnvs(config.suite, 8),
        [FIRST_TRAINING_STATE + i for i in range(EPISODES)],
        sampler=training_sampler(policy, config.algo),
        key=(0, 0),
        store_context=not config.algo.train_vlm,
    )
    # As `rlvla.pipeline` does.
    rollout["version"] = torch.zeros(rollout.batch_size, dtype=torch.int64)
    add_advantages(rollout, config.algo)
    return rollout


def bytes_of(data: TensorDict) -> int:
    return sum(tensor.nbytes for tensor in data.values(include_nested=True, leaves_only=True))


def test_the_papers_model_takes_91_gb_before_activations_when_all_of_it_is_trained() -> None:
    config = doctor("policy=qwen_vla_4b", "algo.train_vlm=true")
    size = size_of(config)
    assert round(size.vlm_parameters / 1e9, 2) == 4.54
    assert round(size.expert_parameters / 1e9, 3) == 1.149
    # (4.54 + 1.149) 10^9 parameters, each 4 bytes of weight, 4 of gradient, 8 of Adam's moments: 91.0 GB.
    held = size.policy_bytes + 3 * trained_bytes(config, size)
    assert round(held / 1e9) == 91
    frozen = doctor("policy=qwen_vla_4b")
    # 5.689 weights of 4 bytes and 1.149 of 12: 36.5 GB.
    assert round((size.policy_bytes + 3 * trained_bytes(frozen, size)) / 1e9, 1) == 36.5


def test_adapters_on_both_parts_of_the_papers_model_leave_little_to_train() -> None:
    config = doctor("policy=qwen_vla_4b", "algo.train_vlm=true", "lora.rank=32")
    size = size_of(config)
    # A layer of n inputs and m outputs gets 4 x 32 (n + m) bytes. One block of the expert, 1536 wide: qkv 6144, out
    # 3072, ffn_in 22016, ffn_out 11776, together 43008; 16 blocks.
    assert size.expert_adapters == 16 * 43008 * 32 * 4
    assert 60e6 < size.vlm_adapters / 4 < 70e6
    held = size.policy_bytes + 3 * trained_bytes(config, size)
    assert 23.5e9 < held < 25e9
    frozen = doctor("policy=qwen_vla_4b", "algo.train_vlm=true", "lora.rank=32", "algo.freeze=[vlm]")
    assert trained_bytes(frozen, size_of(frozen)) == size.expert_adapters + 4 * value_parameters(frozen, size)


def test_a_teacher_takes_what_it_does_not_share() -> None:
    def taken(*settings: str) -> tuple[Footprint, int]:
        config = doctor("policy=qwen_vla_4b", *settings)
        size = size_of(config)
        return size, teacher_bytes(config, size)

    assert taken()[1] == 0
    size, own = taken("algo.teacher.policy=start")
    assert own == size.expert_bytes
    size, own = taken("algo.teacher.policy=start", "algo.train_vlm=true")
    assert own == size.policy_bytes
    assert taken("algo.teacher.policy=start", "algo.train_vlm=true", "lora.rank=8")[1] == 0
    size, own = taken("algo.teacher.policy=another")
    assert own == size.policy_bytes
    without, shared = doctor("policy=qwen_vla_4b"), doctor("policy=qwen_vla_4b", "algo.teacher.policy=start")
    totals = [worst_phases(c, size_of(c), Machine(has_gpu=True))[0].total for c in (without, shared)]
    assert totals[1] - totals[0] == size_of(without).expert_bytes


def test_a_reasoning_teacher_takes_the_language_model_unless_adapters_are_trained() -> None:
    def taken(*settings: str) -> tuple[Footprint, int]:
        config = doctor("policy=qwen_vla_4b", "algo.train_vlm=true", *settings)
        size = size_of(config)
        return size, reasoning_bytes(config, size)

    start = ["algo.reasoning_teacher.policy=start", "algo.reasoning_teacher.datasets=[questions.jsonl]"]
    assert taken()[1] == 0
    size, own = taken(*start)
    assert own == size.vlm_bytes
    assert taken(*start, "lora.rank=8")[1] == 0
    assert taken("algo.reasoning_teacher.policy=another", start[1], "lora.rank=8")[1] == own
    plans = [doctor("policy=qwen_vla_4b", "algo.train_vlm=true", *more) for more in ([], start)]
    totals = [worst_phases(c, size_of(c), Machine(has_gpu=True))[0].total for c in plans]
    assert totals[1] - totals[0] == own


@pytest.mark.parametrize("train_vlm", [False, True])
@pytest.mark.parametrize(("hidden", "rank"), [("[]", 0), ("[32,16]", 0), ("[]", 4)])
def test_weights_gradients_and_moments_are_those_of_a_learner_that_made_a_step(
    policy: QwenVLA, folder: Path, train_vlm: bool, hidden: str, rank: int
) -> None:
    sizes = [f"algo.value_hidden_sizes={hidden}", f"lora.rank={rank}"]
    config = doctor(f"policy={folder}", f"algo.train_vlm={train_vlm}", *sizes)
    size = size_of(config)
    policy = copy.deepcopy(policy)
    add_lora(policy, config.lora, trained_groups(policy, train_vlm))
    learner = learner_of(policy, config)
    head = list(learner.value_head.parameters())
    assert size.policy_bytes == sum(p.nbytes for p in policy.parameters())
    assert value_parameters(config, size) == sum(p.numel() for p in head)

    trained = [p for p in [*policy.parameters(), *head] if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    learner._policy_optimizer.step()
    learner._value_optimizer.step()
    states = [s for o in (learner._policy_optimizer, learner._value_optimizer) for s in o.state.values()]
    moments = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in states)
    assert trained_bytes(config, size) == sum(p.nbytes for p in trained)
    assert 2 * trained_bytes(config, size) == moments


@pytest.mark.parametrize("train_vlm", [False, True])
def test_the_stored_rollout_has_the_bytes_of_one_that_was_collected(
    policy: QwenVLA, folder: Path, train_vlm: bool
) -> None:
    config = doctor(f"policy={folder}", f"algo.train_vlm={train_vlm}", f"episodes_per_iteration={EPISODES}")
    rollout = rollout_of(policy, config)
    longest = config.suite.max_episode_steps // config.suite.chunk_size
    assert rollout.batch_size[1] <= longest
    size = size_of(config)
    assert bytes_of(rollout) == rollout.numel() * size.stored_beside
    # Nothing is kept where no decision was taken.
    each = (size.stored_inputs if train_vlm else size.stored_context) - size.stored_beside
    assert rollout["rounds"].nbytes == int(rollout["valid"].sum()) * each
    # Planned for episodes that run to their limit; those that were played may all have ended before it.
    assert max_decisions(config) == EPISODES * longest
    last = EPISODES * 3 * config.suite.image_size**2 * train_vlm
    assert rollout_bytes(config, size) == EPISODES * longest * (each + size.stored_beside) + last


@pytest.mark.parametrize("train_vlm", [False, True])
def test_activations_are_within_a_quarter_of_what_autograd_keeps(
    policy: QwenVLA, folder: Path, train_vlm: bool
) -> None:
    config = doctor(f"policy={folder}", f"algo.train_vlm={train_vlm}")
    rollout = rollout_of(policy, config)
    learner = learner_of(policy, config)
    batch = rollout[rollout["valid"]][:8]
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, int] = {}
    alive: list[Any] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        learner.forward(batch)
    real = sum(size for address, size in kept.items() if address not in weights)
    size = size_of(config)
    planned = 8 * (size.expert_activations + (size.vlm_activations if train_vlm else 0))
    assert 0.95 < planned / real < 1.25


def test_a_policy_is_planned_without_its_weights(folder: Path) -> None:
    config = doctor(f"policy={folder}")
    planned, _ = unallocated_policy(config, None)
    assert {p.device.type for p in planned.parameters()} == {"meta"}


@given(episodes=st.integers(1, 4096), minibatch=st.integers(2, 4096), envs=st.integers(1, 512), gpu=st.booleans())
def test_more_of_anything_never_takes_less(episodes: int, minibatch: int, envs: int, gpu: bool) -> None:
    config = BASE
    config = dataclasses.replace(
        config,
        episodes_per_iteration=episodes,
        algo=dataclasses.replace(config.algo, minibatch_size=minibatch),
        workers=dataclasses.replace(config.workers, envs_per_actor=envs),
    )

    def totals(changed: DoctorConfig) -> list[int]:
        return [budget.total for budget in worst_phases(changed, SIZE, Machine(has_gpu=gpu))]

    start = totals(config)
    for more in (
        dataclasses.replace(config, episodes_per_iteration=episodes + 7),
        dataclasses.replace(config, algo=dataclasses.replace(config.algo, minibatch_size=minibatch + 7)),
        dataclasses.replace(config, workers=dataclasses.replace(config.workers, envs_per_actor=envs + 1)),
        dataclasses.replace(config, inference_batch=config.inference_batch + 1),
    ):
        assert all(after >= before for before, after in zip(start, totals(more), strict=True))


BASE = doctor("policy=qwen_vla_toy", "suite=push_cube")
SIZE = Footprint(
    vlm_parameters=10**6,
    expert_parameters=10**6,
    vlm_bytes=4 * 10**6,
    expert_bytes=4 * 10**6,
    value_size=64,
    tokens=64,
    stored_context=70_000,
    stored_inputs=20_000,
    expert_activations=900_000,
    vlm_activations=2_000_000,
    expert_layer=300_000,
    vlm_layer=500_000,
    stored_beside=20_000,
)


def test_a_budget_is_worked_by_hand() -> None:
    config = dataclasses.replace(BASE, episodes_per_iteration=100, inference_batch=10)
    gpu, host = worst_phases(config, SIZE, Machine(has_gpu=True, gpu_bytes=10**9))
    # 100 episodes of 48 / 8 = 6 decisions of 70 kB: 42 MB. The critic has 65 parameters.
    # Updating: 8 MB weights, 3 x 4 MB of gradients and moments, 42 MB of rollout, 256 x 0.9 MB of activations.
    critic = 4 * 65
    assert gpu.phase == "updating"
    assert gpu.total == 8_000_000 + critic + 3 * (4_000_000 + critic) + 42_000_000 + 230_400_000 + 1000 * 2**20
    assert gpu.excess == gpu.total - int(FULL * 10**9)
    assert host.excess == 0
    # Three checkpoints and the best: weights, the expert's two moments, the critic and its own; then the policy.
    assert disk_bytes(config, SIZE) == 4 * (8_000_000 + 2 * (4_000_000 + critic) + critic) + 8_000_000


def test_with_one_minibatch_of_a_handful_collecting_is_the_worst_phase() -> None:
    config = dataclasses.replace(BASE, algo=dataclasses.replace(BASE.algo, minibatch_size=2))
    (gpu, _) = worst_phases(config, SIZE, Machine(has_gpu=True))
    assert gpu.phase == "collecting"
    found = {item.what: item.bytes for item in gpu.items}
    assert found["another copy of the rollout's samples and outcomes"] == 256 * 6 * 20_000


def plan(*overrides: str, gpu_gb: float | None = None, host_gb: float | None = None) -> Plan:
    machine = Machine(
        has_gpu=gpu_gb is not None,
        gpu_bytes=None if gpu_gb is None else int(gpu_gb * 1e9),
        host_bytes=None if host_gb is None else int(host_gb * 1e9),
    )
    return plan_run(doctor(*overrides), machine)


def test_a_run_that_fits_has_nothing_to_change() -> None:
    made = plan("policy=qwen_vla_toy", gpu_gb=80, host_gb=64)
    assert made.fits
    assert not made.options
    assert made.cheapest is None


@pytest.mark.parametrize(
    ("overrides", "gpu_gb", "host_gb"),
    [
        (["policy=qwen_vla_toy", "episodes_per_iteration=4096"], 1.5, None),
        (["policy=qwen_vla_toy", "episodes_per_iteration=4096"], None, 3.0),
        (["policy=qwen_vla_4b", "suite.image_size=224", "algo.train_vlm=true"], 80.0, None),
    ],
)
def test_the_cheapest_way_out_fits_when_it_is_taken(
    overrides: list[str], gpu_gb: float | None, host_gb: float | None
) -> None:
    made = plan(*overrides, gpu_gb=gpu_gb, host_gb=host_gb)
    assert not made.fits
    assert made.cheapest is not None
    kept = [o for o in overrides if o.partition("=")[0] not in {c.partition("=")[0] for c in made.cheapest.changes}]
    taken = plan(*kept, *made.cheapest.changes, gpu_gb=gpu_gb, host_gb=host_gb)
    assert taken.fits
    place = made.budgets[0]
    assert place.total - taken.budgets[0].total == made.cheapest.saves


def test_ways_out_come_in_order_of_cost_and_freezing_comes_first() -> None:
    made = plan("policy=qwen_vla_4b", "suite.image_size=224", "algo.train_vlm=true", gpu_gb=80)
    keys = [option.changes[0].partition("=")[0] for option in made.options]
    order = ["algo.train_vlm", "algo.minibatch_size", "episodes_per_iteration", "suite.image_size"]
    assert keys == [key for key in order if key in keys]
    assert keys[0] == "algo.train_vlm"


def test_a_little_too_much_takes_the_mildest_change_that_does() -> None:
    total = plan("policy=qwen_vla_toy", gpu_gb=80).budgets[0].total
    made = plan("policy=qwen_vla_toy", gpu_gb=0.99 * total / FULL / 1e9)
    # Half of 256; 8 would save more.
    assert made.options[0].changes == ("algo.minibatch_size=128",)
    assert made.cheapest == made.options[0]


def test_where_nothing_helps_nothing_is_promised() -> None:
    made = plan("policy=qwen_vla_4b", gpu_gb=10)
    assert not made.fits
    assert made.cheapest is None
    assert not any(option.fits for option in made.options)


def test_a_policy_of_a_folder_keeps_its_image_size(folder: Path) -> None:
    made = plan(f"policy={folder}", gpu_gb=0.001)
    assert "suite.image_size" not in {c.partition("=")[0] for option in made.options for c in option.changes}


def test_frozen_weights_that_stay_wide_are_planned_wide(folder: Path) -> None:
    compute = ComputeConfig(precision=Precision.bf16)
    found = []
    for narrow in (True, False):
        policy = load_unallocated(folder)
        policy.requires_grad_(False)
        found.append(footprint(policy, 64, compute, narrow=narrow))
    matrices = sum(p.numel() for m in policy.modules() if isinstance(m, MATRICES) for p in m.parameters())
    # Two bytes more of each, and two for autocast's copy.
    saved = found[1].policy_bytes - found[0].policy_bytes
    assert 0 < saved <= 2 * matrices
    assert found[1].rounded_weights == found[0].rounded_weights + saved


def test_environments_count_on_the_host_alone() -> None:
    many = plan("policy=qwen_vla_toy", "workers.envs_per_actor=512", gpu_gb=80)
    few = plan("policy=qwen_vla_toy", "workers.envs_per_actor=1", gpu_gb=80)
    assert many.budgets[0].total == few.budgets[0].total
    assert many.budgets[1].total > few.budgets[1].total


def simulators_of(*overrides: str) -> dict[str, int]:
    host = plan("policy=qwen_vla_toy", "workers.num_actors=4", *overrides).budgets[-1]
    return {item.what: item.bytes for item in host.items if "simulator process" in item.what}


def test_a_spare_takes_what_one_of_the_actors_takes_in_every_pool() -> None:
    ray = ["suite=simpler_env", "workers.kind=ray"]
    alone = simulators_of(*ray, "workers.spare=false")
    assert list(alone) == ["4 simulator processes of 8 environments (estimate)"]
    (four,) = alone.values()
    assert simulators_of(*ray) == {**alone, "1 spare simulator process (estimate)": four // 4}
    two_ranks = simulators_of(*ray, "learners.num=2")
    assert two_ranks == {**alone, "2 spare simulator processes (estimate)": four // 2}
    # The toy starts at once, and has one only where it is asked for.
    assert list(simulators_of("workers.kind=ray")) == list(alone)
    assert len(simulators_of("workers.kind=ray", "workers.spare=true")) == 2


def test_the_spare_is_the_first_thing_to_do_without() -> None:
    ray = ["policy=qwen_vla_toy", "suite=simpler_env", "workers.kind=ray", "workers.num_actors=2"]
    (host,) = plan(*ray).budgets
    made = plan(*ray, host_gb=0.99 * host.total / FULL / 1e9)
    assert made.options[0].changes == ("workers.spare=false",)
    assert made.cheapest == made.options[0]
    assert plan(*ray, "workers.spare=false", host_gb=0.99 * host.total / FULL / 1e9).fits


def test_a_policy_that_does_not_exist_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="neither a folder nor one of .*Did you mean 'qwen_vla_tiny'"):
        plan("policy=qwen_vla_tinny")


def test_a_policy_that_does_not_fit_the_suite_is_refused_as_in_training() -> None:
    with pytest.raises(ValueError, match="suite.chunk_size is 16, policy.expert.horizon pads to 8"):
        plan("policy=qwen_vla_tiny", "suite.chunk_size=16")


@pytest.mark.parametrize("name", ["qwen_gr00t", "qwen_oft", "qwen_pi", "twinbrain_vla"])
def test_a_policy_whose_memory_it_does_not_know_is_said_to_be_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'; rlvla doctor plans the memory of qwen_vla alone"):
        plan(f"policy={name}_toy")
