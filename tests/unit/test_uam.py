"""UAM: one attention over three experts, run one after another; its noise, its visual dynamics, its sizes."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from rlvla import collect, sft, train
from rlvla.acting import Actor, Thought
from rlvla.compose import compose
from rlvla.config import AlgoConfig, LearnerStrategy
from rlvla.dataset import Demonstrations
from rlvla.learner import Learner
from rlvla.memory import unallocated_policy
from rlvla.parallel import Split, hold, score
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.base import Context, ValueHead, context_is_fixed, pad_tokens
from rlvla.policies.joint import JointLayer, grid_positions, joint_mask
from rlvla.policies.latents import LatentConfig, PixelLatents
from rlvla.policies.processor import train_tokenizer
from rlvla.policies.prompted import prompts_for_tokenizer
from rlvla.policies.uam import UAM, DorsalConfig, SemanticConfig
from rlvla.ranks import ALONE, Group
from rlvla.rounds import Rounds, next_rows, recall, refer
from rlvla.samplers import Sampler, training_sampler
from rlvla.seeding import Stream, keyed_rng, normal
from rlvla.sft_examples import next_images
from rlvla_envs.base import EnvSpec, Observation, SuiteConfig
from rlvla_envs.suites import make_env
from tests.unit.test_ranks import done, on_two_ranks

SHORT, LONG = "reach the goal", "fly slowly and carefully through the gap, then turn and reach the green goal"


@cache
def toy_spec() -> EnvSpec:
    return make_env(SuiteConfig(name="toy", image_size=32, chunk_size=6), 1).spec


@cache
def tokenizer_of(spec: EnvSpec, size: int) -> Any:
    return train_tokenizer(prompts_for_tokenizer(spec, [SHORT]), size)


def build(*overrides: str, spec: EnvSpec | None = None) -> UAM:
    """An untrained toy policy in which nothing is zero, so that everything is seen."""
    spec = spec or toy_spec()
    config = compose("sft", ["dataset=none", "suite=toy", "policy=uam_toy", *overrides]).policy
    rng = np.random.default_rng(0)
    stats = ActionStats.of(
        rng.uniform(-1, 1, (50, spec.action_size)).astype(np.float32),
        rng.normal(size=(50, spec.state_size)).astype(np.float32),
    )
    torch.manual_seed(0)
    policy = UAM(config, spec, stats, tokenizer_of(spec, config.vlm.vocab_size))
    policy.initialize()
    with torch.no_grad():
        for parameter in policy.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return policy


@pytest.fixture
def policy() -> UAM:
    return build()


def seen(num_rows: int = 3, instructions: list[str] | None = None) -> Observation:
    observation = make_env(SuiteConfig(name="toy", image_size=32, chunk_size=6), num_rows).reset(
        range(num_rows), range(num_rows)
    )
    return observation if instructions is None else replace(observation, instruction=instructions)


def drawn(policy: UAM, num_rows: int, seed: int = 0) -> TensorDict:
    g = torch.Generator().manual_seed(seed)
    return TensorDict(
        {name: torch.randn(num_rows, *size, generator=g) for name, size in policy.context_noise().items()},
        batch_size=[num_rows],
    )


def batch_of(policy: UAM, observation: Observation, seed: int = 0) -> TensorDict:
    """With noise, and with the rows' images in another order as the next ones; the last row has no next."""
    batch = policy.collate(observation)
    batch["noise"] = drawn(policy, len(observation), seed)
    valid = torch.arange(len(observation)) < len(observation) - 1
    batch["next"] = TensorDict({"images": batch["images"].flip(0), "valid": valid}, batch_size=[len(observation)])
    return batch


def sampled(policy: UAM, num_rows: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    return torch.randn(num_rows, policy.horizon, policy.channels, generator=g), torch.rand(num_rows, generator=g)


def sampler_of(policy: UAM) -> Sampler:
    return training_sampler(policy, AlgoConfig(noise_level=0.5))


def decide(policy: UAM, num_rows: int = 4) -> Thought:
    rngs = [keyed_rng(0, Stream.ROLLOUT, 0, i) for i in range(num_rows)]
    return Actor(policy, block=4, device="cpu").decide(
        seen(num_rows), rngs, temperature=1.0, sampler=sampler_of(policy)
    )


def counted(modules: dict[str, nn.Module]) -> Counter[str]:
    """How often each is called from now on."""
    calls: Counter[str] = Counter()
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


# --- one attention


def test_the_mask_by_hand() -> None:
    # Prompt of two tokens, one latent seen, one foreseen, two actions; in the second row the second token is padding.
    route = torch.tensor([0, 0, 1, 2, 3, 3])
    valid = torch.tensor([[True] * 6, [True, False] + [True] * 4])
    expected = [
        [1, 0, 0, 0, 0, 0],  # the prompt is causal
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],  # what is seen does not know what is foreseen
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],  # actions see each other
        [1, 1, 1, 1, 1, 1],
    ]
    mask = joint_mask(route, valid)
    assert mask.shape == (2, 1, 6, 6)
    assert mask[0, 0].int().tolist() == expected
    assert mask[1, 0].int().tolist() == [[row[0], 0, *row[2:]] for row in expected]


@pytest.mark.parametrize("overrides", [[], ["policy.vlm.deepstack_visual_indexes=[0]"]], ids=["plain", "deepstack"])
def test_the_semantic_expert_is_transformers_model(overrides: list[str]) -> None:
    from transformers import Qwen3VLModel

    policy = build(*overrides)
    theirs = Qwen3VLModel(policy.vlm.config).eval()
    theirs.load_state_dict(policy.vlm.state_dict())
    assert not isinstance(theirs.language_model.layers[0], JointLayer)
    batch = policy.collate(seen(3, [SHORT, LONG, SHORT]))
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["mask"].long(),
        "mm_token_type_ids": batch["token_type"],
        "position_ids": batch["position_ids"].transpose(0, 1),
        **policy.image_inputs(theirs, batch),
    }
    with torch.no_grad():
        found = theirs(**inputs, use_cache=True)
        # It still is one: it can be asked questions, as `rlvla forgetting` does.
        assert torch.equal(policy.vlm(**inputs).last_hidden_state, found.last_hidden_state)
        context = policy.encode(batch)
    mask = batch["mask"]
    torch.testing.assert_close(context.tokens[mask], found.last_hidden_state[mask], atol=1e-5, rtol=1e-4)
    for index, layer in enumerate(found.past_key_values.layers):
        keys = context.per_token["semantic_keys"][:, :, index]
        torch.testing.assert_close(keys[mask], layer.keys.transpose(1, 2)[mask], atol=1e-5, rtol=1e-4)


def joint_pass(policy: UAM, batch: TensorDict, sample: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity and the velocity of the foreseen latents at pure noise, from one pass over all tokens: at each layer
    every token's expert makes its query, key and value, and one softmax is taken over all of them."""
    assert policy.dorsal is not None
    text, dorsal, expert = policy.vlm.language_model, policy.dorsal, policy.expert
    mask, rows, num = batch["mask"], len(batch), policy._num_latents
    x = text.embed_tokens(batch["input_ids"])
    image = policy.vlm.get_image_features(**policy.image_inputs(policy.vlm, batch), return_dict=True)
    x[batch["token_type"].bool()] = torch.cat(list(image.pooler_output))
    zero = torch.zeros(rows)
    latents = policy.latents(batch["images"].flatten(0, 1)).reshape(rows, num, -1)
    streams = [
        x,
        dorsal.embed(latents, zero, policy._grid),
        dorsal.embed(batch["noise", "dorsal"], zero + 1, policy._grid),
        expert.embed(batch["state"], sample * policy.action_mask(), tau),
    ]
    lengths = [stream.shape[1] for stream in streams]
    route = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    own = torch.cat([torch.ones(lengths[3] - policy.horizon, dtype=torch.bool), policy.action_mask().any(dim=-1)])
    valid = torch.cat([mask, torch.ones(rows, 2 * num, dtype=torch.bool), own.expand(rows, -1)], dim=1)
    attend = joint_mask(route, valid)

    # Behind the prompt two frames of a video, at one place in space; then what follows, on all three axes.
    first = (batch["position_ids"] * mask[:, None]).amax(dim=(1, 2)) + 1
    row, column = torch.arange(num) // 4, torch.arange(num) % 4
    frames = [torch.stack([torch.full((num,), t), row, column]) for t in (0, 1)]
    after = 4 + torch.arange(lengths[3]).expand(3, -1)
    behind = torch.cat([*frames, after], dim=1) + first[:, None, None]
    positions = torch.cat([batch["position_ids"], behind], dim=2)
    cos, sin = text.rotary_emb(x, positions.transpose(0, 1))

    def rotate(y: Tensor) -> Tensor:
        a, b = y.chunk(2, dim=-1)
        return y * cos[:, :, None] + torch.cat([-b, a], dim=-1) * sin[:, :, None]

    for layers in zip(text.layers, dorsal.layers, dorsal.layers, expert.layers, strict=True):
        parts: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        for stream, layer in zip(streams, layers, strict=True):
            h, a = layer.input_layernorm(stream), layer.self_attn
            parts["q"].append(a.q_norm(a.q_proj(h).unflatten(-1, (2, 32))))
            parts["k"].append(a.k_norm(a.k_proj(h).unflatten(-1, (1, 32))))
            parts["v"].append(a.v_proj(h).unflatten(-1, (1, 32)))
        q, k, v = (torch.cat(part, dim=1) for part in parts.values())
        scores = torch.einsum("blne,bmoe->bnlm", rotate(q), rotate(k)) / 32**0.5
        weight = torch.softmax(scores.masked_fill(~attend, -torch.inf), dim=-1)
        attended = torch.einsum("bnlm,bmoe->blne", weight, v).flatten(2)
        for i, (stream, layer, part) in enumerate(zip(streams, layers, attended.split(lengths, dim=1), strict=True)):
            stream = stream + layer.self_attn.o_proj(part)
            streams[i] = stream + layer.mlp(layer.post_attention_layernorm(stream))
    velocity = expert.action_out(expert.norm(streams[3][:, -policy.horizon :])) * policy.action_mask()
    return velocity, dorsal.latent_out(dorsal.norm(streams[2]))


def test_experts_one_after_another_equal_one_pass_over_all_tokens(policy: UAM) -> None:
    batch = batch_of(policy, seen(3, [SHORT, LONG, SHORT]))
    sample, tau = sampled(policy, 3)
    with torch.no_grad():
        velocity, foreseen = joint_pass(policy, batch, sample, tau)
        cached = policy.velocity(policy.encode(batch), sample, tau)
        torch.testing.assert_close(cached, velocity, atol=1e-5, rtol=1e-4)
        # The comparison has something to compare: either expert's keys and values matter.
        for name in ("semantic", "dorsal"):
            context = policy.encode(batch)
            held = context.per_token if name == "semantic" else context.per_row
            held = {key: tensor * 0 if key.startswith(name) else tensor for key, tensor in held.items()}
            without = replace(context, **{"per_token" if name == "semantic" else "per_row": held})
            assert (policy.velocity(without, sample, tau) - velocity).abs().max() > 1e-3
        # At pure noise the visual dynamics are those of the pass that the action expert reads.
        policy.config.dorsal.dynamics_time = type(policy.config.dorsal.dynamics_time).noise
        assert policy.dorsal is not None
        predicted: list[Tensor] = []
        policy.dorsal.latent_out.register_forward_hook(lambda _, __, velocity: predicted.append(velocity))
        loss = policy.auxiliary_losses(policy.encode(batch), batch)["dynamics"]
        torch.testing.assert_close(predicted[0], foreseen, atol=1e-6, rtol=1e-5)
        target = policy.latents(batch["next", "images"].flatten(0, 1)).reshape_as(foreseen)
        expected = (foreseen - (batch["noise", "dorsal"] - target)).square().mean(dim=(1, 2))
        torch.testing.assert_close(loss, expected * torch.tensor([1.0, 1.0, 0.0]), atol=1e-5, rtol=1e-4)


def test_a_decision_runs_the_semantic_and_the_dorsal_expert_once(policy: UAM) -> None:
    assert policy.dorsal is not None
    layers = (policy.vlm.language_model.layers, policy.dorsal.layers, policy.expert.layers)
    calls = counted(dict(zip(("semantic", "dorsal", "action"), (part[0] for part in layers), strict=True)))
    decide(policy)
    assert calls == {"semantic": 1, "dorsal": 1, "action": 4}


def test_keys_and_values_survive_storage_beside_a_longer_prompt(policy: UAM) -> None:
    sample, tau = sampled(policy, 2)
    with torch.no_grad():
        each = [policy.encode(batch_of(policy, seen(1, [text]))) for text in (SHORT, LONG)]
        together = Context.from_tensordict(torch.cat(pad_tokens([context.to_tensordict() for context in each])))
        velocity = policy.velocity(together, sample, tau)
        alone = [policy.velocity(context, sample[[i]], tau[[i]]) for i, context in enumerate(each)]
    torch.testing.assert_close(velocity, torch.cat(alone), atol=1e-5, rtol=1e-4)


# --- the noise belongs to the decision


def stored(thought: Thought) -> TensorDict:
    made = thought.decision.stored
    return TensorDict({"batch": thought.batch, **made}, batch_size=[len(made)])


def log_prob_of(policy: UAM, data: TensorDict) -> Tensor:
    return score(policy, data, sampler_of(policy)).likelihood.log_prob


def test_the_noise_is_drawn_after_the_samplers_and_kept_with_the_decision(policy: UAM) -> None:
    thought = decide(policy, 3)
    for row in range(3):
        rng = keyed_rng(0, Stream.ROLLOUT, 0, row)
        start = torch.from_numpy(normal(rng, 8, 2)) * policy.action_mask()
        step = int(rng.integers(4))
        normal(rng, 8, 2)
        assert torch.equal(thought.batch["noise", "dorsal"][row], torch.from_numpy(normal(rng, 16, 48)))
        assert torch.equal(thought.batch["noise", "dynamics_time"][row], torch.from_numpy(normal(rng, 1)))
        assert thought.decision.stored["step"][row] == step
        if step == 0:
            assert torch.equal(thought.decision.stored["before"][row], start)
    assert len(thought.batch["noise"]) == 3


def test_the_ratio_is_1_because_the_noise_is_reused_and_another_noise_gives_another(policy: UAM) -> None:
    thought = decide(policy)
    data, mask = stored(thought), policy.action_mask()
    with torch.no_grad():
        same = log_prob_of(policy, data)
        torch.testing.assert_close(same * mask, thought.decision.stored["log_prob"] * mask, atol=1e-4, rtol=1e-4)
        data["batch", "noise"] = drawn(policy, 4, seed=5)
        other = log_prob_of(policy, data)
        data["batch"] = data["batch"].exclude("noise")
        none = log_prob_of(policy, data)
    for scored in (other, none):
        assert ((scored - thought.decision.stored["log_prob"]) * mask).abs().amax(dim=(1, 2)).min() > 1e-3


def test_the_value_does_not_depend_on_the_noise(policy: UAM) -> None:
    observation = seen(3)
    with torch.no_grad():
        features = [policy.value_features(policy.encode(batch_of(policy, observation, seed=seed))) for seed in (0, 1)]
        without = policy.value_features(Actor(policy, block=3, device="cpu").encode(observation))
    torch.testing.assert_close(features[0], features[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(features[0], without, atol=1e-6, rtol=1e-5)
    # Both visual pathways are in it: of the prompt's tokens, of the latents seen, and the state.
    assert without.shape == (3, 64 + 64 + toy_spec().state_size)
    assert without[:, 64:128].std(dim=0).max() > 1e-3


def test_temperature_0_leaves_no_noise_in_a_context(policy: UAM) -> None:
    rngs = [keyed_rng(0, Stream.EVALUATION, 0, i) for i in range(2)]
    thought = Actor(policy, block=2, device="cpu").decide(seen(2), rngs, temperature=0.0)
    assert not thought.batch["noise", "dorsal"].any()


# --- where the dorsal expert starts (table 1)


def layers_of(policy: UAM) -> dict[str, Tensor]:
    assert policy.dorsal is not None
    return policy.dorsal.layers.state_dict()


def test_the_dorsal_expert_starts_as_a_copy_of_the_semantic_one_or_at_random() -> None:
    copied, random = build("policy.dorsal.init=semantic"), build("policy.dorsal.init=random")
    theirs = copied.vlm.language_model.layers.state_dict()
    assert layers_of(copied).keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in layers_of(copied).items())
    # A copy: training one leaves the other.
    with torch.no_grad():
        copied.vlm.language_model.layers[0].mlp.up_proj.weight.zero_()
    assert layers_of(copied)["0.mlp.up_proj.weight"].any()
    started = random.vlm.language_model.layers.state_dict()
    assert not [
        name for name, tensor in layers_of(random).items() if "proj" in name and torch.equal(tensor, started[name])
    ]


def test_without_a_dorsal_expert_there_are_two_and_nothing_of_it() -> None:
    policy = build("policy.dorsal.init=none")
    assert policy.dorsal is None
    assert set(policy.parameter_groups()) == {"vlm", "expert"}
    assert (policy.context_noise(), dict(policy.auxiliary_weights)) == ({}, {})
    assert policy.context_groups == {"vlm"}
    assert policy.value_size == 64 + toy_spec().state_size
    thought = decide(policy)
    assert "noise" not in thought.batch
    assert not thought.context.per_row
    # With a frozen VLM its contexts never change; with a dorsal expert that is trained they do.
    assert context_is_fixed(policy, train_vlm=False)
    assert not context_is_fixed(build(), train_vlm=False)


def test_an_update_with_both_frozen_runs_the_action_expert_alone() -> None:
    policy = build("policy.dorsal.frozen=true")
    assert policy.dorsal is not None
    assert policy.frozen_groups == {"dorsal"}
    assert context_is_fixed(policy, train_vlm=False)
    thought = decide(policy)
    data = stored(thought)
    data["context"] = thought.context.to_tensordict()
    calls = counted(
        {
            "semantic": policy.vlm.language_model.layers[0],
            "dorsal": policy.dorsal.layers[0],
            "action": policy.expert.layers[0],
        }
    )
    found = log_prob_of(policy, data)
    assert calls == {"action": 1}
    torch.testing.assert_close(found, log_prob_of(policy, data.exclude("context")), atol=1e-5, rtol=1e-5)


# --- latents


def test_latents_by_hand() -> None:
    # 4 x 4 pixels, patches of 2 x 2: red counts 0 to 15 times 17 and is -1 at 0, 1 at 255.
    image = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    image[0, :, :, 0] = 17 * torch.arange(16).reshape(4, 4)
    whole = PixelLatents(LatentConfig(stride=2, pool=1))
    latents = whole(image)
    assert (latents.shape, whole.channels) == ((1, 4, 12), 12)
    red = latents[0, :, :4] * 7.5 + 7.5
    torch.testing.assert_close(red[0], torch.tensor([0.0, 1, 4, 5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(red[1], torch.tensor([2.0, 3, 6, 7]), atol=1e-5, rtol=0)
    assert bool((latents[0, :, 4:] == -1).all())
    # Averaged first: one pixel to a patch, of 0, 1, 4 and 5.
    pooled = PixelLatents(LatentConfig(stride=2, pool=2))(image)
    assert pooled.shape == (1, 4, 3)
    assert pooled[0, 0, 0] * 7.5 + 7.5 == pytest.approx(2.5)


def test_the_table_of_places_tells_every_place_apart() -> None:
    table = grid_positions(4, 4, 64)
    assert table.shape == (16, 64)
    # Row 0, column 0: the sines of nothing are 0, the cosines 1.
    assert table[0].tolist() == ([0.0] * 16 + [1.0] * 16) * 2
    assert table[5, 0].item() == pytest.approx(np.sin(1))
    assert torch.cdist(table, table).add(torch.eye(16) * 9).min() > 0.5


def test_what_is_foreseen_is_where_it_was_seen_and_a_step_of_time_later(policy: UAM) -> None:
    places = policy._places
    assert places.shape == (3, 32)
    assert torch.equal(places[1:, 16:], places[1:, :16])
    assert (places[0, :16].tolist(), places[0, 16:].tolist()) == ([0] * 16, [1] * 16)
    assert places[1:, :6].tolist() == [[0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 0, 1]]
    two = toy_spec()
    two = replace(two, cameras=(*two.cameras, replace(two.cameras[0], name="wrist")))
    # The second camera begins behind the first.
    second = build(spec=two)._places
    assert second.shape == (3, 64)
    assert second[:, 16].tolist() == [4, 4, 4]


# --- visual dynamics


def test_an_expert_that_predicts_nothing_pays_the_difference_of_noise_and_image(policy: UAM) -> None:
    assert policy.dorsal is not None
    nn.init.zeros_(policy.dorsal.latent_out.weight)
    nn.init.zeros_(policy.dorsal.latent_out.bias)
    batch = batch_of(policy, seen(3))
    loss = policy.auxiliary_losses(policy.encode(batch), batch)
    latents = policy.latents(batch["images"].flatten(0, 1)).flip(0)
    expected = (batch["noise", "dorsal"] - latents).square().mean(dim=(1, 2))
    assert loss.keys() == {"dynamics"}
    torch.testing.assert_close(loss["dynamics"], expected * torch.tensor([1.0, 1.0, 0.0]))


def test_the_dynamics_train_both_visual_experts_and_not_the_action_expert(policy: UAM) -> None:
    assert policy.dorsal is not None
    batch = batch_of(policy, seen(3))
    policy.auxiliary_losses(policy.encode(batch), batch)["dynamics"].sum().backward()
    moved = {name for name, group in policy.parameter_groups().items() if any(p.grad is not None for p in group)}
    assert moved == {"vlm", "dorsal"}
    assert all(p.grad is not None and p.grad.any() for p in policy.dorsal.parameters())


def test_the_flow_time_of_the_dynamics_is_drawn_with_the_decision(policy: UAM) -> None:
    batch = batch_of(policy, seen(3))
    with torch.no_grad():
        context = policy.encode(batch)
        reference = policy.auxiliary_losses(context, batch)["dynamics"]
        batch["noise", "dynamics_time"] = batch["noise", "dynamics_time"] + 1
        later = policy.auxiliary_losses(context, batch)["dynamics"]
    assert (later - reference)[:2].abs().min() > 1e-4


def demonstrations(lengths: list[int]) -> Demonstrations:
    total = sum(lengths)
    ends = np.cumsum(lengths)
    image = np.arange(total, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    return Demonstrations(
        images={toy_spec().cameras[0].name: image},
        state=np.zeros((total, toy_spec().state_size), np.float32),
        action=np.zeros((total, 2), np.float32),
        tasks=(SHORT,),
        task_index=np.zeros(total, np.int64),
        episode_start=ends - lengths,
        episode_end=ends,
        fps=10.0,
        robot_type=None,
        action_names=("x", "y"),
    )


def test_the_next_image_of_a_demonstration_is_a_chunk_later_and_in_the_same_episode(policy: UAM) -> None:
    # Episodes of 8 and 7 frames, chunks of 6: frames 0 and 1 are followed by 6 and 7, frame 8 by 14.
    found = next_images(policy, demonstrations([8, 7]), np.array([0, 1, 2, 7, 8, 9]))
    assert found["valid"].tolist() == [True, True, False, False, True, False]
    assert found["images"].shape == (6, 1, 32, 32, 3)
    assert found["images"][:, 0, 0, 0, 0][found["valid"]].tolist() == [6, 7, 14]


def test_the_next_decision_of_a_rollout_by_hand() -> None:
    valid = torch.tensor([[True, True, False], [True, True, True], [True, False, False], [True, False, True]])
    # Numbered by rounds, in which episodes advance side by side. What comes after a gap does not follow.
    row = torch.tensor([[0, 4, 0], [1, 5, 6], [2, 0, 0], [3, 0, 7]])
    assert next_rows(row, valid)[valid].tolist() == [4, -1, 5, 6, -1, -1, -1, -1]


def rollout_of(policy: UAM) -> TensorDict:
    """Two episodes of two decisions, as `rlvla.rollout.collect` would store them."""
    thought = decide(policy)
    data = stored(thought)
    data["advantage"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    data["value_target"], data["state_value"] = torch.zeros(4), torch.zeros(4)
    data["mask"] = policy.action_mask().expand(4, -1, -1).clone()
    data["next"] = TensorDict({"success": torch.tensor([False, True, False, False])}, batch_size=[4])
    rollout: TensorDict = data.exclude("batch").reshape(2, 2)
    refer(rollout, Rounds([data.select("batch")]), torch.arange(4).reshape(2, 2))
    rollout["valid"] = torch.ones(2, 2, dtype=torch.bool)
    return rollout


def learner_of(policy: UAM, **changes: Any) -> Learner:
    config = AlgoConfig(**{"critic_only_iterations": 0, "min_successes": 0, "epochs": 2, **changes})
    torch.manual_seed(0)
    return Learner(policy, ValueHead(policy.value_size), config, sampler_of(policy), seed=0, total_iterations=1)


def test_an_update_with_the_auxiliary_loss_trains_what_predicts_the_next_image() -> None:
    moved = {}
    for weight in (0.0, 2.0):
        policy = build()
        assert policy.dorsal is not None
        before = policy.dorsal.latent_out.weight.detach().clone()
        metrics = learner_of(policy, auxiliary_weight=weight).update(rollout_of(policy), 0)
        moved[weight] = not torch.equal(policy.dorsal.latent_out.weight, before)
        assert ("loss/auxiliary" in metrics) == (weight > 0)
    assert moved == {0.0: False, 2.0: True}


def test_the_auxiliary_loss_of_an_update_is_the_mean_over_decisions(policy: UAM) -> None:
    rollout = rollout_of(policy)
    batch = recall(rollout.reshape(4))["batch"]
    # Decisions 1 and 3 end an episode.
    batch["next"] = TensorDict(
        {"images": batch["images"][[1, 1, 3, 3]], "valid": torch.tensor([True, False, True, False])}, batch_size=[4]
    )
    with torch.no_grad():
        expected = policy.auxiliary_losses(policy.encode(batch), batch)["dynamics"].sum() / 4
    # One epoch, one minibatch, so that the weights are still those.
    metrics = learner_of(policy, auxiliary_weight=1.0, epochs=1).update(rollout, 0)
    weight = policy.config.dorsal.dynamics_weight
    assert metrics["loss/auxiliary"] == pytest.approx(weight * float(expected), rel=1e-4)


@pytest.mark.parametrize(
    "overrides", [["policy.dorsal.init=none"], ["policy.dorsal.dynamics_weight=0"], ["policy.dorsal.frozen=true"]]
)
def test_an_auxiliary_loss_that_would_train_nothing_is_refused_at_the_door(overrides: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"auxiliary_weight is 0.5, and this policy has no auxiliary loss.*Set it to 0"
    ):
        learner_of(build(*overrides), auxiliary_weight=0.5)


@pytest.mark.slow
def test_sft_and_training_learn_the_dynamics_through_their_verbs(tmp_path: Path) -> None:
    toy = ["suite=toy", "workers.kind=local", "workers.num_actors=1", "workers.envs_per_actor=4"]
    collect.run(compose("collect", [*toy, f"output={tmp_path / 'data'}", "episodes=6"]))
    wanted = ["policy=uam_toy", f"dataset={tmp_path / 'data'}", f"output={tmp_path / 'sft'}"]
    sft.run(compose("sft", ["suite=toy", *wanted, "steps=60", "batch_size=8", "noise_draws=1"]))
    losses = [row["loss/auxiliary"] for row in rows_of(tmp_path / "sft") if row["kind"] == "sft"]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    quick = ["iterations=1", "episodes_per_iteration=8", "algo.critic_only_iterations=0", "algo.min_successes=0"]
    quick += ["eval.trials=2", "eval.videos=0", "eval.shuffled_images=false", "algo.auxiliary_weight=1"]
    train.run(compose("train", [*toy, *quick, f"policy={tmp_path / 'sft/policy'}", f"output={tmp_path / 'ppo'}"]))
    (row,) = [row for row in rows_of(tmp_path / "ppo") if row["kind"] == "iteration"]
    assert 0 < row["loss/auxiliary"] < 1
    assert row["ppo/ratio_error"] < 1e-4


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- split over learners


def gradients(group: Group) -> dict[str, Tensor]:
    """Of a loss of everything, with all ranks at the same rows."""
    policy = build()
    data = stored(decide(policy))
    data["batch", "next"] = batch_of(policy, seen(4))["next"]
    held = hold(policy, group, LearnerStrategy.fsdp)
    scored = held.score(data, sampler_of(policy))
    (scored.likelihood.log_prob.sum() + scored.auxiliary.sum()).backward()
    if isinstance(held, Split):
        named = held._twin.named_parameters()  # type: ignore[attr-defined]
        return {name: p.grad.full_tensor() for name, p in named if p.grad is not None}
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_two_learners_that_split_the_policy_have_the_gradients_of_one(tmp_path: Path) -> None:
    # Keys and values of a last layer are read by others and nothing else of it is: FSDP must still gather its weights.
    alone = gradients(ALONE)
    for found in done(on_two_ranks(tmp_path / "run", gradients)):
        nonzero = {name for name, gradient in found.items() if gradient.any()}
        assert nonzero == {name for name, gradient in alone.items() if gradient.any()}
        for name in nonzero:
            torch.testing.assert_close(
                found[name], alone[name], atol=1e-4, rtol=1e-3, msg=lambda t, n=name: f"{n}: {t}"
            )
    assert "vlm.language_model.layers.1.self_attn.k_proj.weight" in alone
    assert "vlm.language_model.layers.1.self_attn.q_proj.weight" not in alone


# --- sizes


def test_the_7b_policy_has_the_papers_counts() -> None:
    spec = replace(toy_spec(), cameras=(replace(toy_spec().cameras[0], height=336, width=448),))
    with torch.device("meta"):
        config = compose("sft", ["dataset=none", "policy=uam_7b"]).policy
        stats = ActionStats.of(np.zeros((2, spec.action_size), np.float32), np.zeros((2, spec.state_size), np.float32))
        policy = UAM(config, spec, stats, tokenizer_of(spec, 400))

    def billions(*modules: nn.Module) -> float:
        return sum(p.numel() for module in modules for p in module.parameters()) / 1e9

    assert policy.dorsal is not None
    text = policy.vlm.language_model
    # Qwen2.5-7B: 6.53 B in 28 layers and 0.54 B of embeddings (its head, another 0.54 B, is no part of a policy).
    assert billions(*text.layers) == pytest.approx(6.525, abs=0.005)
    assert billions(text.embed_tokens) == pytest.approx(0.545, abs=0.001)
    # SigLIP2-so400m, and what merges its patches.
    assert billions(policy.vlm.visual) == pytest.approx(0.45, abs=0.02)
    # Table 4: 7 B + 7 B + 2 B.
    assert round(billions(policy.vlm)) == 8 or round(billions(text)) == 7
    assert round(billions(policy.dorsal)) == 7
    assert round(billions(policy.expert)) == 2
    # Appendix E: 192 latents of an image of 192 x 256.
    assert PixelLatents(config.latents)(torch.zeros(1, 192, 256, 3, dtype=torch.uint8)).shape[1] == 192


def test_the_doctor_says_that_it_cannot_plan_a_uam_policy() -> None:
    config = compose("doctor", ["policy=uam_7b", "suite=toy"])
    with pytest.raises(ValueError, match=r"policy.name is 'uam'; rlvla doctor plans the memory of qwen_vla alone"):
        unallocated_policy(config, None)


# --- what does not fit


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SemanticConfig(mrope_section=(6, 5, 4)), r"mrope_section is \[6, 5, 4\]; .* half of .* 16"),
        (lambda: SemanticConfig(num_attention_heads=3, num_key_value_heads=2), "which 2 key-value heads do not divide"),
        (lambda: DorsalConfig(dynamics_weight=-1.0), r"dynamics_weight is -1.0; it must be 0 or more"),
        (lambda: LatentConfig(stride=8, pool=3), r"stride is 8 and pool is 3; .* pool must divide stride"),
        (lambda: LatentConfig(name="vae"), r"latents.name is 'vae'; it must be one of pixels"),
        (
            lambda: build("policy.latents.stride=12"),
            r"camera .* 32 x 32, which policy.latents.stride 12 does",
        ),
        (lambda: build("policy.num_denoising_steps=0"), r"num_denoising_steps is 0; it must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_image_tokenizer_with_weights_is_stored_with_the_policy_and_never_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rlvla.policies.latents import IMAGE_TOKENIZERS

    class Projected(PixelLatents):
        def __init__(self, config: LatentConfig) -> None:
            super().__init__(config)
            self.mix = nn.Linear(self.channels, 5)
            self.channels = 5

        def forward(self, images: Tensor) -> Tensor:
            mixed: Tensor = self.mix(super().forward(images))
            return mixed

    monkeypatch.setitem(IMAGE_TOKENIZERS, "projected", Projected)
    policy = build("policy.latents.name=projected")
    assert "latents.mix.weight" in policy.state_dict()
    assert policy.frozen_groups == {"latents"}
    assert policy.context_noise()["dorsal"] == (16, 5)
    batch = batch_of(policy, seen(2))
    policy.auxiliary_losses(policy.encode(batch), batch)["dynamics"].sum().backward()
    assert all(p.grad is None for p in policy.latents.parameters())
