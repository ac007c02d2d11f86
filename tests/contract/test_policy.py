"""What every policy promises. A new one adds its configuration to POLICIES and runs this file first."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from torch import Tensor, nn

from rlvla.acting import Actor, Thought
from rlvla.config import AlgoConfig, ComputeConfig, LoraConfig, Precision
from rlvla.learner import Learner
from rlvla.policies.base import Context, ValueHead, has_distribution, trained_groups
from rlvla.policies.folder import FILES, load_policy, save_policy
from rlvla.policies.groups import require_gradients
from rlvla.policies.lora import adapted, add_lora
from rlvla.policies.numerics import set_up
from rlvla.policies.policy import Policy, PolicyWithFlow
from rlvla.policies.prompted import PromptedPolicy
from rlvla.rounds import Rounds, refer
from rlvla.samplers import Sampler, training_sampler
from rlvla.seeding import Stream, keyed_rng
from rlvla_envs.base import ActionComponent, EnvSpec, Observation, VecEnv

POLICIES = [
    "qwen_vla_tiny",
    "qwen_vla_toy",
    "vlm4vla_toy",
    "uam_toy",
    "pi0_toy",
    "pi05_toy",
    "smolvla_toy",
    "qwen_gr00t_toy",
    "qwen_oft_toy",
    "qwen_pi_toy",
    "twinbrain_vla_toy",
]
"""Names under configs/policy that fit a test. The toy has K = 2 = action channels, the tiny one pads to 8."""

LAST_LAYER = r"layers\.1\.(self_attn\.(q|o)_(proj|norm)|mlp\..*|post_attention_layernorm)\.weight"
RESTING = {
    # Positions past the end of this prompt.
    "qwen_vla": r"expert\.positions",
    # Of a last layer the action expert reads keys and values; what follows them leads to the value, which has no
    # gradient, and to the visual dynamics, which is another loss.
    "uam": rf"(vlm\.language_model|dorsal)\.({LAST_LAYER}|norm\.weight)|dorsal\.latent_out\..*",
}
"""By architecture: parameters that the policy loss alone need not reach. Of others all must be reached."""

SHORT, LONG = "reach the goal", "fly slowly and carefully through the gap, then turn and reach the green goal"
NOISE_LEVEL = 0.5


@pytest.fixture(scope="module")
def spec() -> EnvSpec:
    from rlvla_envs.base import SuiteConfig
    from rlvla_envs.suites import make_env

    # A chunk of 6 where every policy pads to H = 8.
    return make_env(SuiteConfig(name="toy", image_size=32, chunk_size=6), 1).spec


AS_IMPORTED = "pi0_toy policy.denoise_padding=true policy.store_prefix=false policy.expert.channels=8"
"""As checkpoints of other projects are run: noise in the padding too, and contexts that are made again."""


@pytest.fixture(params=[*POLICIES, pytest.param(AS_IMPORTED, id="pi0_toy-as-imported")])
def policy(request: pytest.FixtureRequest, make_policy: Callable[..., Policy], spec: EnvSpec) -> Policy:
    name, *options = request.param.split()
    return make_policy(name, spec, *options)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As `Actor` does: the bits of a matrix product depend on the number of threads too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def observe(make_toy: Callable[..., VecEnv]) -> Callable[..., Observation]:
    """Observations of held-back toy states: ``observe(rows, instructions)``."""

    def make(num_rows: int = 5, instructions: list[str] | None = None) -> Observation:
        seen = make_toy(num_rows, chunk_size=6).reset(range(num_rows), range(num_rows))
        return seen if instructions is None else replace(seen, instruction=instructions)

    return make


def rngs(num_rows: int, first: int = 0) -> list[np.random.Generator]:
    return [keyed_rng(0, Stream.ROLLOUT, 0, first + i) for i in range(num_rows)]


def sampler_of(policy: Policy) -> Sampler:
    return training_sampler(policy, AlgoConfig(noise_level=NOISE_LEVEL))


def decide(policy: Policy, observation: Observation, block: int = 4, first: int = 0) -> Thought:
    actor = Actor(policy, block=block, device="cpu")
    return actor.decide(observation, rngs(len(observation), first), temperature=1.0, sampler=sampler_of(policy))


def stored_of(thought: Thought, *, store_context: bool = True) -> TensorDict:
    """A decision as a rollout stores it, every entry executed."""
    made = thought.decision.stored
    source = {"context": thought.context.to_tensordict()} if store_context else {"batch": thought.batch}
    mask = torch.ones_like(made["log_prob"], dtype=torch.bool)
    return TensorDict({**source, **made, "mask": mask}, batch_size=[len(made)])


def draws(policy: Policy, num_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A noisy sample [B H K] and flow times [B]."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(num_rows, policy.horizon, policy.channels, generator=generator),
        torch.rand(num_rows, generator=generator),
    )


def decoded(policy: Any, context: Context, sample: Tensor, tau: Tensor) -> Tensor:
    """What the decoder says [B H K]: the velocity at ``sample`` and ``tau``, or the location of the distribution."""
    if has_distribution(policy):
        return policy.distribution(context).location
    found: Tensor = policy.velocity(context, sample, tau)
    return found


@torch.no_grad()
def decoded_of(policy: Policy, observation: Observation, seed: int = 0) -> Tensor:
    sample, tau = draws(policy, len(observation), seed)
    return decoded(policy, policy.encode(policy.collate(observation)), sample, tau)


def rows_of(context: Context, rows: slice) -> Context:
    return Context.from_tensordict(context.to_tensordict()[rows])


def learner_for(policy: Policy, **changes: Any) -> Learner:
    config = AlgoConfig(noise_level=NOISE_LEVEL, **changes)
    return Learner(policy, ValueHead(policy.value_size), config, sampler_of(policy), seed=0, total_iterations=1)


def in_rounds(stored: TensorDict) -> TensorDict:
    """Decisions as a rollout has them."""
    decisions: TensorDict = stored.exclude("context", "batch")
    refer(decisions, Rounds([stored.select("context", "batch", strict=False)]), torch.arange(len(stored)))
    return decisions


# --- old and new log-probability


@pytest.mark.parametrize("store_context", [True, False])
def test_the_learner_scores_the_rollouts_decision_as_the_sampler_did(
    policy: Policy, observe: Callable[..., Observation], store_context: bool
) -> None:
    stored = stored_of(decide(policy, observe(5)), store_context=store_context)
    learner = learner_for(policy, train_vlm=not store_context)
    with torch.no_grad():
        scored = learner.forward(in_rounds(stored))
    mask = policy.action_mask()
    assert (learner.sampler.gap(scored.likelihood.parameters, stored) * mask).max() < 1e-4
    assert learner.sampler.kl(scored.likelihood.parameters, stored).max() < 1e-6
    torch.testing.assert_close(scored.log_prob * mask, stored["log_prob"] * mask, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(scored.value).all()


def test_another_weight_means_another_log_prob(policy: Policy, observe: Callable[..., Observation]) -> None:
    # The power of the test above: a learner with other weights is seen.
    thought, sampler = decide(policy, observe(5)), sampler_of(policy)
    stored = stored_of(thought)
    with torch.no_grad():
        for parameter in policy.parameter_groups()["expert"]:
            parameter *= 1.1
        scored = sampler.score(policy, thought.context, stored)
    mask = policy.action_mask()
    assert (sampler.gap(scored.parameters, stored) * mask).max() > 1e-3
    assert ((scored.log_prob - stored["log_prob"]).abs() * mask).max() > 1e-3
    assert sampler.kl(scored.parameters, stored).min() > 1e-6


def test_the_proximal_distribution_becomes_the_one_that_kl_is_measured_from(
    policy: Policy, observe: Callable[..., Observation]
) -> None:
    thought, sampler = decide(policy, observe(3)), sampler_of(policy)
    stored = stored_of(thought)
    with torch.no_grad():
        for parameter in policy.parameter_groups()["expert"]:
            parameter *= 1.1
        scored = sampler.score(policy, thought.context, stored)
    sampler.recentre(stored, scored.parameters)
    assert sampler.kl(scored.parameters, stored).abs().max() < 1e-6


def test_the_kl_target_falls_linearly_to_its_last_value(policy: Policy) -> None:
    learner = learner_for(policy, target_kl=0.1, final_target_kl=0.02)
    learner.total_iterations = 5
    assert [learner.target_kl(i) for i in range(6)] == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0.02])
    assert learner_for(policy, target_kl=0.1).target_kl(7) == 0.1


# --- rows do not see each other


def test_a_row_alone_equals_the_row_in_a_batch(policy: Policy, observe: Callable[..., Observation]) -> None:
    seen = observe(5)
    sample, tau = draws(policy, 5)
    with torch.no_grad():
        together = policy.encode(policy.collate(seen))
        velocity = decoded(policy, together, sample, tau)
        for i in range(5):
            alone = policy.encode(policy.collate(seen.row(i)))
            torch.testing.assert_close(alone.tokens, together.tokens[[i]], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(alone.pooled, together.pooled[[i]], atol=1e-4, rtol=1e-4)
            single = decoded(policy, alone, sample[[i]], tau[[i]])
            torch.testing.assert_close(single, velocity[[i]], atol=1e-4, rtol=1e-4)


def test_in_blocks_of_one_size_a_decision_has_the_same_bits_in_any_company(
    policy: Policy, observe: Callable[..., Observation]
) -> None:
    seen = observe(7)
    # 7 rows are blocks of 4 and 3 (padded to 4); rows 2 and 5 then share a block of their own.
    everybody = decide(policy, seen).decision
    actor = Actor(policy, block=4, device="cpu")
    generators = rngs(7)
    pair = actor.decide(
        seen.take([5, 2]), [generators[5], generators[2]], temperature=1.0, sampler=sampler_of(policy)
    ).decision
    assert np.array_equal(everybody.action[[5, 2]], pair.action)
    for name, theirs in everybody.stored.items(include_nested=True, leaves_only=True):
        assert torch.equal(theirs[[5, 2]], pair.stored[name]), name


def test_prompts_of_different_length_share_a_batch(policy: Policy, observe: Callable[..., Observation]) -> None:
    seen = observe(3, [SHORT, LONG, SHORT])
    assert len({len(policy.collate(seen.row(i))["input_ids"][0]) for i in range(3)}) == 2
    sample, tau = draws(policy, 3)
    with torch.no_grad():
        together = policy.encode(policy.collate(seen))
        # More than two where the state is part of the prompt.
        assert policy.collate(seen)["mask"].sum(dim=1).unique().numel() >= 2
        velocity = decoded(policy, together, sample, tau)
        for i in range(3):
            alone = policy.encode(policy.collate(seen.row(i)))
            torch.testing.assert_close(alone.pooled, together.pooled[[i]], atol=1e-4, rtol=1e-4)
            single = decoded(policy, alone, sample[[i]], tau[[i]])
            torch.testing.assert_close(single, velocity[[i]], atol=1e-4, rtol=1e-4)


def test_a_context_survives_storage_and_repetition(policy: Policy, observe: Callable[..., Observation]) -> None:
    seen = observe(2, [SHORT, LONG])
    sample, tau = draws(policy, 4)
    with torch.no_grad():
        context = policy.encode(policy.collate(seen))
        stored = Context.from_tensordict(context.to_tensordict())
        once = (sample[:2], tau[:2])
        assert torch.equal(decoded(policy, stored, *once), decoded(policy, context, *once))
        # A block of rows 0, 1 and again 0, 1.
        repeated = decoded(policy, context.repeat(2), sample, tau)
        twice = torch.cat([decoded(policy, context, sample[i : i + 2], tau[i : i + 2]) for i in (0, 2)])
    assert len(context.repeat(2)) == 4
    torch.testing.assert_close(repeated, twice, atol=1e-4, rtol=1e-4)


def test_a_decision_has_the_same_bits_beside_a_longer_prompt(
    policy: Policy, observe: Callable[..., Observation]
) -> None:
    among_equals = decide(policy, observe(4, [SHORT] * 4)).decision
    beside_longer = decide(policy, observe(4, [SHORT, LONG, SHORT, SHORT])).decision
    assert torch.equal(among_equals.stored["log_prob"][0], beside_longer.stored["log_prob"][0])
    assert np.array_equal(among_equals.action[0], beside_longer.action[0])


def test_the_backbone_finds_every_image_token_it_is_told_of(
    policy: Policy, observe: Callable[..., Observation]
) -> None:
    if not isinstance(policy, PromptedPolicy):
        pytest.skip("reads images without tokens in a prompt")
    batch = policy.collate(observe(2))
    image = policy.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert policy.vlm.config.image_token_id == image
    # 32 x 32 pixels in merged patches of 2 x 8: 2 x 2 tokens.
    assert (batch["input_ids"] == image).sum(dim=1).tolist() == [4, 4]
    assert torch.equal(batch["token_type"].bool(), batch["input_ids"] == image)
    assert batch["images"].dtype == torch.uint8


def test_the_images_of_a_batch_are_the_suites_own_in_the_order_that_is_said(
    policy: Policy, observe: Callable[..., Observation]
) -> None:
    seen = observe(3)
    assert sorted(policy.camera_order()) == sorted(camera.name for camera in policy.env_spec.cameras)
    # A rollout keeps the suite's arrays, and an update reads them instead of the batch.
    assert np.array_equal(policy.collate(seen)["images"].numpy(), seen.views(policy.camera_order()))


# --- padding


def test_no_token_of_a_context_is_forgotten_before_it_is_encoded(
    policy: Policy, observe: Callable[..., Observation]
) -> None:
    batch = policy.collate(observe(2))
    with torch.no_grad():
        context = policy.encode(batch).to_tensordict()
    before = policy.encoded_tokens(TensorDict({"batch": batch}, batch_size=[2]))
    after = policy.encoded_tokens(TensorDict({"context": context}, batch_size=[2]))
    assert after >= context["mask"].shape[-1]
    # Images count although some prompts do not name them. A state's token may be the context's or the chunk's.
    assert before >= after - 1


def test_padded_entries_mean_nothing(policy: Policy, observe: Callable[..., Observation]) -> None:
    mask = policy.action_mask()
    assert mask.shape == (policy.horizon, policy.channels)
    assert mask.sum() == 6 * 2
    assert bool(mask[:6, :2].all())
    if getattr(policy.config, "denoise_padding", False):
        pytest.skip("denoises its padding, as it was trained; what is executed alone is scored")
    sample, tau = draws(policy, 3)
    with torch.no_grad():
        context = policy.encode(policy.collate(observe(3)))
        velocity = decoded(policy, context, sample, tau)
        garbage = decoded(policy, context, torch.where(mask, sample, 1e3), tau)
    assert torch.equal(velocity, garbage)
    assert bool((velocity[:, ~mask] == 0).all())
    assert bool((velocity[:, mask] != 0).all())


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("vlm4vla_toy", "qwen_oft_toy")])
def test_a_padded_and_an_unpadded_chunk_have_the_same_velocity(
    make_policy: Callable[..., Policy], spec: EnvSpec, observe: Callable[..., Observation], name: str
) -> None:
    padded = make_policy(name, spec, "policy.expert.channels=8", "policy.expert.horizon=8")
    exact = make_policy(name, spec, "policy.expert.channels=2", "policy.expert.horizon=6")
    assert isinstance(padded, PolicyWithFlow)
    assert isinstance(exact, PolicyWithFlow)
    # K = 2 keeps the first two columns of what reads a channel and the first two rows of what writes one.
    sizes = {key: [slice(size) for size in tensor.shape] for key, tensor in exact.state_dict().items()}
    exact.load_state_dict({key: tensor[tuple(sizes[key])] for key, tensor in padded.state_dict().items()})
    assert bool(exact.action_mask().all())
    assert not bool(padded.action_mask().all())

    sample, tau = draws(padded, 4)
    batch = padded.collate(observe(4))
    with torch.no_grad():
        long = padded.velocity(padded.encode(batch), sample, tau)
        short = exact.velocity(exact.encode(batch), sample[:, :6, :2], tau)
    torch.testing.assert_close(long[:, :6, :2], short, atol=1e-5, rtol=1e-4)


# --- it looks


def test_what_is_decoded_depends_on_image_instruction_and_state(
    policy: Policy, observe: Callable[..., Observation]
) -> None:
    seen = observe(2)
    assert seen.state is not None
    reference = decoded_of(policy, seen)
    swapped = {name: image[[1, 0]] for name, image in seen.images.items()}
    assert not torch.allclose(decoded_of(policy, replace(seen, images=swapped)), reference, atol=1e-5)
    assert not torch.allclose(decoded_of(policy, replace(seen, instruction=[SHORT, SHORT])), reference, atol=1e-5)
    assert not torch.allclose(decoded_of(policy, replace(seen, state=seen.state[[1, 0]])), reference, atol=1e-5)


def test_a_velocity_depends_on_sample_and_time(policy: Policy, observe: Callable[..., Observation]) -> None:
    if not isinstance(policy, PolicyWithFlow):
        pytest.skip("has no velocity")
    seen = observe(2)
    reference = decoded_of(policy, seen)
    assert not torch.allclose(decoded_of(policy, seen, seed=1), reference, atol=1e-5)
    sample, tau = draws(policy, 2)
    with torch.no_grad():
        moved = policy.velocity(policy.encode(policy.collate(seen)), sample, (tau + 0.3) % 1)
    assert not torch.allclose(moved, reference, atol=1e-5)


def two_cameras(spec: EnvSpec, **second: Any) -> tuple[EnvSpec, Observation]:
    """The suite with a second camera, and what it sees."""
    spec = replace(spec, cameras=(*spec.cameras, replace(spec.cameras[0], name="wrist", **second)))
    rng = np.random.default_rng(0)
    images = {c.name: rng.integers(0, 256, (2, c.height, c.width, 3), dtype=np.uint8) for c in spec.cameras}
    return spec, Observation(images, [SHORT] * 2, np.zeros((2, spec.state_size), np.float32))


@pytest.mark.parametrize("name", POLICIES)
def test_every_camera_reaches_what_is_decoded(make_policy: Callable[..., Policy], spec: EnvSpec, name: str) -> None:
    both, seen = two_cameras(spec)
    # The names of the views are words that this tokenizer was not trained on.
    room = ["policy.expert.context_positions=96"] if name.startswith("qwen_vla") else []
    policy = make_policy(name, both, *room)
    reference = decoded_of(policy, seen)
    for camera, image in seen.images.items():
        other = {**seen.images, camera: 255 - image}
        assert not torch.allclose(decoded_of(policy, replace(seen, images=other)), reference, atol=1e-5)


def test_cameras_of_two_sizes_are_refused_before_anything_is_built(
    make_policy: Callable[..., Policy], spec: EnvSpec
) -> None:
    both, _ = two_cameras(spec, height=16)
    with pytest.raises(ValueError, match="wrist"):
        make_policy("qwen_vla_tiny", both)


# --- gradients


def test_the_value_loss_leaves_no_gradient_in_the_policy(policy: Policy, observe: Callable[..., Observation]) -> None:
    head = ValueHead(policy.value_size)
    assert all(parameter.requires_grad for parameter in policy.parameters())
    features = policy.value_features(policy.encode(policy.collate(observe(3))))
    assert features.shape == (3, policy.value_size)
    assert not features.requires_grad
    head(features).square().sum().backward()
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())


def test_the_value_reads_valid_tokens_only(policy: Policy, observe: Callable[..., Observation]) -> None:
    batch = policy.collate(observe(2, [SHORT, LONG]))
    context = policy.encode(batch)
    if context.tokens.shape[1] < batch["mask"].shape[1]:
        pytest.skip("keeps a few tokens of those that it reads")
    for row in range(2):
        valid = context.tokens[row][context.mask[row]]
        torch.testing.assert_close(context.pooled[row], valid.mean(dim=0).detach(), atol=1e-5, rtol=1e-4)


def test_the_policy_loss_reaches_every_parameter_of_the_expert_and_the_backbone(
    policy: Policy, observe: Callable[..., Observation]
) -> None:
    thought = decide(policy, observe(3))
    context = policy.encode(thought.batch)
    sampler_of(policy).score(policy, context, stored_of(thought)).log_prob.square().sum().backward()
    frozen = {id(p) for name in policy.frozen_groups for p in policy.parameter_groups()[name]}
    named = [(name, p) for name, p in policy.named_parameters() if id(p) not in frozen]
    silent = [name for name, p in named if p.grad is None or not p.grad.any()]
    assert not [name for name in silent if not re.fullmatch(RESTING.get(policy.config.name, ""), name)]


def test_recomputing_blocks_on_the_way_back_changes_no_gradient(
    policy: Policy, observe: Callable[..., Observation]
) -> None:
    thought = decide(policy, observe(3))
    found = []
    # A block that changes what it is given, such as a cache, would see it changed already the second time.
    for recompute in (False, True):
        set_up(policy, ComputeConfig(recompute=recompute))
        policy.zero_grad()
        context = policy.encode(thought.batch)
        sampler_of(policy).score(policy, context, stored_of(thought)).log_prob.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_in_bf16_a_policy_scores_what_it_decided_in_fp32_probabilities(
    policy: Policy, observe: Callable[..., Observation]
) -> None:
    set_up(policy, ComputeConfig(precision=Precision.bf16))
    thought = decide(policy, observe(3))
    stored = stored_of(thought)
    likelihood = sampler_of(policy).score(policy, policy.encode(thought.batch), stored)
    assert likelihood.log_prob.dtype is torch.float32
    assert thought.context.pooled.dtype is torch.float32
    gap = sampler_of(policy).gap(likelihood.parameters, stored) * policy.action_mask()
    # algo.mean_tolerance times what bf16 is allowed.
    assert float(gap.detach().max()) < 0.1


def test_adapters_change_nothing_when_new_and_are_all_trained(
    policy: Policy, observe: Callable[..., Observation]
) -> None:
    before = decoded_of(policy, observe(3))
    groups = trained_groups(policy, train_vlm=True)
    add_lora(policy, LoraConfig(rank=2), groups)
    assert torch.equal(decoded_of(policy, observe(3)), before)
    require_gradients(policy, groups)
    layers = adapted(policy)
    for layer in layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    thought = decide(policy, observe(3))
    context = policy.encode(thought.batch)
    sampler_of(policy).score(policy, context, stored_of(thought)).log_prob.square().sum().backward()
    # An architecture that computes with a layer's weight itself would pass its adapter by.
    resting = RESTING.get(policy.config.name, "")
    reached = [name for name in layers if not re.fullmatch(resting, f"{name}.weight")]
    adapters = {f"{name}.lora_{part}" for name in reached for part in "AB"}
    found = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert adapters <= found
    # A group has adapters, or is trained whole.
    of = {id(p): name for name, p in policy.named_parameters()}
    for parameters in policy.parameter_groups().values():
        names = {of[id(p)] for p in parameters}
        assert not names & adapters or not (names & found) - adapters


def test_a_frozen_backbone_gets_no_gradient_from_an_update(policy: Policy, observe: Callable[..., Observation]) -> None:
    stored = stored_of(decide(policy, observe(4)), store_context=False)
    learner_for(policy, train_vlm=False).forward(in_rounds(stored)).log_prob.sum().backward()
    assert all(p.grad is None for p in policy.parameter_groups()["vlm"])
    assert any(p.grad is not None and p.grad.any() for p in policy.parameter_groups()["expert"])


def test_parameter_groups_partition_the_parameters(policy: Policy) -> None:
    groups = policy.parameter_groups()
    assert {"vlm", "expert"} <= set(groups)
    assert policy.context_groups | policy.frozen_groups <= set(groups)
    listed = [id(p) for parameters in groups.values() for p in parameters]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in policy.parameters()}


def test_sharding_units_are_disjoint_parts_of_the_policy_and_hold_most_of_it(policy: Policy) -> None:
    units = policy.sharding_units()
    modules = set(policy.modules())
    assert all(unit in modules for unit in units)
    listed = [id(p) for unit in units for p in unit.parameters()]
    assert len(listed) == len(set(listed))
    assert set(listed) <= {id(p) for p in policy.parameters()}


# --- nothing random


def test_dropout_is_never_active(policy: Policy, tmp_path: Path) -> None:
    save_policy(policy, tmp_path / "policy")
    for each in (policy, load_policy(tmp_path / "policy")):
        assert not [name for name, module in each.named_modules() if module.training]
        assert not [name for name, module in each.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
        for module in each.modules():
            assert getattr(module, "attention_dropout", 0) == 0
            assert getattr(module, "dropout_p", 0) == 0


def test_the_learner_refuses_a_policy_in_training_mode(policy: Policy, observe: Callable[..., Observation]) -> None:
    data = in_rounds(stored_of(decide(policy, observe(4))))
    data["mask"] = data["mask"] & policy.action_mask()
    data["advantage"] = data["value_target"] = torch.zeros(4)
    learner = learner_for(policy)
    learner._check_before(data)
    policy.train()
    with pytest.raises(RuntimeError, match=r"in training mode.*policy.eval\(\)"):
        learner._check_before(data)


def test_two_passes_have_the_same_bits(policy: Policy, observe: Callable[..., Observation]) -> None:
    assert torch.equal(decoded_of(policy, observe(4)), decoded_of(policy, observe(4)))


# --- actions


def test_actions_survive_the_way_to_the_policy_and_back(policy: Policy) -> None:
    rng = np.random.default_rng(1)
    stats = policy.stats
    chunk = rng.uniform(stats.q01, stats.q99, size=(3, 6, 2)).astype(np.float32)
    sample = policy.actions_from_env(chunk)
    assert sample.shape == (3, policy.horizon, policy.channels)
    assert bool((sample.abs() <= 1).all())
    assert bool((sample[:, ~policy.action_mask()] == 0).all())
    np.testing.assert_allclose(policy.actions_to_env(sample), chunk, atol=1e-5)


def test_what_overshoots_is_clipped_on_the_simulators_copy_only(
    policy: Policy, observe: Callable[..., Observation]
) -> None:
    with torch.no_grad():  # samples far outside [-1, 1]
        if has_distribution(policy):
            policy.get_parameter("log_std").add_(3)
        else:
            for parameter in policy.parameter_groups()["expert"][-2:]:
                parameter *= 50
    made = decide(policy, observe(4)).decision
    assert bool((made.action >= policy.stats.q01 - 1e-6).all() and (made.action <= policy.stats.q99 + 1e-6).all())
    scored = made.stored["sample" if has_distribution(policy) else "after"]
    assert scored[:, policy.action_mask()].abs().max() > 2


def test_a_constant_channel_is_held_and_outside_the_mask(
    make_policy: Callable[..., Policy], spec: EnvSpec, observe: Callable[..., Observation]
) -> None:
    policy = make_policy("qwen_vla_tiny", spec, constant_channel=1)
    assert policy.action_mask()[:6, :2].tolist() == [[True, False]] * 6
    made = decide(policy, observe(3)).decision
    np.testing.assert_allclose(made.action[..., 1], 0.25, atol=1e-6)
    assert made.action[..., 0].std() > 0


# --- numerics


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch on its own RMSNorm
def test_bfloat16_autocast_stays_near_single_precision(policy: Policy, observe: Callable[..., Observation]) -> None:
    reference = decoded_of(policy, observe(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = decoded_of(policy, observe(4))
    # bfloat16 has 8 bits: 0.4% a rounding, about 1% through these layers.
    error = (rough.float() - reference).norm() / reference.norm()
    assert 0 < error < 0.03


def test_a_policy_in_bfloat16_takes_single_precision_samples(
    policy: Policy, observe: Callable[..., Observation]
) -> None:
    reference = decoded_of(policy, observe(4))
    rough = decoded_of(policy.to(torch.bfloat16), observe(4))
    assert rough.dtype == torch.float32
    assert (rough - reference).norm() / reference.norm() < 0.03
    # Positions in the hundreds do not fit into 8 bits.
    assert {m.inv_freq.dtype for m in policy.modules() if hasattr(m, "inv_freq")} <= {torch.float32}


# --- on disk


WEIGHT = "expert.context_in.bias"
"""Of `stored`."""


@pytest.fixture
def stored(make_policy: Callable[..., Policy], spec: EnvSpec) -> Policy:
    """One policy is enough to show what a damaged folder does: all are read by the same code."""
    return make_policy("qwen_vla_toy", spec)


@pytest.fixture
def folder(stored: Policy, tmp_path: Path) -> Path:
    save_policy(stored, tmp_path / "policy")
    return tmp_path / "policy"


def weight_of(policy: Policy) -> Tensor:
    return policy.state_dict()[WEIGHT]


def test_a_saved_policy_is_the_same_to_the_bit(
    policy: Policy, tmp_path: Path, observe: Callable[..., Observation]
) -> None:
    folder = tmp_path / "policy"
    save_policy(policy, folder)
    assert all((folder / name).is_file() for name in FILES)
    loaded = load_policy(folder)
    assert loaded.state_dict().keys() == policy.state_dict().keys()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.config, loaded.env_spec) == (policy.config, policy.env_spec)
    assert torch.equal(loaded.action_mask(), policy.action_mask())
    seen = observe(4, [SHORT, LONG, SHORT, "Ångström 木"])
    assert torch.equal(loaded.collate(seen)["input_ids"], policy.collate(seen)["input_ids"])
    ours, theirs = decide(policy, seen).decision, decide(loaded, seen).decision
    assert np.array_equal(ours.action, theirs.action)
    for name, tensor in ours.stored.items(include_nested=True, leaves_only=True):
        assert torch.equal(tensor, theirs.stored[name]), name


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(stored: Policy, folder: Path) -> None:
    (folder / "stale.txt").write_text("from before")
    with torch.no_grad():
        weight_of(stored).add_(1)
    save_policy(stored, folder)
    assert torch.equal(weight_of(load_policy(folder)), weight_of(stored))
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_other_weights_can_be_saved_in_its_place(stored: Policy, tmp_path: Path) -> None:
    average = {name: torch.zeros_like(tensor) for name, tensor in stored.state_dict().items()}
    save_policy(stored, tmp_path / "average", average)
    assert not any(p.any() for p in load_policy(tmp_path / "average").parameters())


def test_a_folder_that_is_not_there_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no policy folder at .*nowhere. `rlvla sft` writes one"):
        load_policy(tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"not a complete policy folder: {name} is missing"):
        load_policy(folder)


def test_all_missing_files_are_named_at_once(folder: Path) -> None:
    (folder / "config.yaml").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"config.yaml, tokenizer.json are missing"):
        load_policy(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_truncated_file_is_named_as_damaged(folder: Path, name: str, keep: float) -> None:
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=rf"{folder}.*damaged"):
        load_policy(folder)


def test_garbage_instead_of_weights_is_named_as_damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04K*." * 100)  # a pickle, never to be read
    with pytest.raises(ValueError, match=r"model.safetensors is damaged.*[Cc]opy"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda w: {**w, "expert.extra": torch.zeros(2)}, "without a home: expert.extra"),
        (lambda w: {k: v for k, v in w.items() if k != "expert.context_in.bias"}, "missing: expert.context_in.bias"),
        (
            lambda w: {**w, "expert.context_in.bias": torch.zeros(3)},
            r"of another shape: expert.context_in.bias \(3,\) instead of \(\d+,\)",
        ),
        (lambda w: {f"model.{k}": v for k, v in w.items()}, r"without a home: .* and \d+ more; missing: .* more"),
    ],
    ids=["extra", "missing", "shape", "renamed"],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    folder: Path, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str
) -> None:
    path = folder / "model.safetensors"
    save_file(damage(load_file(path)), path)
    with pytest.raises(ValueError, match=rf"does not fit its config.yaml; tensors .*{said}"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("horizon: 8", "horizons: 8"),
        ("horizon: 8", "horizon: 3"),
        ("horizon: 8", "horizon: long"),
    ],
)
def test_a_config_edited_into_nonsense_is_refused(folder: Path, old: str, new: str) -> None:
    path = folder / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match="horizon"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("kind", "key", "values"),
    [
        ("action", "q01", [0.0]),  # would broadcast over every channel
        ("action", "q99", [1.0] * 3),
        ("state", "mean", [0.0]),
        ("action", "q01", [float("nan")] * 2),  # every channel would be inactive
    ],
)
def test_statistics_of_another_robot_are_refused(
    make_policy: Callable[..., Policy], spec: EnvSpec, tmp_path: Path, kind: str, key: str, values: list[float]
) -> None:
    save_policy(make_policy("qwen_vla_toy", spec), tmp_path / "policy")
    path = tmp_path / "policy/action_stats.json"
    data = json.loads(path.read_text())
    data[kind][key] = values
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"action_stats.json"):
        load_policy(tmp_path / "policy")


def test_a_policy_folder_can_move(folder: Path, tmp_path: Path, stored: Policy) -> None:
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert torch.equal(weight_of(load_policy(Path(moved))), weight_of(stored))


def test_the_action_conventions_travel_with_the_policy(
    make_policy: Callable[..., Policy], spec: EnvSpec, tmp_path: Path
) -> None:
    arm = ActionComponent(name="arm", size=1, convention="absolute, 木", low=-2.5, high=float("inf"))
    hand = ActionComponent(name="hand", size=1, convention="1 open", low=-1.0, high=1.0)
    save_policy(make_policy("qwen_vla_tiny", replace(spec, action=(arm, hand))), tmp_path / "policy")
    assert load_policy(tmp_path / "policy").env_spec.action == (arm, hand)


def test_whatever_is_done_to_a_policy_folder_it_loads_or_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    loaded, refused = 0, []
    for number in range(150):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        file = chance.choice(sorted(path for path in copy.iterdir() if path.is_file()))
        content = bytearray(file.read_bytes())
        at = int(chance.integers(len(content)))
        match number % 5:
            case 0:
                del content[at:]
            case 1:
                content[at] ^= int(chance.integers(1, 256))
            case 2:
                # The first kilobyte holds what is parsed first.
                content[at % 1024] = int(chance.integers(256))
            case 3:
                content[at : at + 8] = chance.integers(256, size=8, dtype=np.uint8).tobytes()
            case _:
                content = bytearray(content.replace(b"1", b"-7", 1).replace(b'"', b"", int(chance.integers(2))))
        file.write_bytes(content)
        try:
            load_policy(copy)
            loaded += 1
        except (ValueError, RuntimeError, OSError) as error:
            refused.append(str(error))
        shutil.rmtree(copy)
    assert loaded > 20
    assert len(refused) > 20
    assert all(message.strip() for message in refused)
