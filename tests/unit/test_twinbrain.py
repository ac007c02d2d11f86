"""TwinBrainVLA: joint attention against one written by hand, padding, gradients, prompts, sizes."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from rlvla.policies.asymot import (
    LeftMemory,
    Reading,
    hide_left_from_skipped_layers,
    is_joint,
    joint_mask,
    read_left,
    read_right,
)
from rlvla.policies.brain import BrainConfig, Family, build_brain
from rlvla.policies.policy import Policy
from rlvla.policies.prompted import PAD_TO
from rlvla.policies.twinbrain_vla import TwinBrainVLAConfig, left_prompt, right_prompt
from rlvla_envs.base import EnvSpec, Observation, VecEnv

IMAGE = 5
HIDDEN, LAYERS = 32, 4


def make_brain(seed: int) -> Any:
    """A Qwen3-VL whose attention is far from uniform."""
    config = BrainConfig(
        vocab_size=40,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mrope_section=(2, 1, 1),
        vision_depth=2,
        vision_hidden_size=16,
        vision_intermediate_size=24,
        num_position_embeddings=16,
        deepstack_visual_indexes=(0, 1),
    )
    torch.manual_seed(seed)
    brain = build_brain(config, {"pad": 0, "image": IMAGE, "video": 6, "vision_start": 7, "vision_end": 8})
    with torch.no_grad():
        for parameter in brain.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return brain.eval()


@pytest.fixture(scope="module")
def brains() -> tuple[Any, Any]:
    return make_brain(0), make_brain(1)


def make_reading(brain: Any, num_text: int, seed: int, *, left_pad: int = 0, right_pad: int = 0) -> Reading:
    """Two rows of one image of 2 x 2 tokens between ``num_text`` words."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(10, 40, (2, num_text), generator=generator)
    half = num_text // 2
    middle = torch.tensor([7, IMAGE, IMAGE, IMAGE, IMAGE, 8]).expand(2, -1)
    ids = torch.cat([text[:, :half], middle, text[:, half:]], dim=1)
    grid = torch.tensor([[1, 4, 4]])
    positions, _ = brain.get_rope_index(
        ids,
        mm_token_type_ids=(ids == IMAGE).long(),
        image_grid_thw=grid.expand(2, -1),
        attention_mask=torch.ones_like(ids),
    )
    pixels = torch.randn(2 * 16, 3 * 2 * 8 * 8, generator=generator)
    pad = (left_pad, right_pad)
    return Reading(
        torch.nn.functional.pad(ids, pad),
        torch.nn.functional.pad(torch.ones_like(ids, dtype=torch.bool), pad),
        torch.nn.functional.pad(positions.transpose(0, 1), pad),
        {"pixel_values": pixels, "image_grid_thw": grid.expand(2, -1)},
    )


def with_state(reading: Reading) -> Reading:
    """One more token behind the prompt."""
    last = (reading.position_ids * reading.mask[:, None]).amax(dim=(1, 2))
    return reading._replace(
        mask=torch.cat([reading.mask, torch.ones(2, 1, dtype=torch.bool)], dim=1),
        position_ids=torch.cat([reading.position_ids, (last + 1)[:, None, None].expand(-1, 3, 1)], dim=2),
    )


def by_hand(left: Any, right: Any, seen: tuple[Reading, Reading], extra: Tensor | None, interval: int) -> Tensor:
    """Equations 3 to 6 of the paper with a loop over layers, rows and heads: no mask, no cache, no padding.

    Returns:
        The right's last hidden states, zero where its prompt is padded.
    """

    def start(brain: Any, reading: Reading, row: int, extra: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        features = brain.visual(reading.images["pixel_values"], grid_thw=reading.images["image_grid_thw"])
        image = features.pooler_output.unflatten(0, (2, 4))[row]
        deep = [each.unflatten(0, (2, 4))[row] for each in features.deepstack_features]
        ids = reading.ids[row]
        h = brain.language_model.embed_tokens(ids).clone()
        h[ids == IMAGE] = image
        places = ids == IMAGE
        if extra is not None:
            h = torch.cat([h, extra[row]])
            places = torch.cat([places, torch.zeros(len(extra[row]), dtype=torch.bool)])
        valid = reading.mask[row]
        return h[valid], deep, places[valid]

    def project(block: Any, h: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = block.self_attn
        x = block.input_layernorm(h)
        q = attention.q_norm(attention.q_proj(x).unflatten(-1, (-1, 8)))
        k = attention.k_norm(attention.k_proj(x).unflatten(-1, (-1, 8)))
        turned = []
        for y in (q, k):
            first, second = y[..., :4], y[..., 4:]
            cos, sin = angles.cos()[:, None], angles.sin()[:, None]
            turned.append(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))
        return turned[0], turned[1], attention.v_proj(x).unflatten(-1, (-1, 8))

    def attend(q: Tensor, k: Tensor, v: Tensor, num_before: int) -> Tensor:
        out = torch.zeros_like(q)
        for i in range(len(q)):
            for head in range(4):
                keys, values = k[: num_before + i + 1, head // 2], v[: num_before + i + 1, head // 2]
                out[i, head] = (keys @ q[i, head] / math.sqrt(8)).softmax(0) @ values
        return out.flatten(1)

    def finish(block: Any, h: Tensor, attended: Tensor, deep: list[Tensor], places: Tensor, layer: int) -> Tensor:
        h = h + block.self_attn.o_proj(attended)
        h = h + block.mlp(block.post_attention_layernorm(h))
        if layer < len(deep):
            h = h.clone()
            h[places] += deep[layer]
        return h

    def angles_of(reading: Reading, row: int) -> Tensor:
        positions = reading.position_ids[row][:, reading.mask[row]].float()
        frequency = 10000.0 ** (-torch.arange(4) / 4)
        # Section (2, 1, 1), interleaved: time, height, width, and time again.
        return torch.stack([positions[axis] * frequency[i] for i, axis in enumerate((0, 1, 2, 0))], dim=-1)

    mask = seen[1].mask
    result = torch.zeros(*mask.shape, HIDDEN)
    for row in range(2):
        h_left, deep_left, places_left = start(left, seen[0], row, None)
        h_right, deep_right, places_right = start(right, seen[1], row, extra)
        for layer in range(LAYERS):
            block = left.language_model.layers[layer]
            q_left, k_left, v_left = project(block, h_left, angles_of(seen[0], row))
            h_left = finish(block, h_left, attend(q_left, k_left, v_left, 0), deep_left, places_left, layer)
            block = right.language_model.layers[layer]
            q, k, v = project(block, h_right, angles_of(seen[1], row))
            before = 0
            if layer % (interval + 1) == 0:
                k, v, before = torch.cat([k_left, k]), torch.cat([v_left, v]), len(k_left)
            h_right = finish(block, h_right, attend(q, k, v, before), deep_right, places_right, layer)
        result[row, mask[row]] = right.language_model.norm(h_right)
    return result


# --- the mechanism


def test_the_joint_mask_by_hand() -> None:
    # The left has three tokens, the first padded; the right two, and one of padding, which sees itself.
    left = torch.tensor([[False, True, True]])
    right = torch.tensor([[True, True, False]])
    expected = [
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1],
    ]
    mask = joint_mask(left, right)
    assert mask.shape == (1, 1, 3, 6)
    assert mask[0, 0].int().tolist() == expected


def test_layers_that_read_the_left_by_hand() -> None:
    # Interval 1 alternates, as the paper says of its k = 1.
    assert [[int(is_joint(layer, k)) for layer in range(6)] for k in (0, 1, 2)] == [
        [1, 1, 1, 1, 1, 1],
        [1, 0, 1, 0, 1, 0],
        [1, 0, 0, 1, 0, 0],
    ]


@pytest.mark.parametrize("interval", [0, 1, 2])
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@torch.no_grad()
def test_the_cache_gives_the_joint_attention_of_the_paper(brains: tuple[Any, Any], interval: int, state: bool) -> None:
    left, right = brains[0], make_brain(1)
    hide_left_from_skipped_layers(right, interval)
    seen = make_reading(left, 7, 1, left_pad=3), make_reading(right, 10, 2, right_pad=2)
    extra = torch.randn(2, 1, HIDDEN, generator=torch.Generator().manual_seed(0)) if state else None
    if state:
        seen = seen[0], with_state(seen[1])
    expected = by_hand(left, right, seen, extra, interval)
    made = read_right(right, seen[1], read_left(left, seen[0], interval), extra)
    valid = seen[1].mask
    assert made[valid].std() > 0.3
    torch.testing.assert_close(made[valid], expected[valid], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_left_brain_padded_on_either_side_tells_the_right_the_same(brains: tuple[Any, Any]) -> None:
    left, right = brains
    reading = make_reading(right, 10, 2)
    outcomes = [
        read_right(right, reading, read_left(left, make_reading(left, 7, 1, left_pad=before, right_pad=after), 0))
        for before, after in ((0, 0), (5, 0), (0, 5), (3, 9))
    ]
    for padded in outcomes[1:]:
        torch.testing.assert_close(padded, outcomes[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_each_skipped_layer_makes_a_difference_and_so_does_the_left(brains: tuple[Any, Any]) -> None:
    left, reading = brains[0], make_reading(brains[1], 10, 2)
    seen = make_reading(left, 7, 1)
    made = []
    for interval in (0, 1, 2, 3):
        right = make_brain(1)
        hide_left_from_skipped_layers(right, interval)
        made.append(read_right(right, reading, read_left(left, seen, interval)))
    made.append(read_right(brains[1], reading, read_left(make_brain(2), seen, 0)))
    for i, one in enumerate(made):
        assert all((one - other).abs().max() > 1e-2 for other in made[:i])


@torch.no_grad()
def test_the_left_brain_reads_as_if_it_were_alone(brains: tuple[Any, Any]) -> None:
    left, right = brains
    seen = make_reading(left, 7, 1)
    memory = read_left(left, seen, 0)
    before = [(keys.clone(), values.clone()) for keys, values in memory._layers]
    read_right(right, make_reading(right, 10, 2), memory)
    read_right(make_brain(2), make_reading(right, 10, 2), memory)
    for (keys, values), (old_keys, old_values) in zip(memory._layers, before, strict=True):
        assert torch.equal(keys, old_keys)
        assert torch.equal(values, old_values)
    assert memory.get_seq_length() == seen.ids.shape[1]


@torch.no_grad()
def test_a_memory_can_be_read_again(brains: tuple[Any, Any]) -> None:
    left, right = brains
    memory = read_left(left, make_reading(left, 7, 1), 0)
    reading = make_reading(right, 10, 2)
    first = read_right(right, reading, memory)
    assert torch.equal(read_right(right, reading, memory), first)


def test_a_cache_that_keeps_what_it_is_given_would_not_do(brains: tuple[Any, Any]) -> None:
    # The trap that LeftMemory avoids: transformers' own cache holds the right's keys after a pass.
    left, right = brains
    seen, reading = make_reading(left, 7, 1), make_reading(right, 10, 2)
    with torch.no_grad():
        images = seen.images
        cache = left(
            input_ids=seen.ids, position_ids=seen.position_ids.transpose(0, 1), use_cache=True, **images
        ).past_key_values
        length = cache.get_seq_length()
        right(
            input_ids=reading.ids,
            position_ids=reading.position_ids.transpose(0, 1),
            attention_mask=joint_mask(seen.mask, reading.mask),
            past_key_values=cache,
            **reading.images,
        )
    assert cache.get_seq_length() == length + reading.ids.shape[1]


def test_gradients_reach_all_of_the_right_brain_and_nothing_of_the_left() -> None:
    left, right = make_brain(0), make_brain(1)
    memory = read_left(left, make_reading(left, 7, 1), 0)
    read_right(right, make_reading(right, 10, 2), memory).square().sum().backward()
    assert all(p.requires_grad and p.grad is None for p in left.parameters())
    assert not [name for name, p in right.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("interval", [0, 1])
def test_layers_may_be_checkpointed(interval: int) -> None:
    left = make_brain(0)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for wrapped in (False, True):
        right = make_brain(1)
        hide_left_from_skipped_layers(right, interval)
        layers = right.language_model.layers
        for i in range(LAYERS) if wrapped else ():
            layers[i] = checkpoint_wrapper(layers[i], checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        memory = read_left(left, make_reading(left, 7, 1), interval)
        tokens = read_right(right, make_reading(right, 10, 2), memory)
        tokens.square().sum().backward()
        gradients = {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in right.named_parameters()}
        found.append((tokens.detach(), {name: grad for name, grad in gradients.items() if grad is not None}))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


def test_a_skipped_layer_takes_keys_and_values_as_they_are() -> None:
    class Layer:
        keys = values = torch.zeros(1, 1, 2, 4)

    class Cache:
        layers = (Layer(), Layer())

    memory = LeftMemory(Cache(), torch.ones(1, 2, dtype=torch.bool), interval=1)
    own = torch.ones(1, 1, 3, 4)
    assert memory.update(own, own, 0)[0].shape == (1, 1, 5, 4)
    assert memory.update(own, own, 1)[0] is own


# --- the policy


@pytest.fixture
def world(make_toy: Callable[..., VecEnv]) -> tuple[EnvSpec, Observation]:
    env = make_toy(3)
    return env.spec, env.reset(range(3), range(3))


def test_the_brains_are_told_what_appendix_e_says(policy_on_meta: Callable[[str], Any]) -> None:
    spec = policy_on_meta("twinbrain_vla_4b").env_spec
    assert left_prompt().fill(spec, "lift the cup") == (
        "You are a helpful robot brain that can understand images and texts.",
        "\nInstruction: lift the cup",
    )
    assert right_prompt().fill(spec, "lift the cup") == (
        "You are a helpful robot brain that can understand images, texts, and robot states.\n"
        "You will be provided with observation, an instruction, and the robot state. "
        "Take action to execute the instruction.",
        "\nInstruction: lift the cup\nRobot Type: WidowX\n"
        "Predict the next action for the robot based on the observation, instruction and robot type.",
    )


def test_each_brain_reads_its_own_prompt_with_its_own_image(
    make_policy: Callable[..., Any], world: tuple[EnvSpec, Observation]
) -> None:
    spec, seen = world
    policy = make_policy("twinbrain_vla_toy", spec)
    batch = policy.collate(replace(seen, instruction=["reach the goal"] * 3))
    prompts = batch["per_token"]
    for ids, mask, robot in (
        (prompts["left_input_ids"], prompts["left_mask"], False),
        (batch["input_ids"], batch["mask"], True),
    ):
        text = policy.tokenizer.decode(ids[0][mask[0]])
        assert "Instruction: reach the goal" in text
        assert (f"Robot Type: {spec.robot}" in text) == robot
        assert (ids[0] == policy.vlm.config.image_token_id).sum() == 4


def test_the_left_prompts_length_follows_from_the_rights(
    make_policy: Callable[..., Any], world: tuple[EnvSpec, Observation]
) -> None:
    # Else two rows of one block could be padded to two lengths of the left, and their last bits depend on each other.
    spec, seen = world
    policy = make_policy("twinbrain_vla_toy", spec, "policy.expert.context_positions=0")
    shorter = set()
    for text in ("go", "reach the goal", "Ångström " * 3, "fly through the gap " * 12, "a b c d e f g"):
        batch = policy.collate(replace(seen.row(0), instruction=[text]))
        right, left = batch["mask"], batch["per_token", "left_mask"]
        assert right.shape[1] == policy.context_length(text)
        shorter.add(right.shape[1] - left.shape[1])
        expected = policy._lengths(text)
        assert (int(left.sum()), int(right.sum())) == expected
    assert len(shorter) == 1
    assert shorter.pop() % PAD_TO == 0


def test_a_prompt_beyond_the_heads_table_is_refused(
    make_policy: Callable[..., Policy], world: tuple[EnvSpec, Observation]
) -> None:
    policy = make_policy("twinbrain_vla_toy", world[0], "policy.expert.context_positions=24")
    with pytest.raises(ValueError, match=r"take \d+ tokens; policy.expert.context_positions allows 23"):
        policy.context_length("fly through the gap and then reach the goal, slowly")


def test_the_state_is_the_right_brains_last_token_and_the_head_sees_it_there_only(
    make_policy: Callable[..., Any], world: tuple[EnvSpec, Observation]
) -> None:
    spec, seen = world
    assert seen.state is not None
    policy = make_policy("twinbrain_vla_toy", spec)
    assert policy.expert.state_encoder is None
    with torch.no_grad():
        context = policy.encode(policy.collate(seen))
        other = policy.encode(policy.collate(replace(seen, state=seen.state + 1)))
    assert bool(context.mask[:, -1].all())
    prompt = context.mask.clone()
    prompt[:, -1] = False
    assert torch.equal(context.tokens[prompt], other.tokens[prompt])
    assert (context.tokens[:, -1] - other.tokens[:, -1]).abs().max() > 1e-3
    last = (context.position_ids[:, :, :-1] * prompt[:, None, :-1]).amax(dim=(1, 2))
    assert torch.equal(context.position_ids[:, :, -1], (last + 1)[:, None].expand(-1, 3))
    without = make_policy("twinbrain_vla_toy", spec, "policy.use_state=false")
    assert without.encode(without.collate(seen)).tokens.shape[1] == context.tokens.shape[1] - 1


def test_the_left_brain_matters_to_the_velocity_and_never_gets_a_gradient(
    make_policy: Callable[..., Any], world: tuple[EnvSpec, Observation]
) -> None:
    spec, seen = world
    policy = make_policy("twinbrain_vla_toy", spec)
    sample = torch.randn(3, policy.horizon, policy.channels, generator=torch.Generator().manual_seed(0))
    velocity = policy.velocity(policy.encode(policy.collate(seen)), sample, torch.full((3,), 0.5))
    velocity.square().sum().backward()
    assert all(p.requires_grad and p.grad is None for p in policy.parameter_groups()["left"])
    with torch.no_grad():
        policy.left.language_model.layers[0].self_attn.v_proj.weight.mul_(2)
        moved = policy.velocity(policy.encode(policy.collate(seen)), sample, torch.full((3,), 0.5))
    assert (moved - velocity).abs().max() > 1e-5


def test_both_brains_start_as_one(make_policy: Callable[..., Any], world: tuple[EnvSpec, Observation]) -> None:
    from rlvla.policies.base import context_is_fixed, trained_groups

    policy = make_policy("twinbrain_vla_toy", world[0])
    policy.initialize()
    right = policy.vlm.state_dict()
    assert all(torch.equal(tensor, right[name]) for name, tensor in policy.left.state_dict().items())
    assert policy.left.config is not policy.vlm.config
    assert trained_groups(policy, train_vlm=True) == ["expert", "vlm"]
    assert context_is_fixed(policy, train_vlm=False)
    assert not context_is_fixed(policy, train_vlm=True)


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_4b_policy_has_two_qwen3_vl_4b(policy_on_meta: Callable[[str], Any]) -> None:
    policy = policy_on_meta("twinbrain_vla_4b")
    assert count(policy.left) == count(policy.vlm) == 4_437_815_808
    assert count(policy.expert) == 160_677_383
    assert policy.state_encoder is None
    assert sum(p.numel() for p in policy.parameters()) == 2 * 4_437_815_808 + 160_677_383


def test_a_brain_without_keys_in_every_layer_is_refused() -> None:
    brain = BrainConfig(family=Family.qwen3_5, mrope_section=(3, 3, 2))
    with pytest.raises(ValueError, match="family is qwen3_5; TwinBrainVLA needs qwen3_vl"):
        TwinBrainVLAConfig(vlm=brain)


@pytest.mark.parametrize("interval", [-1, 4])
def test_an_interval_that_leaves_no_joint_layer_is_refused(interval: int) -> None:
    with pytest.raises(ValueError, match=f"interval is {interval}; it must be 0 or more and below num_hidden_layers"):
        TwinBrainVLAConfig(interval=interval)
