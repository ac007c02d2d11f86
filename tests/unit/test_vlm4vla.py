"""What is peculiar to VLM4VLA: the query's place, which channels are a gripper, what RL draws, sizes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlvla.acting import Actor
from rlvla.compose import compose
from rlvla.config import AlgoConfig, ConfigError
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.folder import save_policy
from rlvla.policies.footprint import load_unallocated
from rlvla.policies.processor import train_tokenizer
from rlvla.policies.vlm4vla import VLM4VLA, VLM4VLAConfig, binary_channels
from rlvla.samplers import training_sampler
from rlvla.seeding import Stream, keyed_rng
from rlvla_envs.base import ActionComponent, Camera, EnvSpec, Observation

ARM = ActionComponent(name="translation", size=2, convention="delta", low=-1.0, high=1.0)
GRIPPER = ActionComponent(name="gripper", size=1, convention="1 open", low=-1.0, high=1.0)
ROLL = ActionComponent(name="rotation", size=1, convention="delta", low=-1.0, high=1.0)
SPEC = EnvSpec(
    suite="bench",
    task="pick",
    robot="WidowX",
    # The gripper is not the last channel, so that a head in the wrong place is seen.
    action=(ARM, GRIPPER, ROLL),
    cameras=(Camera(name="front", height=32, width=32),),
    state_names=("x", "y"),
    control_hz=5.0,
    chunk_size=3,
    max_episode_steps=12,
    num_evaluation_states=8,
)


def make(spec: EnvSpec = SPEC, *overrides: str) -> VLM4VLA:
    config = compose("sft", ["dataset=none", "policy=vlm4vla_toy", *overrides]).policy
    rng = np.random.default_rng(0)
    action = rng.uniform(-1, 1, (200, spec.action_size)).astype(np.float32)
    action[:, binary_channels(spec, "auto")] = rng.choice([-1, 1], (200, 1))
    state = rng.normal(size=(200, spec.state_size)).astype(np.float32)
    torch.manual_seed(0)
    policy = VLM4VLA(config, spec, ActionStats.of(action, state), train_tokenizer(["pick it up"], 300))
    policy.initialize()
    return policy


def observe(rows: int = 2, seed: int = 0) -> Observation:
    rng = np.random.default_rng(seed)
    texts = ["pick it up", "pick up the red cube and hold it over the table until it is dry"]
    return Observation(
        {"front": rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)},
        [texts[i % 2] for i in range(rows)],
        rng.normal(size=(rows, 2)).astype(np.float32),
    )


# --- the paper's sizes


@pytest.mark.parametrize(
    ("width", "published"), [(2048, 6.58), (3584, 11.69), (2560, 8.02), (4096, 13.92)], ids=["3b", "7b", "4b", "8b"]
)
def test_the_policy_head_has_the_papers_size(width: int, published: float) -> None:
    # Table 9, with Calvin's chunk of ten actions of six and one channels.
    arm = replace(ARM, size=6)
    spec = replace(SPEC, action=(arm, GRIPPER), chunk_size=10)
    config = compose("sft", ["dataset=none", "policy=vlm4vla_4b", "policy.vlm.num_hidden_layers=4"]).policy
    config.vlm.hidden_size, config.vlm.vision_depth = width, 1
    policy = on_meta(config, spec)
    new = policy.parameter_groups()["expert"][1:]
    assert round((sum(p.numel() for p in new) + policy.query.numel()) / 1e6, 2) == published


def test_the_large_configuration_is_qwen35_4b_and_less_than_one_per_cent_more() -> None:
    policy = on_meta(compose("sft", ["dataset=none", "policy=vlm4vla_4b"]).policy, SPEC)
    groups = policy.parameter_groups()
    vlm = sum(p.numel() for p in groups["vlm"])
    assert round(vlm / 1e9, 2) == 4.54
    assert sum(p.numel() for p in groups["expert"]) < 0.01 * vlm


def on_meta(config: VLM4VLAConfig, spec: EnvSpec) -> VLM4VLA:
    stats = ActionStats.of(np.zeros((2, spec.action_size), np.float32), np.zeros((2, spec.state_size), np.float32))
    with torch.device("meta"):
        return VLM4VLA(config, spec, stats, train_tokenizer(["hello"], 300))


# --- the query


def test_the_query_is_the_last_valid_token_of_each_row() -> None:
    policy, seen = make(), observe()
    batch = policy.collate(seen)
    lengths = batch["mask"].sum(dim=1)
    assert lengths.unique().numel() == 2
    inputs: list[Tensor] = []
    hook = policy.vlm.language_model.register_forward_pre_hook(
        lambda module, arguments, named: inputs.append(named["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        context = policy.encode(batch)
    hook.remove()
    for row, length in enumerate(lengths.tolist()):
        is_query = (inputs[0][row] == policy.query).all(dim=1)
        assert is_query.nonzero().flatten().tolist() == [length - 1]
        # One behind the token before, on all three axes.
        before = batch["position_ids"][row, :, length - 2]
        assert context.position_ids[row, :, 0].tolist() == (before + 1).tolist()


def test_the_context_is_the_querys_state_and_the_critic_sees_the_mean_of_all_valid_tokens() -> None:
    policy, batch = make(), make().collate(observe())
    outputs: list[Tensor] = []
    hook = policy.vlm.register_forward_hook(lambda module, arguments, out: outputs.append(out.last_hidden_state))
    with torch.no_grad():
        context = policy.encode(batch)
    hook.remove()
    assert context.tokens.shape == (2, 1, 64)
    for row, length in enumerate(batch["mask"].sum(dim=1).tolist()):
        torch.testing.assert_close(context.tokens[row, 0], outputs[0][row, length - 1])
        torch.testing.assert_close(context.pooled[row], outputs[0][row, :length].mean(dim=0))
    assert policy.value_features(context).shape == (2, 64 + 2)


def test_a_frozen_backbone_keeps_the_query_and_a_stored_context_right() -> None:
    policy = make()
    groups = policy.parameter_groups()
    assert any(p is policy.query for p in groups["vlm"])
    assert any(p is policy.log_std for p in groups["expert"])
    with torch.no_grad():
        before = policy.encode(policy.collate(observe()))
        for parameter in groups["expert"]:
            parameter += 1
        after = policy.encode(policy.collate(observe()))
    assert torch.equal(before.tokens, after.tokens)


# --- the gripper


def test_the_gripper_is_found_by_name_or_named() -> None:
    left, right = replace(GRIPPER, name="left_gripper"), replace(GRIPPER, name="right_gripper")
    both = replace(SPEC, action=(left, ARM, right))
    assert binary_channels(SPEC, "auto").tolist() == [False, False, True, False]
    assert binary_channels(both, "auto").tolist() == [True, False, False, True]
    assert binary_channels(both, "right_gripper").tolist() == [False, False, False, True]
    assert not binary_channels(SPEC, "none").any()
    assert binary_channels(replace(SPEC, action=(ARM, ROLL)), "auto").tolist() == [False] * 3


def test_a_gripper_that_the_suite_does_not_have_is_refused_with_what_it_has() -> None:
    with pytest.raises(ValueError, match=r"policy.gripper is 'hand'.* of bench are translation, gripper, rotation"):
        make(SPEC, "policy.gripper=hand")


def test_rollouts_open_and_close_the_gripper_and_explore_the_rest() -> None:
    policy = make()
    sampler = training_sampler(policy, AlgoConfig())
    rngs = [keyed_rng(0, Stream.ROLLOUT, i) for i in range(40)]
    actor = Actor(policy, block=8, device="cpu")
    made = actor.decide(observe(40), rngs, temperature=1.0, sampler=sampler).decision
    gripper = np.unique(made.action[..., 2])
    # The ends of the data's range, and nothing between.
    assert gripper.tolist() == [policy.stats.q01[2], policy.stats.q99[2]]
    sample = made.stored["sample"]
    assert set(sample[..., 2].flatten().tolist()) == {-1.0, 1.0}
    spread = (sample - made.stored["parameters"]["location"])[..., [0, 1, 3]].std()
    assert float(spread) == pytest.approx(np.exp(-1.6), rel=0.15)


def test_at_temperature_zero_it_acts_as_sft_left_it() -> None:
    policy, seen = make(), observe(8)
    rngs = [keyed_rng(0, Stream.EVALUATION, i) for i in range(8)]
    made = Actor(policy, block=8, device="cpu").decide(seen, rngs, temperature=0.0).decision
    with torch.no_grad():
        regressed = policy._regress(policy.encode(policy.collate(seen)))
    expected = regressed.clone()
    expected[..., 2] = torch.where(regressed[..., 2] > 0, 1.0, -1.0)
    np.testing.assert_allclose(made.action, policy.actions_to_env(expected), atol=1e-5)


def test_the_grippers_temperature_moves_its_odds_and_nothing_else() -> None:
    plain, hot = make(), make(SPEC, "policy.gripper_temperature=4")
    batch = plain.collate(observe(4))
    with torch.no_grad():
        cold, warm = (p.distribution(p.encode(batch)) for p in (plain, hot))
    torch.testing.assert_close(warm.location[..., 2] * 4, cold.location[..., 2])
    assert torch.equal(warm.location[..., [0, 1, 3]], cold.location[..., [0, 1, 3]])
    assert torch.equal(warm.deterministic(), cold.deterministic())
    action, mask = torch.ones(4, 3, 4), torch.ones(4, 3, 4, dtype=torch.bool)
    with torch.no_grad():
        losses = [float(p.imitation_loss(p.encode(batch), action, mask)) for p in (plain, hot)]
    assert losses[0] == losses[1]


def test_imitation_teaches_poses_and_gripper_and_leaves_the_deviation() -> None:
    policy, seen = make(SPEC, "policy.gripper_weight=0.3"), observe(8)
    action = torch.rand(8, 3, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    action[..., 2] = torch.where(action[..., 2] > 0, 1.0, -1.0)
    mask = torch.ones_like(action, dtype=torch.bool)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(60):
        loss = policy.imitation_loss(policy.encode(policy.collate(seen)), action, mask)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = policy.distribution(policy.encode(policy.collate(seen))).deterministic()
    assert (found[..., 2] == action[..., 2]).all()
    assert (found - action)[..., [0, 1, 3]].abs().mean() < 0.1
    assert torch.equal(policy.log_std, torch.full((4,), -1.6))


# --- what it refuses


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gripper_temperature": 0.0}, "policy.gripper_temperature is 0.0; it must be positive"),
        ({"gripper_weight": -1.0}, "policy.gripper_weight is -1.0; it must be 0 or more"),
        ({"log_std_init": 3.0}, r"policy.log_std_init is 3.0; it must lie in \[-5, 1\]"),
        ({"head_sizes": (4, 0)}, r"policy.head_sizes is \(4, 0\); it must be positive"),
        ({"name": "qwen_vla"}, "policy.name is 'qwen_vla'; it must be 'vlm4vla'"),
    ],
)
def test_an_impossible_option_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VLM4VLAConfig(**changes)


def test_the_doctor_says_that_it_cannot_plan_it(tmp_path: Any) -> None:
    from rlvla.memory import check_policy

    with pytest.raises(ConfigError, match="'vlm4vla'; rlvla doctor plans the memory of qwen_vla alone"):
        check_policy("vlm4vla_toy")
    save_policy(make(), tmp_path / "policy")
    with pytest.raises(ConfigError, match="'vlm4vla'; rlvla doctor plans"):
        load_unallocated(tmp_path / "policy")
