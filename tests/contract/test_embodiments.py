"""What a policy of several embodiments promises: in each of them it is the policy of that robot alone."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlvla.acting import Actor
from rlvla.config import AlgoConfig, ConfigError, MoreData, SFTConfig
from rlvla.dataset import Demonstrations
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.embodiments import FILE, Embodiment, choose, named, names, same_embodiment, widened
from rlvla.policies.folder import load_policy, read_specs, save_policy
from rlvla.policies.policy import Policy
from rlvla.samplers import training_sampler
from rlvla.seeding import Stream, keyed_rng
from rlvla.sft import Imitation
from rlvla.sft_mixture import Mixture, Source, describe_mixture, embodiments_of, more_sources
from rlvla_envs.base import ActionComponent, Camera, EnvSpec, Observation, SuiteConfig
from rlvla_envs.suites import make_env
from tests.contract.test_policy import POLICIES as EVERY

POLICIES = [name for name in EVERY if name.endswith("_toy") and name != "vlm4vla_toy"]
"""All that pad; vlm4vla has the sizes of its suite."""
K = 4
TEXT = "fly through the gap and reach the green goal"

POINT = make_env(SuiteConfig(name="toy", image_size=32, chunk_size=6), 1).spec
"""Two channels, one camera, five numbers of state, chunks of 6."""
HAND = EnvSpec(
    suite="elsewhere",
    task="lift",
    robot="hand",
    action=(
        ActionComponent(name="translation", size=2, convention="delta, 1 is 1 m", low=-1.0, high=1.0),
        ActionComponent(name="gripper", size=1, convention="absolute", low=-1.0, high=1.0),
    ),
    cameras=(Camera(name="front", height=32, width=32), Camera(name="wrist", height=32, width=32)),
    state_names=("a", "b", "c", "d", "e", "f", "g"),
    control_hz=20.0,
    chunk_size=4,
    max_episode_steps=40,
    num_evaluation_states=8,
)
"""Three channels, two cameras, seven numbers of state, chunks of 4."""


def demonstrations(spec: EnvSpec, *, frames: int = 24, seed: int = 0) -> Demonstrations:
    """Two episodes of noise."""
    rng = np.random.default_rng(seed)
    return Demonstrations(
        images={
            c.name: rng.integers(0, 256, (frames, c.height, c.width, 3), dtype=np.uint8).astype(np.uint8)
            for c in spec.cameras
        },
        state=rng.normal(size=(frames, spec.state_size)).astype(np.float32) if spec.state_size else None,
        action=rng.uniform(-1, 1, (frames, spec.action_size)).astype(np.float32),
        tasks=(TEXT,),
        task_index=np.zeros(frames, np.int64),
        episode_start=np.array([0, frames // 2]),
        episode_end=np.array([frames // 2, frames]),
        fps=spec.control_hz,
        robot_type=spec.robot,
        action_names=tuple(spec.action_names()),
        env_spec=spec.to_dict(),
    )


def observation(spec: EnvSpec, rows: int = 3) -> Observation:
    seen = demonstrations(spec, frames=rows, seed=7)
    return Observation(seen.images, [TEXT] * rows, seen.state)


SOURCES = [Source(POINT, demonstrations(POINT)), Source(HAND, demonstrations(HAND))]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest, make_policy: Callable[..., Policy]) -> Policy:
    return both(make_policy, request.param)


def both(make_policy: Callable[..., Policy], name: str, width: int = 7) -> Policy:
    """A policy of the two, with room for one channel more than they need."""
    part = "policy" if name == "qwen_oft_toy" else "policy.expert"
    options = [f"{part}.channels={K}"]
    if name in ("qwen_vla_toy", "qwen_gr00t_toy", "qwen_pi_toy", "twinbrain_vla_toy"):
        options.append("policy.expert.context_positions=128")
    policy = make_policy(name, widened(POINT, width), *options)
    policy.hold(embodiments_of(SOURCES))
    return policy


def decide(policy: Policy, spec: EnvSpec) -> Any:
    rngs = [keyed_rng(0, Stream.ROLLOUT, 0, row) for row in range(3)]
    sampler = training_sampler(policy, AlgoConfig(noise_level=0.5))
    return Actor(policy, block=4, device="cpu").decide(observation(spec), rngs, temperature=1.0, sampler=sampler)


# --- one robot at a time


def test_the_mask_is_of_the_embodiment_it_is_in(policy: Policy) -> None:
    # POINT executes 6 steps of 2 channels, HAND 4 steps of 3.
    assert policy.env_spec == POINT
    for index, (steps, channels) in ((1, (4, 3)), (0, (6, 2))):
        policy.embody(index)
        expected = torch.zeros(policy.horizon, K, dtype=torch.bool)
        expected[:steps, :channels] = True
        assert torch.equal(policy.action_mask(), expected)


def test_chunks_and_states_have_the_sizes_of_the_robot_and_the_network_sees_one_width(policy: Policy) -> None:
    for index, spec in enumerate((POINT, HAND)):
        policy.embody(index)
        thought = decide(policy, spec)
        assert thought.decision.action.shape == (3, spec.chunk_size, spec.action_size)
        assert thought.context.state.shape == (3, 7)
        assert not bool(thought.context.state[:, spec.state_size :].any())
        assert policy.value_features(thought.context).shape == (3, policy.value_size)


def test_having_been_another_robot_changes_no_bit(policy: Policy) -> None:
    first = decide(policy, POINT)
    policy.embody_in(HAND)
    other = decide(policy, HAND)
    policy.embody_in(POINT)
    again = decide(policy, POINT)
    assert np.array_equal(first.decision.action, again.decision.action)
    assert torch.equal(first.decision.stored["log_prob"], again.decision.stored["log_prob"])
    assert not np.array_equal(first.decision.action[:, :4], other.decision.action[:, :, :2])


def test_beside_another_robot_it_decides_as_it_would_alone(policy: Policy) -> None:
    alone = type(policy)(policy.config, widened(POINT, 7), policy.stats, policy.tokenizer)
    alone.load_state_dict(policy.state_dict())
    alone.hold(policy.embodiments[:1])
    assert len(alone.embodiments) == 1
    policy.embody(1)
    policy.embody(0)
    assert np.array_equal(decide(alone, POINT).decision.action, decide(policy, POINT).decision.action)


def test_what_is_stored_of_a_decision_is_scored_alike_in_every_embodiment(policy: Policy) -> None:
    """The ratio of an unchanged policy is 1, padding or not."""
    sampler = training_sampler(policy, AlgoConfig(noise_level=0.5))
    for index, spec in enumerate((POINT, HAND)):
        policy.embody(index)
        thought = decide(policy, spec)
        with torch.no_grad():
            scored = sampler.score(policy, thought.context, thought.decision.stored)
        shift = (scored.log_prob - thought.decision.stored["log_prob"])[:, policy.action_mask()]
        torch.testing.assert_close(shift, torch.zeros_like(shift), atol=2e-4, rtol=0)


def test_a_padded_log_prob_is_that_of_the_unpadded_chunk(make_policy: Callable[..., Policy]) -> None:
    padded = both(make_policy, "qwen_vla_toy")
    exact = make_policy(
        "qwen_vla_toy",
        widened(POINT, 7),
        "policy.expert.channels=2",
        "policy.expert.horizon=6",
        "policy.expert.context_positions=128",
    )
    sizes = {key: [slice(size) for size in tensor.shape] for key, tensor in exact.state_dict().items()}
    exact.load_state_dict({key: tensor[tuple(sizes[key])] for key, tensor in padded.state_dict().items()})
    exact.hold(padded.embodiments[:1])
    sampler = training_sampler(padded, AlgoConfig(noise_level=0.5))
    thought = decide(padded, POINT)
    stored = thought.decision.stored
    cut = stored.clone()
    for name in ("before", "after", "mean"):
        cut[name] = stored[name][:, :6, :2]
    with torch.no_grad():
        long = sampler.score(padded, thought.context, stored).log_prob * padded.action_mask()
        short = sampler.score(exact, exact.encode(exact.collate(observation(POINT))), cut).log_prob
    assert short.shape == (3, 6, 2)
    torch.testing.assert_close(long.sum(dim=(1, 2)), short.sum(dim=(1, 2)), atol=1e-3, rtol=1e-4)


# --- learning from both


def config(**changes: Any) -> SFTConfig:
    return SFTConfig(dataset="none", policy=None, batch_size=8, noise_draws=2, **changes)


def test_padded_channels_get_no_gradient_and_those_of_any_robot_do(make_policy: Callable[..., Policy]) -> None:
    policy: Any = both(make_policy, "qwen_vla_toy")
    used = {0: [True, True, False, False], 1: [True, True, True, False]}
    mixture = Mixture(policy, SOURCES, config())
    imitation = Imitation(policy, config(), "cpu", None)
    for part in mixture.parts(np.random.default_rng(0), 8):
        policy.zero_grad()
        loss, _ = imitation.loss(part, np.random.default_rng(1))
        loss.backward()
        reached = policy.expert.action_out[2].weight.grad.any(dim=1)
        assert reached.tolist() == used[policy.embodiment]


def test_every_architecture_learns_from_both(policy: Policy) -> None:
    mixture, imitation = Mixture(policy, SOURCES, config()), Imitation(policy, config(), "cpu", None)
    seen = []
    for part in mixture.parts(np.random.default_rng(0), 8):
        loss, measured = imitation.loss(part, np.random.default_rng(1))
        torch.autograd.backward(part.share * loss)
        assert all(np.isfinite(value) for value in measured.values())
        seen.append((policy.embodiment, part.rows))
    assert [index for index, _ in seen] == [0, 1]
    assert sum(rows for _, rows in seen) == 8


def test_rows_are_shared_by_weight(make_policy: Callable[..., Policy]) -> None:
    policy = both(make_policy, "qwen_vla_toy")
    mixture = Mixture(policy, [SOURCES[0]._replace(weight=3.0), SOURCES[1]], config())
    assert mixture.shares.tolist() == [0.75, 0.25]
    rng, rows = np.random.default_rng(0), np.zeros(2)
    for _ in range(200):
        parts = list(mixture.parts(rng, 8))
        # Of a step's gradient each row has an eighth.
        assert sum(part.share for part in parts) == pytest.approx(1)
        assert all(part.share == part.rows / 8 for part in parts)
        for part in parts:
            rows[int(len(part.examples._demonstrations.images) == 2)] += part.rows  # type: ignore[attr-defined]
    # 1600 rows, a deviation of 17.
    assert rows.sum() == 1600
    assert abs(rows[0] - 1200) < 70


def test_one_dataset_draws_nothing_from_the_generator(make_policy: Callable[..., Policy]) -> None:
    """So that runs of one robot have the bits they had."""
    policy = both(make_policy, "qwen_vla_toy")
    rng = np.random.default_rng(0)
    (part,) = Mixture(policy, SOURCES[:1], config()).parts(rng, 8)
    assert (part.rows, part.share) == (8, 1.0)
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


def test_datasets_of_one_robot_share_their_statistics() -> None:
    # 0..99 and 100..199 together: quantiles of 0..199 at 0.01 x 199 = 1.99 and 0.99 x 199 = 197.01.
    def ramp(first: int) -> Demonstrations:
        action = np.arange(first, first + 100, dtype=np.float32)[:, None].repeat(2, axis=1)
        return replace(demonstrations(POINT, frames=100), action=action)

    one, other = Source(POINT, ramp(0)), Source(replace(POINT, suite="toy2", task="other"), ramp(100))
    assert same_embodiment(one.env_spec, other.env_spec)
    found = embodiments_of([one, SOURCES[1], other])
    assert [e.env_spec.suite for e in found] == ["toy", "elsewhere"]
    np.testing.assert_allclose(found[0].stats.q01, [1.99, 1.99], rtol=1e-5)
    np.testing.assert_allclose(found[0].stats.q99, [197.01, 197.01], rtol=1e-5)


def test_noise_on_a_state_leaves_its_padding_at_zero() -> None:
    from tensordict import TensorDict

    from rlvla.sft_examples import _blur_state

    batch = TensorDict({"state": torch.zeros(3, 7)}, batch_size=[3])
    _blur_state(batch, np.random.default_rng(0), 0.1, 5)
    assert bool((batch["state"][:, :5] != 0).all())
    assert bool((batch["state"][:, 5:] == 0).all())


def test_the_doctor_plans_for_the_robot_of_the_suite(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    from rlvla.policies.footprint import load_unallocated

    options = ("policy.expert.channels=4", "policy.expert.context_positions=128")
    policy = make_policy("qwen_vla_toy", widened(POINT, 7), *options)
    policy.hold(embodiments_of(SOURCES))
    save_policy(policy, tmp_path / "policy")
    planned = load_unallocated(tmp_path / "policy")
    alone = planned.context_length(TEXT)
    planned.embody_in(HAND)
    # Another camera.
    assert len(planned.env_spec.cameras) == 2
    assert planned.context_length(TEXT) > alone
    assert {name: p.shape for name, p in planned.named_parameters()} == {
        name: p.shape for name, p in policy.named_parameters()
    }


def test_robots_of_equal_prompts_are_pointed_out(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("qwen_vla_toy", widened(POINT, 7), "policy.expert.channels=4")
    double = replace(HAND, robot=POINT.robot, control_hz=POINT.control_hz, chunk_size=POINT.chunk_size)
    policy.hold(
        [Embodiment(POINT, embodiments_of(SOURCES)[0].stats), Embodiment(double, embodiments_of(SOURCES)[1].stats)]
    )
    lines = list(describe_mixture(policy, SOURCES, np.array([0.5, 0.5])))
    assert lines[0].startswith("50% of the rows from 2 demonstrations of toy, 24 frames: point, translation 2;")
    assert lines[2].startswith("toy and elsewhere have the same embodiment prompt")


def test_more_data_must_say_what_it_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rlvla.sft_mixture as module

    given = config(more=[MoreData(dataset="x")])
    foreign = replace(demonstrations(HAND), env_spec=None)
    monkeypatch.setattr(module, "load_dataset", lambda _: foreign)
    with pytest.raises(
        ConfigError, match=r"more\[0\].dataset x was not written by `rlvla collect`.*Give it as dataset="
    ):
        more_sources(given)
    narrow = replace(demonstrations(HAND), action=demonstrations(HAND).action[:, :2])
    monkeypatch.setattr(module, "load_dataset", lambda _: narrow)
    with pytest.raises(ConfigError, match="it has 3 for action channels, and it has 2"):
        more_sources(given)
    monkeypatch.setattr(module, "load_dataset", lambda _: demonstrations(HAND))
    assert [s.env_spec.chunk_size for s in more_sources(given)] == [4]
    assert [s.env_spec.chunk_size for s in more_sources(config(more=[MoreData(dataset="x", chunk_size=2)]))] == [2]


def test_a_weight_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"more\[\]\.weight is 0"):
        MoreData(dataset="x", weight=0)
    with pytest.raises(ConfigError, match=r"twin_teacher is t; it must be null with more="):
        config(more=[MoreData(dataset="x")], twin_teacher="t")


# --- which one


def test_a_world_is_matched_by_its_conventions() -> None:
    assert choose([POINT, HAND], POINT) == 0
    # What transfer changes: suite, task, robot, step limit.
    assert choose([POINT, HAND], replace(HAND, suite="new", task="t", robot="other hand", max_episode_steps=9)) == 1


def test_robots_of_equal_conventions_are_told_apart_by_name_or_not_at_all() -> None:
    twin = replace(HAND, robot="twin")
    assert choose([HAND, twin], twin) == 1
    with pytest.raises(ValueError, match=r"2 of the policy's embodiments have the conventions of the suite, and none"):
        choose([HAND, twin], replace(HAND, robot="third"))


def test_a_robot_that_the_policy_knows_does_not_act_as_another_one_that_has_its_conventions() -> None:
    # The suite's chunk is not that of the other robot's data: an override was forgotten.
    other = replace(HAND, robot="other", chunk_size=2 * HAND.chunk_size)
    with pytest.raises(ValueError, match="none of the policy's 2 embodiments has the conventions") as caught:
        choose([HAND, other], replace(HAND, robot="other"))
    assert str(2 * HAND.chunk_size) in str(caught.value).split("The nearest")[1]
    assert choose([HAND, other], other) == 1


def test_a_world_of_none_is_refused_with_all_there_are_and_the_nearest() -> None:
    with pytest.raises(ValueError, match="none of the policy's 2 embodiments") as caught:
        choose([POINT, HAND], replace(HAND, control_hz=5.0))
    said = str(caught.value)
    assert "  toy: point, translation 2; top 32 x 32; 5 state channels; 10 Hz; chunks of 6" in said
    assert "  elsewhere: hand, translation 2 + gripper 1" in said
    table = said[said.index("The nearest") :].splitlines()
    assert table[1].split() == ["convention", "elsewhere", "suite"]
    assert table[2].split() == ["control", "frequency", "(Hz)", "20.0", "5.0"]


def test_one_embodiment_is_refused_in_the_words_it_always_was() -> None:
    with pytest.raises(ValueError, match=r"the policy and the suite use different conventions:\n  convention  +policy"):
        choose([POINT], HAND)


def test_a_name_chooses_and_a_wrong_one_lists_the_right_ones() -> None:
    assert names([POINT, HAND, replace(POINT, chunk_size=8)]) == ["toy", "elsewhere", "toy-2"]
    assert named([POINT, HAND], "elsewhere") == 1
    assert named([POINT], "") == 0
    with pytest.raises(ValueError, match=r"the policy has 2 embodiments; embodiment= must be one of\n  toy: point"):
        named([POINT, HAND], "")
    with pytest.raises(ValueError, match=r"embodiment is 'libero'; embodiment= must be one of\n  toy"):
        named([POINT], "libero")


# --- what does not fit


def test_an_architecture_of_fixed_sizes_is_refused(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("vlm4vla_toy", widened(POINT, 7))
    with pytest.raises(ValueError, match=r"embodiment toy: policy.name=vlm4vla has the sizes of one suite"):
        policy.hold(embodiments_of(SOURCES))


def test_an_embodiment_that_needs_more_room_is_named(policy: Policy) -> None:
    wide = replace(HAND, action=(*HAND.action, ActionComponent(name="base", size=3, convention="", low=-1, high=1)))
    stats = ActionStats.of(np.random.default_rng(0).uniform(size=(9, 6)).astype(np.float32), None)
    with pytest.raises(ValueError, match=r"embodiment elsewhere: .*6 action channels, policy.*channels pads to 4"):
        policy.hold([policy.embodiments[0], Embodiment(wide, stats)])


# --- on disk


def test_a_folder_keeps_all_embodiments_whichever_it_was_in(policy: Policy, tmp_path: Path) -> None:
    policy.embody(1)
    expected = decide(policy, HAND)
    save_policy(policy, tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    assert loaded.env_spec == POINT
    assert [e.env_spec for e in loaded.embodiments] == [POINT, HAND] == read_specs(tmp_path / "policy")
    for ours, theirs in zip(policy.embodiments, loaded.embodiments, strict=True):
        assert ours.stats.to_dict() == theirs.stats.to_dict()
    loaded.embody_in(HAND)
    assert np.array_equal(decide(loaded, HAND).decision.action, expected.decision.action)


def test_a_folder_of_one_robot_has_no_file_more(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    save_policy(make_policy("qwen_vla_toy", POINT), tmp_path / "policy")
    assert not (tmp_path / "policy" / FILE).exists()
    assert "embodiments" not in (tmp_path / "policy" / "config.yaml").read_text()


def test_a_robot_alone_in_a_wide_network_is_read_again(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """As SFT on one of two robots leaves it."""
    policy = both(make_policy, "qwen_vla_toy")
    policy.hold(policy.embodiments[:1])
    expected = decide(policy, POINT)
    save_policy(policy, tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    assert (len(loaded.embodiments), loaded.state_width) == (1, 7)
    assert np.array_equal(decide(loaded, POINT).decision.action, expected.decision.action)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), f"{FILE} is missing"),
        (lambda path: path.write_text("{"), f"{FILE} is damaged: JSONDecodeError"),
        (lambda path: path.write_text('{"state_width": 3, "others": []}'), "state_width is 3, and an embodiment has 5"),
        (
            lambda path: path.write_text(path.read_text().replace('"q01"', '"q02"')),
            f"{FILE} is damaged: KeyError: 'q01'",
        ),
    ],
)
def test_a_damaged_list_of_embodiments_is_named(
    make_policy: Callable[..., Policy], tmp_path: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    save_policy(both(make_policy, "qwen_vla_toy"), tmp_path / "policy")
    spoil(tmp_path / "policy" / FILE)
    with pytest.raises(ValueError, match=said):
        load_policy(tmp_path / "policy")


def test_statistics_that_do_not_fit_an_embodiment_are_refused(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    save_policy(both(make_policy, "qwen_vla_toy"), tmp_path / "policy")
    path = tmp_path / "policy" / FILE
    data = json.loads(path.read_text())
    data["others"][0]["statistics"]["action"]["q99"].pop()
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"embodiments.json does not fit.*action q99 has shape \(2,\) and must be 3"):
        load_policy(tmp_path / "policy")
