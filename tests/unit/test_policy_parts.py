"""What a Qwen-VLA policy is made of: patches, prompt, statistics, tokens, positions, and the paper's sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rlvla.compose import compose
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.base import ValueHead
from rlvla.policies.expert import Block, Expert, ExpertConfig, _rotate, flow_time_features
from rlvla.policies.processor import SPECIAL_TOKENS, load_tokenizer, patchify, train_tokenizer
from rlvla.policies.prompt import embodiment_prompt
from rlvla.policies.prompted import prompts_for_tokenizer
from rlvla.policies.qwen_vla import QwenVLA
from rlvla_envs.base import ActionComponent, Camera, EnvSpec


def make_spec(**changes: Any) -> EnvSpec:
    arm = ActionComponent(name="arm", size=7, convention="delta", low=-1.0, high=1.0)
    fields: dict[str, Any] = {
        "suite": "simpler_env",
        "task": "put_carrot",
        "robot": "WidowX",
        "action": (arm,),
        "cameras": (Camera(name="front", height=224, width=224),),
        "control_hz": 5.0,
        "chunk_size": 4,
        "max_episode_steps": 60,
        "num_evaluation_states": 24,
    }
    return EnvSpec(**{**fields, **changes})


def make_stats(action: Any, state: Any = None) -> ActionStats:
    return ActionStats.of(np.asarray(action, np.float32), None if state is None else np.asarray(state, np.float32))


# --- patches


@pytest.mark.parametrize("patch_size", [16, 8])
def test_patches_equal_those_of_transformers(patch_size: int) -> None:
    from transformers import Qwen2VLImageProcessorPil

    images = np.random.default_rng(0).integers(0, 256, (3, 4 * patch_size, 6 * patch_size, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch_size,
        merge_size=2,
        temporal_patch_size=2,
        do_resize=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    expected = processor(list(images), return_tensors="pt")
    patches = patchify(torch.from_numpy(images), patch_size, 2, 2)
    torch.testing.assert_close(patches, expected["pixel_values"], atol=1e-6, rtol=0)
    assert expected["image_grid_thw"].tolist() == [[1, 4, 6]] * 3


def test_a_patch_by_hand() -> None:
    # One 2 x 2 image of patches of one pixel: one merged block, red 0, 51, 102, 255 -> -1, -0.6, -0.2, 1.
    image = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    image[0, :, :, 0] = torch.tensor([[0, 51], [102, 255]])
    patches = patchify(image, 1, 2, 2)
    assert patches.shape == (4, 6)
    # A row is channel, time, y, x: the red value twice, then green and blue.
    torch.testing.assert_close(patches[:, :2], torch.tensor([-1.0, -0.6, -0.2, 1.0])[:, None].expand(4, 2))
    assert bool((patches[:, 2:] == -1).all())


def test_images_that_do_not_divide_into_merged_patches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images are 24 x 32; both must be multiples of patch x merge = 16"):
        patchify(torch.zeros(1, 24, 32, 3, dtype=torch.uint8), 8, 2, 2)


# --- prompt


def test_the_prompt_is_the_papers_sentence() -> None:
    assert embodiment_prompt(make_spec(), "put the carrot on the plate") == (
        "The robot is WidowX with single arm. The control frequency is 5 Hz. Please predict the next 4 control "
        "actions to execute the following task: put the carrot on the plate."
    )


def test_the_prompt_follows_the_embodiment() -> None:
    spec = make_spec(robot="GR-1", arms="dual arms, waist", control_hz=12.5, chunk_size=16)
    assert embodiment_prompt(spec, "wave.") == (
        "The robot is GR-1 with dual arms, waist. The control frequency is 12.5 Hz. Please predict the next 16 "
        "control actions to execute the following task: wave."
    )


# --- statistics


def test_quantiles_by_hand() -> None:
    # 0, 1, ..., 100: the 1% quantile is 1 and the 99% one 99, so 50 is the middle and 74.5 three quarters.
    stats = make_stats(np.arange(101)[:, None])
    assert (stats.q01.item(), stats.q99.item()) == (1.0, 99.0)
    unit = stats.normalize(np.array([[1.0], [50.0], [74.5], [99.0]], np.float32))
    assert unit[:, 0].tolist() == pytest.approx([-1.0, 0.0, 0.5, 1.0])


def test_actions_beyond_the_quantiles_are_clipped() -> None:
    stats = make_stats(np.arange(101)[:, None])
    assert stats.normalize(np.array([[0.0], [100.0]], np.float32))[:, 0].tolist() == [-1.0, 1.0]


@given(seed=st.integers(0, 1000))
def test_denormalising_inverts_normalising_inside_the_quantiles(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-3, 3, size=4)
    stats = make_stats(rng.normal(size=(500, 4)) * scale + scale)
    action = rng.uniform(stats.q01, stats.q99, size=(3, 2, 4)).astype(np.float32)
    np.testing.assert_allclose(stats.denormalize(stats.normalize(action)), action, atol=1e-5 * scale.max(), rtol=1e-4)


def test_a_channel_that_never_moved_is_inactive_and_held_at_its_constant() -> None:
    data = np.stack([np.linspace(-1, 1, 100), np.full(100, 0.7)], axis=1)
    stats = make_stats(data)
    assert stats.active.tolist() == [True, False]
    assert stats.normalize(np.array([[0.0, 5.0]], np.float32))[0, 1] == 0
    assert stats.denormalize(np.array([[0.0, 0.9]], np.float32))[0, 1] == pytest.approx(0.7)


def test_the_state_is_standardised_and_an_outlier_cannot_own_it() -> None:
    # Mean 2 and deviation 1; a still channel is divided by 0.02 at the least.
    stats = make_stats(np.zeros((2, 1)), [[1.0, 5.0], [3.0, 5.0]])
    unit = stats.normalize_state(np.array([[3.0, 5.01], [1e6, -1e6]], np.float32))
    assert unit[0].tolist() == pytest.approx([1.0, 0.5], abs=1e-4)
    assert unit[1].tolist() == [4.0, -4.0]


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    stats = make_stats(np.random.default_rng(0).normal(size=(50, 3)), np.random.default_rng(1).normal(size=(50, 2)))
    stats.save(tmp_path / "stats.json")
    loaded = ActionStats.load(tmp_path / "stats.json")
    for name in ("q01", "q99", "state_mean", "state_std"):
        assert np.array_equal(getattr(loaded, name), getattr(stats, name))


def test_a_dataset_without_a_state_has_no_state_statistics() -> None:
    stats = make_stats(np.zeros((5, 2)))
    assert stats.state_mean.shape == (0,)
    assert stats.normalize_state(np.zeros((3, 0), np.float32)).shape == (3, 0)


# --- tokens


def test_every_special_token_is_one_token_and_survives_a_folder(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(prompts_for_tokenizer(make_spec(), ["put the carrot on the plate"]), 400)
    tokenizer.save_pretrained(tmp_path)
    for tok in (tokenizer, load_tokenizer(tmp_path)):
        ids = [tok(text, add_special_tokens=False)["input_ids"] for text in SPECIAL_TOKENS]
        assert [len(i) for i in ids] == [1] * len(SPECIAL_TOKENS)
        assert len({i[0] for i in ids}) == len(SPECIAL_TOKENS)
        assert tok.pad_token_id == tok.convert_tokens_to_ids("<|endoftext|>")
        assert tok.eos_token_id == tok.convert_tokens_to_ids("<|im_end|>")
        assert len(tok) <= 400


@pytest.mark.parametrize("text", ["put the carrot on the plate", "Ångström, 木, 🙂: anything else"])
def test_any_text_encodes_and_decodes(text: str) -> None:
    tokenizer = train_tokenizer(prompts_for_tokenizer(make_spec(), ["put the carrot on the plate"]), 400)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_the_chat_turn_has_one_image_pad_a_camera() -> None:
    tokenizer = train_tokenizer(["hello"], 300)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "hello"}]
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert turn == f"<|im_start|>user\n{image}{image}hello<|im_end|>\n<|im_start|>assistant\n"


# --- the expert's positions, time and sizes


@pytest.mark.parametrize(
    ("hidden_size", "num_heads", "section"),
    [(96, 3, (6, 5, 5)), (64, 2, (6, 5, 5)), (1536, 12, (24, 20, 20))],
    ids=["tiny", "even", "paper"],
)
def test_the_experts_rotary_positions_equal_those_of_the_backbone(
    hidden_size: int, num_heads: int, section: tuple[int, ...]
) -> None:
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding, apply_rotary_pos_emb

    head_size, theta = hidden_size // num_heads, 10000.0
    config = ExpertConfig(hidden_size=hidden_size, num_heads=num_heads, num_blocks=0, mrope_section=section, channels=2)
    expert = Expert(config, context_size=8, state_size=0, rope_theta=theta)
    # Time stands still inside an image while height and width run ahead; the last token is padding.
    context = torch.tensor([[[0, 1, 1, 1, 1, 1, 9], [0, 1, 1, 2, 2, 3, 9], [0, 1, 2, 1, 2, 4, 9]]])
    mask = torch.tensor([[True, True, True, True, True, True, False]])
    cos, sin = expert._rotary(mask, context, 3)

    # What follows counts on from the largest valid position, 4, on all three axes.
    following = torch.arange(5, 8).expand(1, 3, 3)
    positions = torch.cat([context, following], dim=2).transpose(0, 1)
    rotary = Qwen3_5TextRotaryEmbedding(
        Qwen3_5TextConfig(
            hidden_size=hidden_size,
            num_attention_heads=num_heads,
            head_dim=head_size,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": theta,
                "partial_rotary_factor": 1.0,
                "mrope_section": list(section),
                "mrope_interleaved": True,
            },
        )
    )
    x = torch.randn(1, num_heads, 10, head_size, generator=torch.Generator().manual_seed(0))
    expected_cos, expected_sin = rotary(x, positions)
    torch.testing.assert_close(cos[:, 0], expected_cos, atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[:, 0], expected_sin, atol=1e-5, rtol=0)
    rotated, _ = apply_rotary_pos_emb(x, x, expected_cos, expected_sin)
    torch.testing.assert_close(_rotate(x, (cos, sin)), rotated, atol=1e-5, rtol=0)


def test_a_last_block_that_is_asked_for_the_chunk_alone_says_the_same_of_it() -> None:
    config = ExpertConfig(hidden_size=24, num_blocks=2, num_heads=2, ffn_size=40, channels=3, mrope_section=(2, 2, 2))
    torch.manual_seed(0)
    expert = Expert(config, context_size=8, state_size=5, rope_theta=100.0).double()
    for parameter in expert.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    tokens, state, sample = torch.randn(2, 6, 8), torch.randn(2, 5), torch.randn(2, 4, 3)
    tokens, state, sample = tokens.double(), state.double(), sample.double().requires_grad_()
    positions = torch.arange(6).expand(2, 3, 6)
    tau, action_mask = torch.tensor([0.2, 0.7]).double(), torch.ones(4, 3, dtype=torch.bool)
    wanted: list[int | None] = []

    def gradients(everything: bool) -> list[torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            plain = Block.forward

            def forward(self: Block, *given: Any) -> torch.Tensor:
                wanted.append(given[-1])
                return plain(self, *given[:-1], None) if everything else plain(self, *given)

            patch.setattr(Block, "forward", forward)
            velocity = expert(tokens, mask, positions, state, sample, action_mask, tau)
        return [velocity, *torch.autograd.grad(velocity.square().sum(), [sample, *expert.parameters()])]

    for lean, whole in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(lean, whole, rtol=1e-10, atol=1e-12)
    assert wanted == [None, 4] * 2


def test_flow_time_features_by_hand() -> None:
    # The first frequency is 1, so feature 0 is cos(1000 tau) and feature 128 its sine; the last is nearly 1e-4.
    features = flow_time_features(torch.tensor([0.0, 0.25]))
    assert features.shape == (2, 256)
    assert features[0].tolist() == [1.0] * 128 + [0.0] * 128
    assert features[1, 0].item() == pytest.approx(np.cos(250), abs=1e-4)
    assert features[1, 128].item() == pytest.approx(np.sin(250), abs=1e-4)
    assert features[1, 255].item() == pytest.approx(np.sin(250 * 10 ** (-4 * 127 / 128)), abs=1e-4)


def test_the_4b_policy_has_the_papers_counts() -> None:
    config = compose("sft", ["dataset=none", "policy=qwen_vla_4b", "suite.image_size=224"])
    spec = make_spec()
    tokenizer = train_tokenizer(prompts_for_tokenizer(spec, ["put the carrot on the plate"]), 400)
    with torch.device("meta"):
        policy = QwenVLA(config.policy, spec, make_stats(np.linspace(-1, 1, 50)[:, None].repeat(7, axis=1)), tokenizer)

    def millions(*modules: nn.Module) -> float:
        return sum(p.numel() for module in modules for p in module.parameters()) / 1e6

    expert = policy.expert
    assert millions(policy.vlm) == pytest.approx(4540, abs=10)
    assert millions(expert) == pytest.approx(1149, abs=0.5)
    # Section 2.2, in its own rounding.
    assert len(expert.blocks) == 16
    assert {round(millions(block), 1) for block in expert.blocks} == {70.8}
    assert round(millions(expert.blocks) / 1000, 2) == 1.13
    assert round(millions(expert.action_in, expert.action_out), 1) == 4.9
    assert round(millions(expert.context_in), 1) == 3.9
    assert round(millions(expert.time_in), 1) == 2.8
    assert round(millions(expert.final_modulation), 1) == 4.7
    assert expert.state_in is None
    assert expert.positions is None
    assert policy.value_size == 2560


def test_the_critic_of_the_paper_is_linear() -> None:
    head = ValueHead(5)
    assert [p.shape for p in head.parameters()] == [(1, 5), (1,)]
    features = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    weight, bias = head.parameters()
    torch.testing.assert_close(head(features), (features @ weight.T + bias)[:, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 97}, "hidden_size is 97, which 3 heads do not divide"),
        ({"mrope_section": (6, 5, 4)}, r"mrope_section is \[6, 5, 4\]; .* half the head size, 16"),
        ({"mrope_section": (8, 8)}, r"mrope_section is \[8, 8\]; it must be three numbers"),
    ],
)
def test_an_expert_whose_sizes_do_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertConfig(**changes)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"chunk_size": 9}, r"suite.chunk_size is 9, policy.expert.horizon pads to 8; raise it"),
        (
            {"action": (ActionComponent(name="hand", size=9, convention="absolute", low=-1.0, high=1.0),)},
            r"9 action channels, policy.expert.channels pads to 8; raise it",
        ),
        (
            {"cameras": (Camera(name="front", height=40, width=64),)},
            r"camera front is 40 x 64, which merged patches of 16 pixels do not divide; change suite.image_size",
        ),
    ],
)
def test_a_suite_that_does_not_fit_the_policy_is_refused_before_anything_is_built(
    spec: dict[str, Any], message: str
) -> None:
    config = compose("sft", ["dataset=none", "policy=qwen_vla_tiny"]).policy
    tokenizer = train_tokenizer(["hello"], 300)
    size = make_spec(**spec).action_size
    with pytest.raises(ValueError, match=f"the policy does not fit the suite: .*{message}"):
        QwenVLA(config, make_spec(**spec), make_stats(np.zeros((2, size))), tokenizer)


def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    config = compose("sft", ["dataset=none", "policy=qwen_vla_tiny", "policy.vlm.vocab_size=265"]).policy
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens, policy.vlm.vocab_size is 265; raise it"):
        QwenVLA(config, make_spec(), make_stats(np.zeros((2, 7))), train_tokenizer(["hello there"] * 9, 300))
