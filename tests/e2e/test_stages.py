"""Qwen-VLA's stages of supervised training, one after the other: text to action, then images, with questions beside."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlvla import collect, forgetting, sft
from rlvla.compose import compose
from rlvla.config import ConfigError, SFTConfig
from rlvla.dataset import Demonstrations
from rlvla.dataset_reader import load_dataset
from rlvla.policies.folder import load_policy
from rlvla.policies.policy import Policy
from rlvla.sft_examples import Trajectories
from rlvla.sft_mixture import Source
from rlvla_envs.base import EnvSpec, Observation

TOY = ["suite=toy", "policy=qwen_vla_toy", "batch_size=8"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages") / "data"
    local = ["suite=toy", "workers.kind=local", "workers.num_actors=1"]
    collect.run(compose("collect", [*local, f"output={folder}", "episodes=6"]))
    return folder


@pytest.fixture(scope="module")
def demonstrations(dataset: Path) -> Demonstrations:
    return load_dataset(dataset)


@pytest.fixture(scope="module")
def text_to_action(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage's run."""
    folder = tmp_path_factory.mktemp("stages") / "t2a"
    sft.run(compose("sft", [*TOY, f"dataset={dataset}", f"output={folder}", "stage=t2a", "steps=80", "seed=3"]))
    return folder


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss/flow"] for row in rows if row["kind"] == "sft"]


def spec_of(demonstrations: Demonstrations) -> EnvSpec:
    assert demonstrations.env_spec is not None
    return EnvSpec.from_dict(demonstrations.env_spec)


def test_text_to_action_trains_the_expert_alone_and_learns(text_to_action: Path, dataset: Path) -> None:
    seen = losses(text_to_action)
    assert seen[-1] < 0.8 * seen[0]
    config: SFTConfig = compose("sft", [*TOY, f"dataset={dataset}", "stage=t2a", "seed=3"])
    torch.manual_seed(3)
    fresh = sft.build_policy(config, [Source(sft.dataset_spec(load_dataset(dataset), config), load_dataset(dataset))])
    trained = load_policy(text_to_action / "policy")
    for name, tensor in trained.state_dict().items():
        same = torch.equal(tensor, fresh.state_dict()[name])
        assert same == name.startswith("vlm.") or name == "expert.positions", name


def test_the_next_stage_goes_on_from_the_weights_of_the_one_before(
    text_to_action: Path, dataset: Path, tmp_path: Path
) -> None:
    common = [*TOY, f"dataset={dataset}", "steps=20", "warmup_steps=0"]
    start = f"start={text_to_action / 'policy'}"
    sft.run(compose("sft", [*common, start, "lr=1e-9", f"output={tmp_path / 'still'}"]))
    before, after = load_policy(text_to_action / "policy"), load_policy(tmp_path / "still" / "policy")
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(tensor, after.state_dict()[name], atol=1e-6, rtol=0)
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()


def test_a_trajectory_is_all_actions_of_a_demonstration_and_its_prompt_says_how_many(
    make_policy: Callable[..., Policy], demonstrations: Demonstrations
) -> None:
    policy: Any = make_policy("qwen_vla_toy", spec_of(demonstrations))
    config = SFTConfig(dataset="none", policy=None, sequence_length=1000, state_noise=0.0)
    examples = Trajectories(policy, demonstrations, config)
    batch, action, valid, _ = examples.draw(np.random.default_rng(0), 4)
    chosen = np.random.default_rng(0).integers(demonstrations.num_episodes, size=4)
    for row, episode in enumerate(chosen):
        start, end = demonstrations.episode_start[episode], demonstrations.episode_end[episode]
        length = int(end - start)
        assert int(valid[row].any(dim=-1).sum()) == length
        expected = policy.stats.normalize(demonstrations.action[start:end])
        np.testing.assert_array_equal(action[row, :length, : expected.shape[1]].numpy(), expected)
        assert f"next {length} control" in policy.tokenizer.decode(batch["input_ids"][row])
    assert "images" not in batch
    assert "<|image_pad|>" not in policy.tokenizer.decode(batch["input_ids"].flatten())
    short = Trajectories(policy, demonstrations, replace(config, sequence_length=5))
    assert set(short.lengths.tolist()) == {5}


def test_what_is_past_the_end_of_a_trajectory_does_not_change_its_velocity(
    make_policy: Callable[..., Policy], demonstrations: Demonstrations
) -> None:
    policy: Any = make_policy("qwen_vla_toy", spec_of(demonstrations))
    config = SFTConfig(dataset="none", policy=None, sequence_length=1000)
    batch, action, valid, _ = Trajectories(policy, demonstrations, config).draw(np.random.default_rng(0), 4)
    shortest = int(valid.any(dim=-1).sum(dim=1).min())
    row = int(valid.any(dim=-1).sum(dim=1).argmin())
    tau = torch.full((4,), 0.5)
    with torch.no_grad():
        context = policy.encode(batch)
        together = policy.sequence_velocity(context, action, tau, valid)
        noisy = policy.sequence_velocity(context, torch.where(valid, action, 1e3), tau, valid)
        alone = policy.sequence_velocity(
            policy.encode(batch[row : row + 1]), action[[row], :shortest], tau[:1], valid[[row], :shortest]
        )
    assert torch.equal(together, noisy)
    assert bool((together[~valid] == 0).all())
    torch.testing.assert_close(together[[row], :shortest], alone, atol=1e-4, rtol=1e-4)


def test_views_are_named_where_there_are_several(
    make_policy: Callable[..., Policy], demonstrations: Demonstrations
) -> None:
    spec = spec_of(demonstrations)
    one: Any = make_policy("qwen_vla_toy", spec)
    assert "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>The robot is" in one.prompt("go")
    camera = spec.cameras[0]
    both = replace(spec, cameras=(replace(camera, name="ego"), replace(camera, name="cam_left_wrist")))
    two: Any = make_policy("qwen_vla_toy", both, "policy.expert.context_positions=128")
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    expected = f"<|ego_start|>{image}<|ego_end|><|cam_left_wrist_start|>{image}<|cam_left_wrist_end|>The robot is"
    assert expected in two.prompt("go")
    # Swapped views are another observation, because the tags are not.
    rng = np.random.default_rng(0)
    shown = {c.name: rng.integers(0, 256, (1, c.height, c.width, 3), dtype=np.uint8) for c in both.cameras}
    state = np.zeros((1, both.state_size), np.float32)
    batch = two.collate(Observation(shown, ["go"], state))
    assert (batch["token_type"] == 1).sum() == 2 * (camera.height // 16) * (camera.width // 16)
    swapped = two.collate(Observation(dict(zip(shown, reversed(shown.values()), strict=True)), ["go"], state))
    with torch.no_grad():
        assert not torch.allclose(two.encode(batch).pooled, two.encode(swapped).pooled, atol=1e-5)


def test_questions_learnt_beside_the_actions_are_not_forgotten_and_delta_says_so(dataset: Path, tmp_path: Path) -> None:
    lines = []
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0))):
        Image.fromarray(np.full((32, 32, 3), colour, np.uint8)).save(tmp_path / f"{name}.png")
        content = [{"type": "image", "image": f"{name}.png"}, {"type": "text", "text": "what colour?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": name}]
        lines.append(json.dumps({"messages": messages, "choices": ["red", "green"]}))
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(lines))
    taught = [f"vision_language.dataset={questions}", "vision_language.weight=1"]
    common = [*TOY, f"dataset={dataset}", "lr=3e-3"]
    sft.run(compose("sft", [*common, *taught, "steps=120", f"output={tmp_path / 'taught'}"]))
    rows = [json.loads(line) for line in (tmp_path / "taught/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kind"] != "sft" or rows[-1]["loss/vision_language"] < 0.2
    sft.run(compose("sft", [*common, "steps=1", f"output={tmp_path / 'untaught'}"]))
    found = forgetting.run(
        compose(
            "forgetting",
            [
                f"before={tmp_path / 'taught/policy'}",
                f"after={tmp_path / 'untaught/policy'}",
                f"questions={questions}",
                f"output={tmp_path / 'delta.json'}",
            ],
        )
    )
    assert found["score_before"] == 1.0
    assert found["score_after"] == 0.5  # it says the same colour twice
    assert found["forgetting"] == pytest.approx(0.5)
    written = json.loads((tmp_path / "delta.json").read_text())
    assert [answer["before"]["said"] for answer in written["answers"]] == ["red", "green"]


def test_questions_need_a_backbone_that_is_trained(dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"vision_language.dataset is .*null with train_vlm=false"):
        compose("sft", [f"dataset={dataset}", "vision_language.dataset=x.jsonl", "train_vlm=false"])


def test_a_start_with_another_state_is_refused_with_both_sizes(
    text_to_action: Path, demonstrations: Demonstrations
) -> None:
    spec = spec_of(demonstrations)
    config = compose("sft", [*TOY, "dataset=none", f"start={text_to_action / 'policy'}"])
    fewer = replace(spec, state_names=spec.state_names[:-1])
    assert demonstrations.state is not None
    narrow = replace(demonstrations, state=demonstrations.state[:, :-1])
    said = f"with {spec.state_size} state channels, and this one has {fewer.state_size}"
    with pytest.raises(ConfigError, match=said):
        sft.build_policy(config, [Source(fewer, narrow)])


def test_a_start_brings_its_own_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer is elsewhere; it must be null with start="):
        compose("sft", ["dataset=d", "start=p", "tokenizer=elsewhere"])
