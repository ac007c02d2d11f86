"""What is peculiar to pi0, pi0.5 and SmolVLA: sizes, time, masks, prompts, images, and what is noise."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlvla.acting import Actor
from rlvla.compose import compose
from rlvla.config import AlgoConfig
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.architectures import architecture
from rlvla.policies.base import context_is_fixed
from rlvla.policies.footprint import build_unallocated
from rlvla.policies.policy import Policy
from rlvla.policies.prefix import Fit, fit_images
from rlvla.policies.processor import train_tokenizer
from rlvla.policies.prompted import prompts_for_tokenizer
from rlvla.policies.suffix_expert import flow_time_sines, rotary_tables, rotate, suffix_mask
from rlvla.samplers import training_sampler
from rlvla.seeding import Stream, keyed_rng
from rlvla_envs.base import ActionComponent, Camera, EnvSpec, Observation, VecEnv

TOYS = ["pi0_toy", "pi05_toy", "smolvla_toy"]


@pytest.fixture
def spec(make_toy: Callable[..., VecEnv]) -> EnvSpec:
    return make_toy(1, chunk_size=6).spec


@pytest.fixture
def seen(make_toy: Callable[..., VecEnv]) -> Observation:
    return make_toy(3, chunk_size=6).reset(range(3), range(3))


def count(name: str) -> dict[str, int]:
    """Parameters of a true configuration, none of which is allocated."""
    config = compose("sft", ["dataset=none", "suite=toy", f"policy={name}"]).policy
    arm = ActionComponent(name="arm", size=7, convention="delta", low=-1.0, high=1.0)
    spec = EnvSpec(
        suite="libero",
        task="t",
        robot="Panda",
        action=(arm,),
        cameras=(Camera(name="front", height=256, width=256),),
        control_hz=20.0,
        chunk_size=10,
        max_episode_steps=100,
        num_evaluation_states=10,
    )
    stats = ActionStats.of(np.zeros((2, 7), np.float32), None)
    with torch.device("meta"):
        policy = architecture(config.name).policy(config, spec, stats, train_tokenizer(["a"], 300))
    return {name: sum(p.numel() for p in group) for name, group in policy.parameter_groups().items()}


# --- sizes


def test_the_true_configurations_have_the_published_sizes() -> None:
    # PaliGemma-3B has 2,923,466,480 parameters with 257,216 tokens, 64 of which openpi leaves out. The pi0 paper:
    # 3.3 B, of which the expert is about 300 M.
    pi0 = count("pi0_3b")
    assert pi0["vlm"] + pi0["top"] == 2_923_466_480 - 64 * 2048
    assert pi0["expert"] == pytest.approx(0.3e9, rel=0.06)
    assert sum(pi0.values()) == pytest.approx(3.3e9, rel=0.02)
    # pi0.5 differs by the norms: each of 37 has 3 x 1024 x 1025 in place of 1024, and there is no state to project.
    pi05 = count("pi05_3b")
    assert pi05["expert"] - pi0["expert"] == 37 * (3 * 1024 * 1025 - 1024) - 33 * 1024 - 1024 * 1024
    # SmolVLA: 450 M with the VLM's head, a table of 49,280 x 960 that acting leaves out; about 100 M are the expert.
    smol = count("smolvla_450m")
    assert sum(smol.values()) + 49_280 * 960 == pytest.approx(450e6, rel=0.001)
    assert smol["expert"] == pytest.approx(100e6, rel=0.01)


@pytest.mark.parametrize("name", TOYS)
def test_the_group_on_top_is_what_only_the_critic_reads(
    make_policy: Callable[..., Policy], spec: EnvSpec, seen: Observation, name: str
) -> None:
    policy = make_policy(name, spec)
    sample, tau = torch.randn(3, policy.horizon, policy.channels), torch.full((3,), 0.5)
    batch = policy.collate(seen)
    with torch.no_grad():
        before = policy.encode(batch)
        velocity = policy.velocity(before, sample, tau)
        for parameter in policy.parameter_groups()["top"]:
            parameter.add_(0.5)
        after = policy.encode(batch)
        assert torch.equal(policy.velocity(after, sample, tau), velocity)
    assert not torch.allclose(after.pooled, before.pooled)


# --- time, rotation, masks


def test_the_features_of_flow_time_by_hand() -> None:
    # Four of them: periods 0.004 and 4. At tau 0.001 the phases are pi / 2 and pi / 2000, at 1 500 pi and pi / 2.
    first, last = flow_time_sines(torch.tensor([0.001, 1.0]), 4)
    torch.testing.assert_close(first, torch.tensor([1.0, np.sin(np.pi / 2000), 0.0, np.cos(np.pi / 2000)]).float())
    torch.testing.assert_close(last, torch.tensor([0.0, 1.0, 1.0, 0.0]), atol=1e-5, rtol=0)


def test_rotation_is_that_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    positions = torch.tensor([[0, 1, 7], [3, 4, 5]])
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    theirs, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    torch.testing.assert_close(rotate(x, rotary_tables(positions, 16)), theirs.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_who_reads_whom_in_a_suffix_by_hand() -> None:
    one, three = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[True, True, False]])
    # A state, then three actions of which the last is padding: the state reads itself, actions read all but padding.
    block = suffix_mask([one, three], causal=False)[0].int().tolist()
    assert block == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    causal = suffix_mask([torch.ones(1, 3, dtype=torch.bool)], causal=True)[0].int().tolist()
    assert causal == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


@torch.no_grad()
def test_an_action_of_smolvla_does_not_depend_on_later_ones_and_one_of_pi0_does(
    make_policy: Callable[..., Policy], spec: EnvSpec, seen: Observation
) -> None:
    moved = {}
    for name in TOYS:
        policy = make_policy(name, spec)
        context = policy.encode(policy.collate(seen))
        sample, tau = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.5)
        other = sample.clone()
        other[:, 4:] += 1
        change = policy.velocity(context, other, tau) - policy.velocity(context, sample, tau)
        moved[name] = float(change[:, :4].abs().max())
        assert float(change[:, 4:].abs().max()) > 1e-3
    assert moved["smolvla_toy"] < 1e-6 < 1e-4 < min(moved["pi0_toy"], moved["pi05_toy"])


# --- prompts and images


def test_prompts_by_hand(make_policy: Callable[..., Policy], spec: EnvSpec) -> None:
    state = np.array([-1.0, 0.0, 0.999, -3.0, 1.0], np.float32)
    prompts = {name: make_policy(name, spec).prompt(" fly_up\nnow", state) for name in TOYS}  # type: ignore[attr-defined]
    assert prompts["pi0_toy"] == "fly up now\n"
    assert prompts["smolvla_toy"] == " fly_up\nnow\n"
    # 256 bins of [-1, 1]; what lies below is bin -1.
    assert prompts["pi05_toy"] == "Task: fly up now, State: 0 128 255 -1 255;\nAction: "
    padded = make_policy("pi05_toy", spec, "policy.pad_state_text=true", "policy.expert.state_channels=7")
    assert padded.prompt("go", state).endswith("255 128 128;\nAction: ")  # type: ignore[attr-defined]


def test_a_tokenizer_trained_for_pi05_writes_each_number_of_the_state_as_one_token(spec: EnvSpec) -> None:
    config = compose("sft", ["suite=toy", "policy=pi05_toy", "dataset=x"]).policy
    tokenizer = train_tokenizer(prompts_for_tokenizer(spec, ["fly through the gap"], config), config.vlm.vocab_size)
    around = tokenizer.tokenize("Task: fly through the gap, State:;\nAction: ")
    for number in range(-1, 256):
        text = f"Task: fly through the gap, State: {number} 17 {number};\nAction: "
        assert tokenizer.tokenize(text)[1:4] == [f"\u0120{number}", "\u012017", f"\u0120{number}"]
        assert len(tokenizer.tokenize(text)) == len(around) + 3


def test_the_length_of_a_context_does_not_depend_on_where_the_robot_is(
    make_policy: Callable[..., Policy], spec: EnvSpec, seen: Observation
) -> None:
    policy = make_policy("pi05_toy", spec)
    assert seen.state is not None
    lengths = set()
    for scale in (0.0, 0.3, 100.0):
        moved = replace(seen, state=seen.state * scale)
        lengths.add(policy.collate(moved)["input_ids"].shape[1])
    assert lengths == {policy.context_length(seen.instruction[0])}


def test_a_prompt_longer_than_the_checkpoints_is_refused(make_policy: Callable[..., Policy], spec: EnvSpec) -> None:
    policy = make_policy("pi0_toy", spec, "policy.prompt_tokens=8")
    assert policy.context_length("go") == 16
    with pytest.raises(ValueError, match=r"takes \d+ tokens; policy.prompt_tokens allows 8"):
        policy.context_length("a very long instruction that nobody has ever seen")


def test_an_image_keeps_its_proportions_by_hand() -> None:
    # 2 x 4 pixels, white: on 4 x 4 it is two rows, between black bars or below one.
    image = torch.full((1, 2, 4, 3), 255, dtype=torch.uint8)
    rows = {fit: fit_images(image, 4, fit, False)[0, 0, :, 0].tolist() for fit in Fit}
    assert rows == {Fit.center: [-1, 1, 1, -1], Fit.bottom_right: [-1, -1, 1, 1]}
    tall = fit_images(image.transpose(1, 2), 4, Fit.bottom_right, False)
    assert tall[0, 0, 0].tolist() == [-1, -1, 1, 1]
    # One of the right size is only scaled: 0, 51 and 255 are -1, -0.6 and 1.
    exact = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8)[None]
    torch.testing.assert_close(fit_images(exact, 1, Fit.center, False)[0, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))


def test_only_averaging_sees_every_pixel_of_an_image_made_smaller() -> None:
    # One bright pixel of sixteen: without averaging the two nearest centres of a 1 x 1 image miss it.
    image = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    image[0, 0, 0] = 255
    assert fit_images(image, 1, Fit.center, False).max() == -1
    assert fit_images(image, 1, Fit.center, True).max() > -1


@torch.no_grad()
def test_an_image_that_is_masked_in_the_original_may_as_well_be_absent(
    make_policy: Callable[..., Policy], spec: EnvSpec, seen: Observation
) -> None:
    one = make_policy("pi0_toy", spec)
    camera = spec.cameras[0]
    two = make_policy("pi0_toy", replace(spec, cameras=(camera, replace(camera, name="empty"))))
    two.load_state_dict(one.state_dict())
    black = np.zeros_like(seen.images[camera.name])
    context = two.encode(two.collate(replace(seen, images={**seen.images, "empty": black})))
    plain = one.encode(one.collate(seen))
    tokens = (32 // 8) ** 2
    # The second image's tokens masked away before the language model reads them, as the originals do.
    hidden = _encode_without(two, two.collate(replace(seen, images={**seen.images, "empty": black})), tokens)
    sample, tau = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.5)
    torch.testing.assert_close(
        two.velocity(hidden, sample, tau), one.velocity(plain, sample, tau), atol=1e-5, rtol=1e-4
    )
    # The power of this: unmasked it is seen.
    assert not torch.allclose(two.velocity(context, sample, tau), one.velocity(plain, sample, tau), atol=1e-4)


def _encode_without(policy: Any, batch: Any, tokens: int) -> Any:
    """`encode` with the second image's tokens masked: its mask is all that is changed."""
    original = torch.Tensor.new_ones

    def new_ones(tensor: torch.Tensor, *size: int, **kwargs: Any) -> torch.Tensor:
        made = original(tensor, *size, **kwargs)
        if made.ndim == 2 and made.dtype == torch.bool and made.shape[1] == 2 * tokens:
            made[:, tokens:] = False
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_ones", new_ones)
        return policy.encode(batch)


# --- noise


@pytest.mark.parametrize("name", TOYS)
def test_a_prefix_that_is_not_stored_is_read_again(
    make_policy: Callable[..., Policy], spec: EnvSpec, name: str
) -> None:
    assert context_is_fixed(make_policy(name, spec), train_vlm=False)
    assert not context_is_fixed(make_policy(name, spec), train_vlm=True)
    assert not context_is_fixed(make_policy(name, spec, "policy.store_prefix=false"), train_vlm=False)


def test_padding_is_denoised_where_the_checkpoint_expects_noise_and_is_never_scored(
    make_policy: Callable[..., Policy], spec: EnvSpec, seen: Observation
) -> None:
    for name in TOYS:
        policy = make_policy(name, spec, "policy.denoise_padding=true")
        sampler = training_sampler(policy, AlgoConfig(noise_level=0.5))
        rngs = [keyed_rng(0, Stream.ROLLOUT, 0, i) for i in range(3)]
        made = Actor(policy, block=4, device="cpu").decide(seen, rngs, temperature=1.0, sampler=sampler).decision
        before = made.stored["before"]
        noisy = (before != 0).all(dim=0)
        assert torch.equal(noisy, policy.noise_mask())
        steps = 6 if name == "smolvla_toy" else 8
        assert int(policy.noise_mask().sum()) == steps * 8
        assert int(policy.action_mask().sum()) == 6 * 2
        # And the executed part depends on it.
        with torch.no_grad():
            context = policy.encode(policy.collate(seen))
            tau = torch.full((3,), 0.5)
            quiet = before * policy.action_mask()
            there = policy.velocity(context, before, tau)[:, :6, :2]
            assert not torch.allclose(policy.velocity(context, quiet, tau)[:, :6, :2], there, atol=1e-4)


def test_statistics_without_bounds_do_not_clip_and_survive_the_disk(tmp_path: Any) -> None:
    wide = ActionStats(
        np.array([0.0], np.float32),
        np.array([2.0], np.float32),
        np.zeros(1, np.float32),
        np.ones(1, np.float32),
        action_bound=float("inf"),
        state_bound=float("inf"),
    )
    assert wide.normalize(np.array([[5.0]])).item() == 4.0
    assert wide.normalize_state(np.array([[9.0]])).item() == 9.0
    wide.save(tmp_path / "stats.json")
    again = ActionStats.load(tmp_path / "stats.json")
    assert (again.action_bound, again.state_bound) == (float("inf"), float("inf"))
    narrow = replace(wide, action_bound=1.0, state_bound=4.0)
    assert (narrow.normalize(np.array([[5.0]])).item(), narrow.normalize_state(np.array([[9.0]])).item()) == (1.0, 4.0)
    (tmp_path / "old.json").write_text('{"action": {"q01": [0], "q99": [1]}, "state": {"mean": [0], "std": [1]}}')
    old = ActionStats.load(tmp_path / "old.json")
    assert (old.action_bound, old.state_bound) == (1.0, 4.0)
    (tmp_path / "bad.json").write_text(
        '{"action": {"q01": [0], "q99": [1], "bound": -1}, "state": {"mean": [0], "std": [1]}}'
    )
    with pytest.raises(ValueError, match="a bound is -1.0; it must be positive"):
        ActionStats.load(tmp_path / "bad.json")


@pytest.mark.parametrize("name", TOYS)
def test_the_memory_plan_says_that_it_does_not_know_them(spec: EnvSpec, name: str) -> None:
    config = compose("sft", ["dataset=none", "suite=toy", f"policy={name}"]).policy
    with pytest.raises(ValueError, match=f"'{config.name}'; rlvla doctor plans the memory of qwen_vla alone"):
        build_unallocated(config, spec)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("policy.num_denoising_steps=0", "num_denoising_steps is 0"),
        ("policy.prompt_tokens=-1", "prompt_tokens is -1"),
        ("policy.expert.hidden_size=63", "it must be even"),
        ("policy.expert.state_channels=0", "state_channels is 0"),
        ("policy.vlm.image_size=30", "image_size is 30, which patches of 8"),
        ("policy.self_attention_every=-1", "self_attention_every is -1"),
        ("policy.name=pi0", "policy.name is 'pi0'; it must be 'smolvla'"),
    ],
)
def test_an_impossible_option_is_named(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compose("sft", ["dataset=d", "policy=smolvla_toy", override])


def test_a_state_that_does_not_fit_is_refused(make_policy: Callable[..., Policy], spec: EnvSpec) -> None:
    with pytest.raises(ValueError, match=r"state has 5 channels, policy.expert.state_channels pads to 4"):
        make_policy("pi0_toy", spec, "policy.expert.state_channels=4")
