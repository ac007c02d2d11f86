"""The flow head of starVLA's QwenGR00T: names, time, conventions, and a second implementation by hand."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rlvla.policies.brain import BrainConfig, PromptConfig
from rlvla.policies.gr00t_head import Gr00tHead, Gr00tHeadConfig, step_buckets, time_buckets
from rlvla.policies.policy import Policy
from rlvla_algos.flow import time_grid
from rlvla_envs.base import Observation, VecEnv

WIDTH, CONTEXT = 12, 10


def make_head(state_size: int = 3, **changes: Any) -> Gr00tHead:
    """A head with random weights everywhere."""
    sizes = {
        "num_blocks": 4,
        "num_heads": 3,
        "head_dim": 4,
        "hidden_size": 7,
        "output_size": 5,
        "num_future_tokens": 2,
        "max_positions": 6,
        "channels": 3,
        "horizon": 4,
    }
    torch.manual_seed(0)
    head = Gr00tHead(Gr00tHeadConfig(**{**sizes, **changes}), CONTEXT, state_size)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    return head


def inputs(batch: int = 3, length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, 4:] = False  # right padding
    mask[2, :3] = False  # left padding
    return {
        "tokens": torch.randn(batch, length, CONTEXT, generator=generator),
        "mask": mask,
        "state": torch.randn(batch, 3, generator=generator),
        "sample": torch.randn(batch, 4, 3, generator=generator),
        "action_mask": torch.ones(4, 3, dtype=torch.bool),
        "bucket": torch.tensor([0, 250, 999])[:batch],
    }


# --- time


def test_the_bucket_of_a_step_is_the_integer_that_starvla_computes() -> None:
    # By hand: N = 4 gives 0, 250, 500, 750 of 1000.
    assert step_buckets(torch.arange(4), 4, 1000).tolist() == [0, 250, 500, 750]
    for num_steps in range(1, 101):
        theirs = [int(k / float(num_steps) * 1000) for k in range(num_steps)]
        assert step_buckets(torch.arange(num_steps), num_steps, 1000).tolist() == theirs


def test_a_bucket_read_off_the_flow_time_by_truncation_would_be_another_one() -> None:
    # The reason for handing the step: 1 - 0.8 in single precision is a little below 0.2.
    tau = time_grid(5)[:-1]
    assert ((1 - tau) * 1000).long().tolist() == [0, 199, 399, 600, 800]
    assert step_buckets(torch.arange(5), 5, 1000).tolist() == [0, 200, 400, 600, 800]


@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100])
def test_where_the_grid_divides_the_buckets_the_rounded_time_and_the_step_agree(num_steps: int) -> None:
    tau = time_grid(num_steps)[:-1]
    expected = step_buckets(torch.arange(num_steps), num_steps, 1000)
    assert time_buckets(tau, 1000).tolist() == expected.tolist()


def test_where_it_does_not_they_are_one_bucket_apart_at_most() -> None:
    # N = 3, by hand: the third step is at 666.67 of 1000; the step takes 666, the nearest is 667.
    assert step_buckets(torch.arange(3), 3, 1000).tolist() == [0, 333, 666]
    assert time_buckets(time_grid(3)[:-1], 1000).tolist() == [0, 333, 667]


def test_a_continuous_flow_time_goes_to_the_nearest_bucket() -> None:
    # 1000 (1 - tau) is 0.4, 0.6, 499.6, 998.6 and 1000, which is no bucket any more.
    tau = torch.tensor([0.9996, 0.9994, 0.5004, 0.0014, 0.0])
    assert time_buckets(tau, 1000).tolist() == [0, 1, 500, 999, 999]
    # SFT draws within [0.001, 0.999]; its ends by hand.
    assert time_buckets(torch.tensor([0.999, 0.001]), 1000).tolist() == [1, 999]


# --- names and sizes


def test_the_weights_have_starvlas_names_and_shapes() -> None:
    expected = {
        "action_encoder.layer1": (WIDTH, 3),
        "action_encoder.layer2": (WIDTH, 2 * WIDTH),
        "action_encoder.layer3": (WIDTH, WIDTH),
        "state_encoder.layer1": (7, 3),
        "state_encoder.layer2": (WIDTH, 7),
        "action_decoder.layer1": (7, 5),
        "action_decoder.layer2": (3, 7),
        "model.timestep_encoder.timestep_embedder.linear_1": (WIDTH, 256),
        "model.timestep_encoder.timestep_embedder.linear_2": (WIDTH, WIDTH),
        "model.proj_out_1": (2 * WIDTH, WIDTH),
        "model.proj_out_2": (5, WIDTH),
    }
    for i in range(4):
        source = WIDTH if i % 2 else CONTEXT
        block = f"model.transformer_blocks.{i}"
        expected |= {
            f"{block}.norm1.linear": (2 * WIDTH, WIDTH),
            f"{block}.attn1.to_q": (WIDTH, WIDTH),
            f"{block}.attn1.to_k": (WIDTH, source),
            f"{block}.attn1.to_v": (WIDTH, source),
            f"{block}.attn1.to_out.0": (WIDTH, WIDTH),
            f"{block}.ff.net.0.proj": (4 * WIDTH, WIDTH),
            f"{block}.ff.net.2": (WIDTH, 4 * WIDTH),
        }
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in expected.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in expected.items()}
    shapes |= {"future_tokens.weight": (2, WIDTH), "position_embedding.weight": (6, WIDTH)}
    assert {name: tuple(tensor.shape) for name, tensor in make_head().state_dict().items()} == shapes


def test_without_a_state_there_is_no_state_encoder() -> None:
    assert not [name for name in make_head(state_size=0).state_dict() if name.startswith("state_encoder")]


def test_without_interleaving_every_block_reads_the_context() -> None:
    blocks = make_head(interleave_self_attention=False).model.transformer_blocks
    assert [block.attn1.to_k.in_features for block in blocks] == [CONTEXT] * 4


def test_the_4b_policy_has_qwen3_vl_4b_and_dit_b(policy_on_meta: Callable[[str], Any]) -> None:
    policy = policy_on_meta("qwen_gr00t_4b")
    # Qwen3-VL-4B-Instruct is published with 4.44 B parameters; its language model is Qwen3-4B, 4.02 B.
    assert count(policy.vlm) == 4_437_815_808
    assert count(policy.vlm.language_model) == 4_022_468_096
    # By hand, d = 768: a block has AdaLN 2 d^2 + 2d, queries and output 2 (d^2 + d), feed-forward 8 d^2 + 5d, and keys
    # and values of the context (2560) or of itself.
    d, context = 768, 2560
    common = 2 * d * d + 2 * d + 2 * (d * d + d) + 8 * d * d + 5 * d
    blocks = 8 * (common + 2 * (context * d + d)) + 8 * (common + 2 * (d * d + d))
    time, out = (256 * d + d) + (d * d + d), (2 * d * d + 2 * d) + (1024 * d + 1024)
    action_in = (7 * d + d) + (2 * d * d + d) + (d * d + d)
    action_out = (1024 * 1024 + 1024) + (7 * 1024 + 7)
    tables = (32 + 1024) * d
    assert count(policy.expert) == blocks + time + out + action_in + action_out + tables == 160_677_383
    assert policy.value_size == 2560
    assert (policy.horizon, policy.channels) == (16, 7)


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


# --- the forward pass


def by_hand(weights: Mapping[str, Tensor], x: Mapping[str, Tensor], num_blocks: int, num_heads: int) -> Tensor:
    """data - noise of every row, one row and one head at a time, from the names of a checkpoint and nothing else."""

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(y: Tensor, eps: float) -> Tensor:
        centred = y - y.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()

    def gelu(y: Tensor) -> Tensor:
        return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))

    def silu(y: Tensor) -> Tensor:
        return y / (1 + (-y).exp())

    rows = []
    for row in range(len(x["sample"])):
        bucket = float(x["bucket"][row])
        width = weights["action_encoder.layer3.bias"].numel()
        # Sines first, over n; the DiT's own has cosines first, over n - 1.
        angles = torch.tensor([bucket * 10000 ** (-i / (width // 2)) for i in range(width // 2)])
        time = torch.cat([angles.sin(), angles.cos()])
        angles = torch.tensor([bucket * 10000 ** (-i / 127) for i in range(128)])
        embedded = linear("model.timestep_encoder.timestep_embedder.linear_1", torch.cat([angles.cos(), angles.sin()]))
        embedded = linear("model.timestep_encoder.timestep_embedder.linear_2", silu(embedded))

        action = linear("action_encoder.layer1", x["sample"][row])
        both = torch.cat([action, time.expand(len(action), -1)], dim=-1)
        action = linear("action_encoder.layer3", silu(linear("action_encoder.layer2", both)))
        action = action + weights["position_embedding.weight"][: len(action)]
        state = linear("state_encoder.layer2", linear("state_encoder.layer1", x["state"][row]).clamp(min=0))
        sequence = torch.cat([state[None], weights["future_tokens.weight"], action])
        context = x["tokens"][row][x["mask"][row]]

        for i in range(num_blocks):
            block = f"model.transformer_blocks.{i}"
            scale, shift = linear(f"{block}.norm1.linear", silu(embedded)).chunk(2)
            h = norm(sequence, 1e-5) * (1 + scale) + shift
            source = h if i % 2 else context
            q, k, v = (linear(f"{block}.attn1.to_{n}", y) for n, y in (("q", h), ("k", source), ("v", source)))
            size = width // num_heads
            heads = []
            for j in range(num_heads):
                part = slice(j * size, (j + 1) * size)
                logits = q[:, part] @ k[:, part].T / math.sqrt(size)
                heads.append(logits.softmax(-1) @ v[:, part])
            sequence = sequence + linear(f"{block}.attn1.to_out.0", torch.cat(heads, dim=-1))
            inner = gelu(linear(f"{block}.ff.net.0.proj", norm(sequence, 1e-5)))
            sequence = sequence + linear(f"{block}.ff.net.2", inner)

        # Here the shift comes first.
        shift, scale = linear("model.proj_out_1", silu(embedded)).chunk(2)
        hidden = linear("model.proj_out_2", norm(sequence, 1e-6) * (1 + scale) + shift)
        decoded = linear("action_decoder.layer2", linear("action_decoder.layer1", hidden).clamp(min=0))
        rows.append(decoded[-len(action) :])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("buckets", "tolerance"),
    # An angle of 999 radians is rounded by 3e-5 in single precision; 256 of these go into the time.
    [((0, 1, 3), 2e-5), ((0, 250, 999), 1e-3)],
    ids=["early", "all"],
)
def test_the_head_equals_a_second_implementation_and_points_the_other_way(
    buckets: tuple[int, ...], tolerance: float
) -> None:
    head, x = make_head(), inputs()
    x["bucket"] = torch.tensor(buckets)
    with torch.no_grad():
        theirs = by_hand(head.state_dict(), x, num_blocks=4, num_heads=3)
        ours = head(**x)
    assert theirs.abs().mean() > 0.1
    torch.testing.assert_close(ours, -theirs, atol=tolerance, rtol=tolerance)


def test_a_euler_step_of_ours_is_one_of_theirs() -> None:
    # Theirs: x + (1 / N) (data - noise), with s from 0 to 1; ours: x - (1 / N) (noise - data), with tau from 1 to 0.
    head, x = make_head(), inputs()
    x["bucket"] = step_buckets(torch.tensor([1, 1, 1]), 4, 1000)
    with torch.no_grad():
        theirs = x["sample"] + 0.25 * by_hand(head.state_dict(), x, num_blocks=4, num_heads=3)
        ours = x["sample"] - 0.25 * head(**x)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_hidden_context_does_not_reach_the_velocity() -> None:
    head, x = make_head(), inputs()
    with torch.no_grad():
        reference = head(**x)
        x["tokens"] = torch.where(x["mask"][..., None], x["tokens"], 1e3)
        assert torch.equal(head(**x), reference)


def test_a_padded_and_an_unpadded_chunk_have_the_same_velocity() -> None:
    head, x = make_head(), inputs()
    short = make_head(channels=2, horizon=3)
    weights = head.state_dict()
    weights["action_encoder.layer1.weight"] = weights["action_encoder.layer1.weight"][:, :2]
    for name in ("action_decoder.layer2.weight", "action_decoder.layer2.bias"):
        weights[name] = weights[name][:2]
    short.load_state_dict(weights)
    x["action_mask"] = torch.zeros(4, 3, dtype=torch.bool)
    x["action_mask"][:3, :2] = True
    cut = {**x, "sample": x["sample"][:, :3, :2], "action_mask": x["action_mask"][:3, :2]}
    with torch.no_grad():
        padded, exact = head(**x), short(**cut)
    torch.testing.assert_close(padded[:, :3, :2], exact, atol=1e-5, rtol=1e-4)
    assert not padded[:, 3:].any()
    assert not padded[:, :, 2:].any()


# --- the policy


def test_the_policy_reads_the_step_where_there_is_one_and_the_time_where_there_is_none(
    make_policy: Callable[..., Policy], make_toy: Callable[..., VecEnv]
) -> None:
    env = make_toy(2)
    policy = make_policy("qwen_gr00t_toy", env.spec, "policy.num_denoising_steps=3")
    context = policy.encode(policy.collate(env.reset(range(2), range(2))))
    sample = torch.randn(2, policy.horizon, policy.channels, generator=torch.Generator().manual_seed(0))
    tau, step = torch.tensor([1 / 3, 2 / 3]), torch.tensor([2, 1])
    with torch.no_grad():
        stepped = policy.velocity(context, sample, tau, step)
        # Buckets 666 and 333, as starVLA's sampler has them; the nearest to the times are 667 and 333.
        assert torch.equal(stepped, policy.velocity(context, sample, torch.tensor([0.334, 0.667])))
        timed = policy.velocity(context, sample, tau)
        assert torch.equal(stepped[1], timed[1])
        assert not torch.equal(stepped[0], timed[0])


def test_it_stands_on_qwen3_5_as_well(make_policy: Callable[..., Policy], make_toy: Callable[..., VecEnv]) -> None:
    env = make_toy(2)
    changes = [
        "policy.vlm.family=qwen3_5",
        "policy.vlm.deepstack_visual_indexes=[]",
        "policy.vlm.full_attention_interval=2",
        "policy.vlm.mrope_section=[3,3,2]",
    ]
    policy: Any = make_policy("qwen_gr00t_toy", env.spec, *changes)
    assert type(policy.vlm).__name__ == "Qwen3_5Model"
    assert type(make_policy("qwen_gr00t_toy", env.spec).vlm).__name__ == "Qwen3VLModel"  # type: ignore[attr-defined]
    seen: Observation = env.reset(range(2), range(2))
    with torch.no_grad():
        together = policy.encode(policy.collate(seen)).tokens
        alone = policy.encode(policy.collate(seen.row(1))).tokens
    torch.testing.assert_close(alone, together[[1]], atol=1e-4, rtol=1e-4)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_attention_interval": 2}, "full_attention_interval is 2; Qwen3-VL has no such size"),
        ({"mrope_section": (6, 5, 4)}, r"mrope_section is \[6, 5, 4\]; .* half of what a head rotates, 16"),
        ({"family": "qwen3_5"}, r"mrope_section is \[6, 5, 5\]; .* half of what a head rotates, 8"),
        ({"deepstack_visual_indexes": (2,)}, r"deepstack_visual_indexes is \[2\]; .* below vision_depth \(2\)"),
        ({"family": "qwen3_5", "deepstack_visual_indexes": (0,)}, "Qwen3.5 has none of these"),
    ],
)
def test_a_brain_whose_sizes_do_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    from rlvla.policies.brain import Family

    if "family" in changes:
        changes = {**changes, "family": Family(changes["family"])}
    with pytest.raises(ValueError, match=message):
        BrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 65}, "horizon is 65; it must be at most max_positions, 64"),
        ({"num_heads": 3, "head_dim": 5}, "num_heads x head_dim is 15; it must be even"),
        ({"num_future_tokens": 0}, "num_future_tokens is 0; it must be at least 1"),
    ],
)
def test_a_head_whose_sizes_do_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gr00tHeadConfig(**changes)


def test_a_prompt_without_the_instruction_or_with_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must contain \{instruction\}"):
        PromptConfig(user="move")
    with pytest.raises(ValueError, match=r"can have \{instruction\} and \{robot_type\} only"):
        PromptConfig(user="{instruction} {robot}")
