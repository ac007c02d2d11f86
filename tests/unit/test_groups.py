"""Which parameter groups train, at which rate, in both verbs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlvla import collect, sft
from rlvla.compose import compose
from rlvla.config import AlgoConfig, ConfigError
from rlvla.learner import Learner
from rlvla.policies.base import ValueHead, context_is_fixed, trained_groups
from rlvla.policies.folder import load_policy
from rlvla.policies.groups import group_rates
from rlvla.policies.qwen_vla import QwenVLA
from rlvla.samplers import training_sampler
from rlvla_envs.base import VecEnv


class ThreeGroups(QwenVLA):
    """A Qwen-VLA whose expert's last layers are a group of their own."""

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        last = list(self.expert.action_out.parameters())
        groups = super().parameter_groups()
        rest = [p for p in groups["expert"] if not any(p is q for q in last)]
        return groups | {"expert": rest, "last": last}


@pytest.fixture
def policy(make_policy: Callable[..., QwenVLA], make_toy: Callable[..., VecEnv]) -> QwenVLA:
    made = make_policy("qwen_vla_toy", make_toy(1).spec)
    made.__class__ = ThreeGroups
    return made


def learner_of(policy: QwenVLA, **changes: Any) -> Learner:
    config = AlgoConfig(**changes)
    sampler = training_sampler(policy, config)
    return Learner(policy, ValueHead(policy.value_size), config, sampler, seed=0, total_iterations=1)


def rates_of(learner: Learner) -> list[float]:
    return [group["lr"] for group in learner._policy_optimizer.param_groups]


def asking(policy: nn.Module) -> set[str]:
    return {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


def test_groups_are_trained_in_a_fixed_order_and_the_frozen_ones_are_not(policy: QwenVLA) -> None:
    assert trained_groups(policy, True) == ["expert", "last", "vlm"]
    assert trained_groups(policy, False) == ["expert", "last"]
    assert trained_groups(policy, True, ["expert"]) == ["last", "vlm"]
    policy.frozen_groups = frozenset({"last", "vlm"})
    assert trained_groups(policy, True) == ["expert"]


def test_a_context_is_stored_while_no_group_that_makes_it_is_trained(policy: QwenVLA) -> None:
    assert context_is_fixed(policy, train_vlm=False)
    assert not context_is_fixed(policy, train_vlm=True)
    assert context_is_fixed(policy, train_vlm=True, freeze=["vlm"])


def test_each_group_has_its_rate_and_the_others_theirs(policy: QwenVLA) -> None:
    algo = {"policy_lr": 1e-4, "vlm_lr": 1e-5, "train_vlm": True}
    assert rates_of(learner_of(policy, **algo)) == [1e-4, 1e-4, 1e-5]
    assert rates_of(learner_of(policy, **algo, learning_rates={"last": 3e-4, "vlm": 2e-6})) == [1e-4, 3e-4, 2e-6]
    assert rates_of(learner_of(policy, freeze=["expert"], policy_lr=1e-4)) == [1e-4]


def test_the_schedule_moves_all_rates_together(policy: QwenVLA) -> None:
    learner = learner_of(policy, policy_lr=1e-4, learning_rates={"last": 3e-4}, target_kl=0.1)
    learner._steer(kl=0.5, target=0.1)
    learner._set_learning_rate(0)
    assert rates_of(learner) == pytest.approx([1e-4 / 1.5, 3e-4 / 1.5])


def test_a_frozen_group_asks_for_no_gradient_and_another_asks_for_all_of_its_own(policy: QwenVLA) -> None:
    learner_of(policy, freeze=["expert"])
    assert asking(policy) == {name for name, _ in policy.named_parameters() if name.startswith("expert.action_out.")}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"freeze": ["exprt"]}, "algo.freeze names exprt; the parameter groups of this policy are expert, last, vlm"),
        ({"learning_rates": {"action": 1e-3}}, "algo.learning_rates names action; the parameter groups .* vlm"),
        ({"learning_rates": {"vlm": 1e-5}}, "has a rate for vlm, which is not trained; trained: expert, last"),
        ({"freeze": ["last"], "learning_rates": {"last": 1e-5}}, "has a rate for last, which is not trained"),
        ({"freeze": ["expert", "last"]}, "every parameter group is frozen"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_groups_there_are(
    policy: QwenVLA, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        learner_of(policy, **changes)


@pytest.mark.parametrize("verb", ["sft", "train"])
def test_a_rate_of_zero_is_refused_and_says_what_freezes(verb: str) -> None:
    key = {"sft": "learning_rates", "train": "algo.learning_rates"}[verb]
    required = {"sft": "dataset=PATH", "train": "policy=PATH"}[verb]
    with pytest.raises(ConfigError, match=rf"{key}.vlm is 0.0; .*freeze"):
        compose(verb, [required, f"{key}.vlm=0"])
    made = compose(verb, [required, f"{key}={{vlm: 1e-5, expert: 1e-4}}"])
    found = made.learning_rates if verb == "sft" else made.algo.learning_rates
    assert found == {"vlm": 1e-5, "expert": 1e-4}


def test_a_rate_by_hand(policy: QwenVLA) -> None:
    rates = group_rates(policy, ["expert", "vlm"], {"expert": 0.5}, 1.0, vlm=0.1, key="learning_rates")
    assert rates == {"expert": 0.5, "vlm": 0.1}


def test_sft_moves_each_group_as_far_as_its_rate_says(tmp_path: Path) -> None:
    data, toy = tmp_path / "data", ["suite=toy", "suite.image_size=32"]
    collect.run(compose("collect", [*toy, "workers.kind=local", f"output={data}", "episodes=2"]))
    common = [*toy, "policy=qwen_vla_toy", f"dataset={data}", "batch_size=4", "weight_decay=0", "warmup_steps=0"]

    def trained(name: str, *settings: str) -> dict[str, Tensor]:
        sft.run(compose("sft", [*common, *settings, f"output={tmp_path / name}"]))
        return load_policy(tmp_path / name / "policy").state_dict()

    # Adam's first step moves a weight by its rate, whatever the gradient.
    one = trained("one", "steps=1", "learning_rates={expert: 1e-3}")
    start = trained("start", "steps=1", "freeze=[expert]")
    moved = {name: float((one[name] - start[name]).abs().max()) for name in one}
    assert moved["expert.action_out.2.bias"] == pytest.approx(1e-3, rel=1e-3)
    # The last layer starts at zero, so the backbone gets its first gradient g in the second of two steps, at half the
    # rate: 0.1 g / (1 - 0.9^2) over sqrt(0.001 g^2 / (1 - 0.999^2)) is 0.744, which makes 0.372 of the rate.
    two = trained("two", "steps=2", "learning_rates={vlm: 1e-2}")
    moved = {name: float((two[name] - start[name]).abs().max()) for name in two if name.startswith("vlm.")}
    assert max(moved.values()) == pytest.approx(0.372e-2, rel=1e-3)
    assert not any(torch.equal(two[n], start[n]) for n in two if n.startswith("expert.action_out"))


def test_freezing_the_backbone_by_name_is_not_training_it(policy: QwenVLA) -> None:
    one, other = learner_of(policy, train_vlm=True, freeze=["vlm"]), learner_of(policy)
    assert rates_of(one) == rates_of(other)
    assert replace(one.config, train_vlm=False, freeze=()) == other.config
