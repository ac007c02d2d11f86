"""Several learners make the update that one makes: two gloo processes with uneven shares against one."""

import json
import math
import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlvla.config import (
    AlgoConfig,
    Estimator,
    LearnerStrategy,
    LoraConfig,
    LRSchedule,
    Objective,
    ReasoningTeacherConfig,
    Reduction,
    TeacherConfig,
)
from rlvla.forward_sampler import VELOCITY, ForwardSampler, objective_sampler
from rlvla.learner import InvariantError, Learner
from rlvla.parallel import neighbours, score
from rlvla.policies.base import Context, ValueHead
from rlvla.policies.folder import load_policy, save_policy
from rlvla.policies.groups import require_gradients
from rlvla.policies.lora import add_lora
from rlvla.ranks import ALONE, Group, join, leave
from rlvla.reasoning import load_reasoning_teacher
from rlvla.rounds import Rounds, refer
from rlvla.samplers import DistributionSampler, FlowSampler
from rlvla.teachers import ActionTeacher
from rlvla.train import add_advantages
from rlvla_algos.distribution import NormalBernoulli
from rlvla_algos.flow import Schedule, flow_sde_schedule
from rlvla_envs.base import SuiteConfig
from rlvla_envs.suites import make_env

STRATEGIES = [LearnerStrategy.ddp, LearnerStrategy.fsdp]
EPISODES, DECISIONS, H, K, WIDTH = 13, 6, 3, 2, 10
SHARES = [slice(0, 11), slice(11, EPISODES)]
"""Uneven: with minibatches of four decisions the second rank often has no row."""
CONFIG: dict[str, Any] = {
    "minibatch_size": 4,
    "epochs": 3,
    "critic_only_iterations": 1,
    "min_successes": 0,
    "policy_lr": 3e-3,
    "max_policy_lr": 1e-1,
    "target_kl": 0.05,
    "kl_stop_factor": 0.2,
    "lr_schedule": LRSchedule.kl,
}


class SmallPolicy(nn.Module):
    """A backbone and an expert of one block each, in double precision throughout; enough of a `FlowPolicy` to learn."""

    num_denoising_steps, horizon, channels, value_size = 4, H, K, WIDTH
    context_groups, frozen_groups = frozenset({"vlm"}), frozenset[str]()

    def __init__(self) -> None:
        super().__init__()
        self.vlm = nn.ModuleList([nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH)])
        # A weight that no output depends on, as real backbones have.
        self.unused = nn.Linear(2, 2)
        self.expert = nn.ModuleList([nn.Linear(WIDTH + H * K + 1, 7), nn.Linear(7, H * K)])
        self.eval()

    def encode(self, batch: TensorDict) -> Context:
        first, second = self.vlm
        tokens = second(torch.tanh(first(batch["seen"])))[:, None]
        rows = len(tokens)
        empty = tokens.new_zeros(rows, 0)
        return Context(tokens, empty.bool(), empty.long(), tokens[:, 0].detach(), empty)

    def value_features(self, context: Context) -> Tensor:
        return context.pooled

    def velocity(self, context: Context, sample: Tensor, tau: Tensor, step: Tensor | None = None) -> Tensor:
        first, second = self.expert
        hidden = torch.cat([context.tokens[:, 0], sample.flatten(1), tau[:, None]], dim=1)
        return second(torch.tanh(first(hidden))).unflatten(1, (H, K))  # type: ignore[no-any-return]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"vlm": [*self.vlm.parameters(), *self.unused.parameters()], "expert": list(self.expert.parameters())}

    def sharding_units(self) -> list[nn.Module]:
        return [*self.vlm, *self.expert]


class SmallDistribution(SmallPolicy):
    """The same with a distribution over the chunk; its second channel is binary."""

    velocity = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.ModuleList([nn.Linear(WIDTH, 7), nn.Linear(7, H * K)])
        self.log_std = nn.Parameter(torch.tensor([-1.0, 0.0]))
        self.eval()

    def distribution(self, context: Context) -> NormalBernoulli:
        first, second = self.expert
        location = second(torch.tanh(first(context.tokens[:, 0]))).unflatten(1, (H, K))
        shape = (len(location), 1, K)
        return NormalBernoulli(location, self.log_std.expand(shape), torch.tensor([False, True]).expand(shape))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = super().parameter_groups()
        return groups | {"expert": [*groups["expert"], self.log_std]}


def test_a_block_is_gathered_ahead_only_within_its_own_stack() -> None:
    policy = new_policy()
    pairs = neighbours(policy, policy.sharding_units())
    assert pairs == [(policy.vlm[0], policy.vlm[1]), (policy.expert[0], policy.expert[1])]


def parts(policy: nn.Module, group: Group, strategy: LearnerStrategy, **changes: Any) -> Learner:
    torch.manual_seed(1)
    head = ValueHead(WIDTH, (6,)).double()
    flow = FlowSampler(Schedule(*(column.double() for column in flow_sde_schedule(4, 0.5))))
    sampler = DistributionSampler() if isinstance(policy, SmallDistribution) else flow
    config = AlgoConfig(**{**CONFIG, **changes})
    sampler = objective_sampler(sampler, policy, config)  # type: ignore[arg-type]
    return Learner(
        policy,  # type: ignore[arg-type]
        head,
        config,
        sampler,
        seed=0,
        total_iterations=4,
        group=group,
        strategy=strategy,
    )


def new_policy(kind: type[SmallPolicy] = SmallPolicy, lora_rank: int = 0) -> SmallPolicy:
    torch.manual_seed(0)
    policy = kind().double()
    add_lora(policy, LoraConfig(rank=lora_rank), ["expert", "vlm"])  # type: ignore[arg-type]
    return policy


def rollout_of(policy: Any, learner: Learner, iteration: int, share: slice, group: Group) -> TensorDict:
    """What a rank would have collected, its episodes drawn together with all others'."""
    g = torch.Generator().manual_seed(100 + iteration)
    shape = (EPISODES, DECISIONS)

    def draw(*size: int) -> Tensor:
        return torch.randn(*shape, *size, generator=g, dtype=torch.float64)

    length = torch.randint(1, DECISIONS + 1, (EPISODES, 1), generator=g)
    index = torch.arange(DECISIONS)
    executed = torch.randint(1, H + 1, shape, generator=g)
    data = TensorDict(
        {
            # One token, which the policy does not look at.
            "batch": TensorDict({"seen": draw(5), "mask": torch.ones(*shape, 1, dtype=torch.bool)}, batch_size=shape),
            "before": draw(H, K),
            "step": torch.randint(4, shape, generator=g),
            "valid": index < length,
            "mask": (torch.arange(H) < executed[..., None])[..., None].expand(*shape, H, K).clone(),
            "draw": draw(H, K),
            "teacher_weight": (index[None] % 3 + torch.zeros(shape)).double(),
            "next": TensorDict(
                {
                    "reward": draw(),
                    "terminated": (index == length - 1) & (torch.rand(EPISODES, 1, generator=g) < 0.5),
                    "done": index == length - 1,
                    "success": (index == length - 1) & (torch.rand(EPISODES, 1, generator=g) < 0.5),
                    "executed_steps": executed,
                },
                batch_size=shape,
            ),
        },
        batch_size=shape,
    )[share]
    if isinstance(learner.sampler, ForwardSampler):
        drawn = {"action": draw(H, K), "noise": draw(2, H, K), "tau": draw(2).sigmoid()}
        data["forward"] = TensorDict(drawn, batch_size=shape)[share]
    # The ranks share one group between them.
    state = torch.arange(EPISODES) // 4
    data["initial_state"] = state[share, None].expand(data.batch_size).clone()
    flat = data.flatten()
    with torch.no_grad():
        context = policy.encode(flat["batch"])
        if not learner.config.train_vlm:
            flat["context"] = context.to_tensordict()
            del flat["batch"]
        if isinstance(policy, SmallDistribution):
            distribution = policy.distribution(context)
            flat["sample"] = distribution.sample(flat.pop("draw"), 1.0)
            flat["parameters"] = TensorDict(distribution.parameters(), batch_size=flat.batch_size)
        else:
            flat["after"] = flat["before"]
            scored = score(policy, flat, learner.sampler).likelihood.parameters
            flat["mean"] = scored["mean"]
            if isinstance(learner.sampler, ForwardSampler):
                flat["forward", "velocity"] = scored[VELOCITY]
            flat["after"] = scored["mean"] + scored["std"] * flat.pop("draw")
        flat["log_prob"] = score(policy, flat, learner.sampler).likelihood.log_prob
        flat["state_value"] = learner.value_head(policy.value_features(context)) * flat["valid"]
    rounds = Rounds([flat.select("context", "batch", strict=False)])
    rollout: TensorDict = flat.exclude("context", "batch").unflatten(0, data.shape)
    refer(rollout, rounds, torch.arange(len(flat)).reshape(data.shape))
    following = torch.zeros_like(rollout["state_value"])
    following[:, :-1] = rollout["state_value"][:, 1:]
    rollout["next", "state_value"] = following * ~rollout["next", "done"]
    add_advantages(rollout, learner.config, group)
    return rollout


def train(
    group: Group,
    strategy: LearnerStrategy,
    updates: range,
    folder: Path | None,
    kind: type[SmallPolicy] = SmallPolicy,
    **changes: Any,
) -> Any:
    """``updates`` on this rank's share; parameters, learner state and metrics after the last."""
    share = SHARES[group.rank] if group.size > 1 else slice(None)
    policy = new_policy(kind, changes.pop("lora_rank", 0))
    learner = parts(policy, group, strategy, **changes)
    if "teacher" in changes:
        torch.manual_seed(5)
        learner.teacher = ActionTeacher(SmallPolicy().double(), reads_contexts=False)  # type: ignore[arg-type]
    if folder is not None:
        saved = torch.load(folder / "state.pt", weights_only=True)
        policy.load_state_dict(saved["policy"])
        learner.load_state_dict(saved["learner"])
    metrics = [learner.update(rollout_of(policy, learner, i, share, group), i) for i in updates]
    return {"policy": policy.state_dict(), "learner": learner.state_dict(), "metrics": metrics}


def fail_on_the_second(group: Group, strategy: LearnerStrategy) -> Any:
    policy = new_policy()
    learner = parts(policy, group, strategy)
    rollout = rollout_of(policy, learner, 0, SHARES[group.rank], group)
    if group.rank == 1:
        rollout["after"] = rollout["after"].clamp(-0.1, 0.1)
    learner.update(rollout, 0)


def talk(group: Group) -> Any:
    values = torch.tensor([[1.0, 2.0], [9.0, 4.0]][group.rank], dtype=torch.float64)[: 2 - group.rank]
    return {
        "total": group.total(1 + group.rank, 0.5),
        "largest": group.largest(3.0 - group.rank, math.nan if group.rank else 0.0),
        # Of 1, 2 and 9.
        "mean": group.mean(values),
        "moments": [float(x) for x in group.moments(values)],
        "variance": float(group.variance(values)),
        "nothing": group.mean(values[:0]),
        "gathered": group.gather({"rank": group.rank, "said": "x" * (5 + 300 * group.rank)}),
        "order": group.broadcast(["go", [1, 2]] if group.leads else None),
    }


def _enter(rank: int, address: str, results: Any, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        group = join(address, rank, 2, backend="gloo", timeout_s=60)
        outcome: Any = ("done", work(group, *arguments[0], **arguments[1]))
    except Exception as error:
        outcome = ("failed", f"{type(error).__name__}: {error}", traceback.format_exc())
    finally:
        leave()
    torch.save(outcome, results / f"{rank}.pt")


def on_two_ranks(folder: Path, work: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
    """What ``work(group, ...)`` returns or raises on either rank of a gloo group."""
    folder.mkdir()
    # Both start from a process that has imported everything, and in which nothing has run.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    address = f"file://{folder / 'meet'}"
    processes = [
        context.Process(target=_enter, args=(rank, address, folder, work, (arguments, named))) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def done(outcomes: list[Any]) -> list[Any]:
    for outcome in outcomes:
        assert outcome[0] == "done", outcome[-1]
    return [outcome[1] for outcome in outcomes]


def assert_close(one: Any, other: Any, where: str = "") -> None:
    """Equal trees of tensors and numbers, to 1e-12 relative to 1."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_close(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_close(a, b, f"{where}/{i}")
    elif isinstance(one, Tensor):
        assert type(one) is type(other), where
        assert one.shape == other.shape, where
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=lambda text: f"{where}: {text}")
    elif isinstance(one, str | bool | None):
        assert one == other, where
    else:
        assert other == pytest.approx(one, rel=1e-12, abs=1e-12, nan_ok=True), where


def test_two_ranks_agree_on_sums_moments_and_messages(tmp_path: Path) -> None:
    results = done(on_two_ranks(tmp_path / "run", talk))
    assert_close(results[0], results[1])
    found = results[0]
    assert found["total"] == [3.0, 1.0]
    assert found["largest"][0] == 3.0
    assert math.isnan(found["largest"][1])
    assert found["mean"] == pytest.approx(4)
    assert found["variance"] == pytest.approx((9 + 4 + 25) / 3)
    assert found["moments"] == pytest.approx([4, math.sqrt(38 / 3)])
    assert math.isnan(found["nothing"])
    assert [message["rank"] for message in found["gathered"]] == [0, 1]
    assert len(found["gathered"][1]["said"]) == 305
    assert found["order"] == ["go", [1, 2]]


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        pytest.param(
            LearnerStrategy.ddp,
            {"estimator": Estimator.grpo, "group_size": 4, "min_group_success": 0.1, "max_group_success": 0.9},
            id="filtered-groups",
        ),
        pytest.param(LearnerStrategy.fsdp, {"estimator": Estimator.reinforce_pp, "objective": Objective.nft}, id="nft"),
        pytest.param(LearnerStrategy.ddp, {"estimator": Estimator.success, "objective": Objective.clone}, id="clones"),
    ],
)
def test_two_ranks_equal_one_without_a_critic(
    strategy: LearnerStrategy, changes: dict[str, Any], tmp_path: Path
) -> None:
    alone = train(ALONE, strategy, range(2), None, **changes)
    both = done(on_two_ranks(tmp_path / "run", train, strategy, range(2), None, **changes))
    for of_rank in both:
        assert_close(alone["metrics"], of_rank["metrics"])
        assert_close(alone["policy"], of_rank["policy"])
    moved = (alone["policy"]["expert.0.weight"] - new_policy().state_dict()["expert.0.weight"]).abs().max()
    assert moved > 1e-3
    assert [row["ppo/critic_only"] for row in alone["metrics"]] == [0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="frozen-backbone"),
        pytest.param({"train_vlm": True, "vlm_lr": 1e-3, "reduction": Reduction.sum, "value_clip": None}, id="all"),
    ],
)
def test_two_ranks_with_uneven_shares_equal_one(
    strategy: LearnerStrategy, changes: dict[str, Any], tmp_path: Path
) -> None:
    # Iteration 0 trains the critic only, then come three updates of everything.
    alone = train(ALONE, strategy, range(4), None, **changes)
    both = done(on_two_ranks(tmp_path / "run", train, strategy, range(4), None, **changes))
    first = both[0]
    assert_close(alone, first)
    assert_close(alone["metrics"], both[1]["metrics"])
    assert_close(alone["policy"], both[1]["policy"])
    # The comparison has something to compare: weights moved, every kind of update was made, an epoch was cut.
    start = new_policy().state_dict()
    assert (alone["policy"]["expert.0.weight"] - start["expert.0.weight"]).abs().max() > 1e-3
    stayed = torch.equal(alone["policy"]["vlm.0.weight"], start["vlm.0.weight"])
    assert stayed != changes.get("train_vlm", False)
    assert [row["ppo/critic_only"] for row in alone["metrics"]] == [1, 0, 0, 0]
    assert len({row["optim/policy_lr"] for row in alone["metrics"]}) > 1
    assert {row["ppo/epochs"] for row in alone["metrics"]} == {2, 3}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_with_a_distribution_and_an_entropy_bonus_equal_one(
    strategy: LearnerStrategy, tmp_path: Path
) -> None:
    changes = {"kind": SmallDistribution, "train_vlm": True, "vlm_lr": 1e-3, "entropy_coef": 0.01}
    alone = train(ALONE, strategy, range(3), None, **changes)
    both = done(on_two_ranks(tmp_path / "run", train, strategy, range(3), None, **changes))
    assert_close(alone, both[0])
    assert_close(alone["metrics"], both[1]["metrics"])
    assert (alone["policy"]["log_std"] - torch.tensor([-1.0, 0.0])).abs()[0] > 1e-3
    assert alone["policy"]["log_std"][1] == 0
    assert alone["metrics"][-1]["ppo/kl"] > 0
    assert "ppo/entropy" in alone["metrics"][-1]
    assert not [name for name in alone["metrics"][-1] if name.startswith("ppo/kl_step")]


def test_an_entropy_bonus_widens_the_distribution() -> None:
    changes = {"kind": SmallDistribution, "lr_schedule": LRSchedule.constant, "kl_stop_factor": 100.0}
    without, bonus = (train(ALONE, STRATEGIES[0], range(3), None, entropy_coef=coef, **changes) for coef in (0.0, 0.5))
    assert bonus["policy"]["log_std"][0] > without["policy"]["log_std"][0] + 1e-3
    assert bonus["metrics"][-1]["ppo/entropy"] > without["metrics"][-1]["ppo/entropy"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_the_adapters_that_one_trains(strategy: LearnerStrategy, tmp_path: Path) -> None:
    changes = {"lora_rank": 2, "train_vlm": True, "vlm_lr": 1e-3}
    alone = train(ALONE, strategy, range(3), None, **changes)
    both = done(on_two_ranks(tmp_path / "run", train, strategy, range(3), None, **changes))
    assert_close(alone, both[0])
    assert_close(alone["policy"], both[1]["policy"])
    start = new_policy(lora_rank=2).state_dict()
    moved = {name for name, tensor in alone["policy"].items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if name.endswith(("lora_A", "lora_B"))}


def test_two_ranks_are_pulled_by_a_teacher_as_one_is(tmp_path: Path) -> None:
    teacher = TeacherConfig(policy="elsewhere", coef=3.0, target_kl=0.01)
    changes = {"teacher": teacher, "train_vlm": True, "vlm_lr": 1e-3}
    alone = train(ALONE, LearnerStrategy.ddp, range(3), None, **changes)
    both = done(on_two_ranks(tmp_path / "run", train, LearnerStrategy.ddp, range(3), None, **changes))
    for row in (row for found in (alone, *both) for row in found["metrics"]):
        # A count over a count, in single precision.
        row.pop("ppo/clip_fraction", None)
    assert_close(alone, both[0])
    assert_close(alone["metrics"], both[1]["metrics"])
    # It has something to compare: the teacher is another policy, and the coefficient was steered.
    assert [row.get("ppo/teacher_coef") for row in alone["metrics"]] == [None, 3.0, 4.5]
    assert alone["metrics"][2]["ppo/teacher_kl"] > 0.015


def hold_answers(group: Group, strategy: LearnerStrategy, folder: Path, conversations: int) -> Any:
    """Gradients of a real backbone by a reasoning teacher's answers on two minibatches, and what was measured."""
    policy = load_policy(folder / "student").double()
    require_gradients(policy, ["expert", "vlm"])
    datasets = (str(folder / "questions.jsonl"),)
    config = ReasoningTeacherConfig(policy=str(folder / "teacher"), datasets=datasets, batch_size=conversations)
    teacher = load_reasoning_teacher(config, policy, folder, "cpu", seed=0)
    assert teacher is not None
    teacher.vlm.double()
    learner = Learner(
        policy,
        ValueHead(policy.value_size).double(),
        AlgoConfig(train_vlm=True, reasoning_teacher=config),
        FlowSampler(flow_sde_schedule(4, 0.5)),
        seed=0,
        total_iterations=1,
        group=group,
        strategy=strategy,
        reasoning=teacher,
    )
    for number in range(2):
        learner._hold_answers(teacher, 0, 0, number)
    gradients = [p.grad for p in learner._held.parameter_groups()["vlm"]]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return {"gradients": [g if g is None else g.abs().sum() for g in whole], "measured": teacher.report(group)}


@pytest.mark.parametrize("strategy", STRATEGIES)
# The second rank has one conversation of three, and none of one.
@pytest.mark.parametrize("conversations", [3, 1])
def test_two_ranks_are_pulled_by_a_reasoning_teacher_as_one_is(
    strategy: LearnerStrategy, conversations: int, make_policy: Callable[..., Any], tmp_path: Path
) -> None:
    spec = make_env(SuiteConfig(name="toy", image_size=32), 1).spec
    policy = make_policy("qwen_vla_toy", spec)
    save_policy(policy, tmp_path / "student")
    with torch.no_grad():
        for parameter in policy.vlm.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_policy(policy, tmp_path / "teacher")
    lines = [
        {"messages": [{"role": "user", "content": "sum?"}, {"role": "assistant", "content": answer}], "domain": answer}
        for answer in ("four", "it is five, I think", "no")
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    alone = hold_answers(ALONE, strategy, tmp_path, conversations)
    both = done(on_two_ranks(tmp_path / "run", hold_answers, strategy, tmp_path, conversations))
    assert both[0]["measured"] == both[1]["measured"]
    assert both[0]["measured"] == pytest.approx(alone["measured"], rel=1e-5)
    moved = 0
    for of_one, *of_two in zip(alone["gradients"], *(found["gradients"] for found in both), strict=True):
        for found in of_two:
            # The layers compute in single precision, and padding is another.
            if of_one is None:
                assert found is None or not found.any()
            else:
                moved += 1
                torch.testing.assert_close(found, of_one, rtol=1e-4, atol=1e-7)
    assert moved > 20


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_goes_on_with_another_number_of_ranks(strategy: LearnerStrategy, tmp_path: Path) -> None:
    straight = train(ALONE, strategy, range(4), None)
    early = {
        "one": train(ALONE, strategy, range(2), None),
        "two": done(on_two_ranks(tmp_path / "early", train, strategy, range(2), None))[0],
    }
    for name, content in early.items():
        (tmp_path / name).mkdir()
        torch.save({key: content[key] for key in ("policy", "learner")}, tmp_path / name / "state.pt")
    late = done(on_two_ranks(tmp_path / "late", train, strategy, range(2, 4), tmp_path / "one"))[0]
    for finished in (late, train(ALONE, strategy, range(2, 4), tmp_path / "two")):
        for part in ("policy", "learner"):
            assert_close(straight[part], finished[part])
        assert_close(straight["metrics"][2:], finished["metrics"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_fails_on_one_rank_ends_both_with_the_same_words(strategy: LearnerStrategy, tmp_path: Path) -> None:
    outcomes = on_two_ranks(tmp_path / "run", fail_on_the_second, strategy)
    assert [outcome[0] for outcome in outcomes] == ["failed", "failed"]
    assert outcomes[0][1] == outcomes[1][1]
    assert outcomes[0][1].startswith(f"{InvariantError.__name__}: on the first minibatch a ratio is off")
