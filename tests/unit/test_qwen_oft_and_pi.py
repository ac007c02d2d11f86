"""starVLA's other two policies: the queries of QwenOFT, the layers of QwenPI, and the published sizes of both."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlvla.policies.brain import BrainConfig
from rlvla.policies.layerwise_head import LayerwiseHeadConfig, read_layers
from rlvla.policies.policy import Policy
from rlvla.policies.processor import train_tokenizer
from rlvla.policies.qwen_oft import QwenOftConfig, _check_query
from rlvla.policies.qwen_pi import QwenPiConfig
from rlvla_envs.base import VecEnv


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


# --- QwenOFT


def test_the_4b_policy_has_qwen3_vl_4b_and_the_public_mlp(policy_on_meta: Callable[[str], Any]) -> None:
    policy = policy_on_meta("qwen_oft_4b")
    assert count(policy.vlm) == 4_437_815_808
    # By hand, d = 2560, w = 2 d: norm and in, two blocks of norm and linear, norm and out.
    d, w, k = 2560, 5120, 7
    by_hand = (2 * d + d * w + w) + 2 * (2 * w + w * w + w) + (2 * w + w * k + k)
    assert count(policy.expert) == by_hand
    assert policy.log_std.shape == (7,)
    assert (policy.horizon, policy.channels, policy.value_size) == (16, 7, 2560)


def test_the_request_is_starvlas() -> None:
    assert QwenOftConfig(horizon=2).request("lift it") == (
        "lift it Please predict the next 2 robot actions: <action>\N{LEFT-POINTING MAGNIFYING GLASS}"
        "\N{LEFT-POINTING MAGNIFYING GLASS}<action>."
    )


def test_queries_that_a_tokenizer_merges_are_refused() -> None:
    config = QwenOftConfig(horizon=8)
    # It has seen queries in pairs, and makes one token of two.
    merging = train_tokenizer([config.query * 8] * 50, 400)
    with pytest.raises(ValueError, match=r"the tokenizer writes 8 of them with . of its token"):
        _check_query(config, merging)
    merging.add_tokens([config.query])
    assert _check_query(config, merging) == merging.convert_tokens_to_ids(config.query)


def test_an_action_is_made_of_its_own_query(
    make_policy: Callable[..., Policy], make_toy: Callable[..., VecEnv]
) -> None:
    env = make_toy(2)
    policy: Any = make_policy("qwen_oft_toy", env.spec)
    with torch.no_grad():
        context = policy.encode(policy.collate(env.reset(range(2), range(2))))
        assert context.tokens.shape == (2, 8, 64)
        before = policy.distribution(context).location
        # Not a shift: the head's first norm would take it out.
        context.tokens[:, 2] = context.tokens[:, 2].flip(-1)
        changed = (policy.distribution(context).location - before).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.tolist() == [i == 2 for i in range(8)]


def test_what_sft_minimises_is_the_mean_absolute_error(
    make_policy: Callable[..., Policy], make_toy: Callable[..., VecEnv]
) -> None:
    env = make_toy(2)
    policy: Any = make_policy("qwen_oft_toy", env.spec)
    with torch.no_grad():
        context = policy.encode(policy.collate(env.reset(range(2), range(2))))
        location = policy.distribution(context).location
        mask = torch.zeros_like(location, dtype=torch.bool)
        mask[0, :2, 0] = True
        action = location.clone()
        action[0, 0, 0] += 0.5
        action[0, 1, 0] -= 1.5
        action[1] += 9  # outside the mask
        # By hand: (.5 + 1.5) / 2.
        torch.testing.assert_close(policy.imitation_loss(context, action, mask), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "policy.horizon is 0; it must be at least 1"),
        ({"query": ""}, "policy.query is empty"),
        ({"log_std_init": 3.0}, r"policy.log_std_init is 3.0; it must lie in \[-5, 1\]"),
    ],
)
def test_an_oft_configuration_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QwenOftConfig(**changes)


# --- QwenPI


def test_the_4b_policy_has_a_block_for_each_layer_of_qwen3_vl_4b(policy_on_meta: Callable[[str], Any]) -> None:
    policy = policy_on_meta("qwen_pi_4b")
    assert count(policy.vlm) == 4_437_815_808
    # By hand, d = 2560: AdaLN 2 d^2 + 2 d, queries, keys, values and output 4 (d^2 + d), feed-forward 8 d^2 + 5 d.
    d = 2560
    blocks = 36 * (14 * d * d + 11 * d)
    time = (256 * d + d) + (d * d + d)
    action_in = (7 * d + d) + (2 * d * d + d) + (d * d + d)
    action_out = (1024 * d + 1024) + (7 * 1024 + 7)
    assert count(policy.expert) == blocks + time + action_in + action_out + (32 + 1024) * d
    assert (policy.horizon, policy.channels, policy.value_size) == (16, 7, 2560)


def test_each_block_reads_its_own_layer_by_hand() -> None:
    # Four states: the embeddings' 0 and the layers' 1, 2, 3. Three blocks have the last three; block 1 reads none.
    states = tuple(torch.full((1, 2, 4), float(i)) for i in range(4))
    alternate = LayerwiseHeadConfig(num_blocks=3)
    assert alternate.readers == (0, 2)
    assert read_layers(states, alternate)[0, 0, :, 0].tolist() == [1, 3]
    every = LayerwiseHeadConfig(num_blocks=3, interleave_self_attention=False)
    assert read_layers(states, every)[0, 0, :, 0].tolist() == [1, 2, 3]
    # As many blocks as states: the first reads the embeddings.
    assert read_layers(states, LayerwiseHeadConfig(num_blocks=4))[0, 0, :, 0].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 4}, "num_blocks is 4; the VLM has 2 layers, whose states and the embedding are 3"),
        ({"head_dim": 48}, "head_dim is 48; it must divide the head's width, which is the VLM's: 128"),
        ({"horizon": 65}, "horizon is 65; it must be at most max_positions, 64"),
    ],
)
def test_a_pi_head_that_does_not_fit_the_vlm_is_refused(changes: dict[str, Any], message: str) -> None:
    brain = BrainConfig(head_dim=32, mrope_section=(6, 5, 5), num_hidden_layers=2)
    with pytest.raises(ValueError, match=message):
        QwenPiConfig(vlm=brain, expert=LayerwiseHeadConfig(**changes))


def test_the_last_layer_is_the_one_that_the_critic_pools(
    make_policy: Callable[..., Policy], make_toy: Callable[..., VecEnv]
) -> None:
    env = make_toy(2)
    policy: Any = make_policy("qwen_pi_toy", env.spec)
    with torch.no_grad():
        context = policy.encode(policy.collate(env.reset(range(2), range(2))))
    # Three blocks on an embedding and two layers: the third reads the last layer's state, behind the last norm.
    assert context.per_token["layers"].shape[2] == 2
    assert torch.equal(context.per_token["layers"][:, :, 1], context.tokens)
