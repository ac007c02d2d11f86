"""What every suite promises. A new one adds its small configuration to SMALL and runs this file first."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlvla.seeding import training_state
from rlvla_envs.base import (
    FIRST_TRAINING_STATE,
    ChunkResult,
    Demonstrator,
    DrawsInto,
    EnvSpec,
    Filmable,
    Observation,
    SuiteConfig,
    VecEnv,
    compare_specs,
    require_match,
)
from rlvla_envs.maniskill import INSTRUCTIONS
from rlvla_envs.suites import SUITES, NotReadyError, check_ready, check_suite, home_of, make_env
from tests.contract.same import assert_equal

H, LIMIT = 4, 42
"""Chunk size and step limit: the last chunk before the limit is cut to 2 steps."""

CAMERA = {"eye": [0.3, 0.0, 0.6], "target": [0.066, 0.0, 0.0], "fov": 0.93}
SMALL = {
    "toy": SuiteConfig(name="toy"),
    "maniskill": SuiteConfig(name="maniskill", task="PushCube-v1", options={"camera": CAMERA}),
    "simpler_env": SuiteConfig(name="simpler_env", task="eggplant_in_basket+stack_cube"),
    "simpler_env_ood": SuiteConfig(name="simpler_env_ood", task="stack_yellow+move_away"),
    "metaworld_mt50": SuiteConfig(name="metaworld_mt50", task="handle-press-v3"),
}
SMALL = {name: replace(c, image_size=32, chunk_size=H, max_episode_steps=LIMIT) for name, c in SMALL.items()}

ABROAD = {
    "toy abroad": replace(SMALL["toy"], python=sys.executable),
    "toy with a throttle": replace(SMALL["toy"], options={"throttle": True}),
}
"""Worlds in another process, through the socket, and another robot of a world: they promise the same."""

RUN_ANYWHERE = {"toy", *ABROAD}
"""The others need a simulator."""

_FAMILIES = ("libero", "metaworld", "robocasa", "calvin", "robotwin", "domino", "vln_ce")
ELSEWHERE = {name for name in SUITES if name.startswith(_FAMILIES) and name not in SMALL}
"""Suites without experts, or whose experts need more steps than `LIMIT`: their contract is in a file of their own. And
suites with the class of one that is here."""

Build = Callable[..., VecEnv]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in RUN_ANYWHERE else pytest.mark.simulator)
        for name in (*SUITES, *ABROAD)
        if name not in ELSEWHERE
    ],
)
def build(request: pytest.FixtureRequest) -> Iterator[Build]:
    """Worlds of one suite: ``build(num_envs, **changes of the configuration)``."""
    small = SMALL | ABROAD
    if request.param not in small:
        pytest.fail(f"{request.param} is in SUITES and has no small configuration in SMALL; add one.")
    if request.param.startswith("simpler_env"):
        request.getfixturevalue("simpler_assets")
    if home_of(small[request.param].name) is not None:
        try:
            check_ready(small[request.param])
        except NotReadyError as error:
            pytest.skip(f"{error} Run: {error.fix}")
    opened: list[VecEnv] = []

    def make(num_envs: int = 1, **changes: Any) -> VecEnv:
        opened.append(make_env(replace(small[request.param], **changes), num_envs))
        return opened[-1]

    yield make
    for world in opened:
        world.close()


@pytest.fixture(scope="module")
def world(build: Build) -> VecEnv:
    """Three slots that tests share; each starts its own episodes."""
    return build(3)


@pytest.fixture(scope="module")
def solved(world: VecEnv) -> tuple[int, np.ndarray]:
    """A training state, and actions of the expert that solve it in a number of steps H does not divide."""
    assert isinstance(world, Demonstrator)
    for state in range(FIRST_TRAINING_STATE, FIRST_TRAINING_STATE + 20):
        episode = world.demonstrate(state, seed=state)
        if episode.success and len(episode.action) % H:
            return state, episode.action
    pytest.fail("the expert solved none of twenty states")


def random_chunks(world: VecEnv, *shape: int, seed: int = 0) -> np.ndarray:
    """Small random actions [*shape H A]."""
    size = (*shape, world.spec.chunk_size, world.spec.action_size)
    return np.random.default_rng(seed).uniform(-0.5, 0.5, size).astype(np.float32)


def still(world: VecEnv, num_rows: int = 1) -> np.ndarray:
    """Chunks that end no episode."""
    return np.zeros((num_rows, world.spec.chunk_size, world.spec.action_size), dtype=np.float32)


def padded(actions: np.ndarray) -> np.ndarray:
    """Actions [L A] as chunks [n H A], filled up with actions that must never run."""
    missing = -len(actions) % H
    return np.concatenate([actions, np.ones((missing, actions.shape[1]), np.float32)]).reshape(-1, H, actions.shape[1])


def assert_equal_results(a: ChunkResult, b: ChunkResult) -> None:
    assert_equal(a.observation, b.observation)
    for field in dataclasses.fields(ChunkResult):
        if field.name != "observation":
            assert np.array_equal(getattr(a, field.name), getattr(b, field.name)), field.name


# --- what travels


def test_the_spec_describes_the_data(world: VecEnv) -> None:
    spec = world.spec
    assert isinstance(world, VecEnv)
    assert world.num_envs == 3
    assert len(spec.action_names()) == spec.action_size
    assert all(component.low < component.high for component in spec.action)
    assert (spec.chunk_size, spec.max_episode_steps, spec.max_decisions) == (H, LIMIT, 11)

    first = world.reset([0, 2], [3, 4])
    result = world.step_chunk([0, 2], still(world, 2))
    for observation in (first, result.observation):
        assert set(observation.images) == {camera.name for camera in spec.cameras}
        for camera in spec.cameras:
            image = observation.images[camera.name]
            assert (image.shape, image.dtype) == ((2, camera.height, camera.width, 3), np.uint8)
            assert image.std() > 1, "a picture of nothing"
        assert len(observation) == 2
        assert all(isinstance(text, str) and text for text in observation.instruction)
        if spec.state_size:
            assert observation.state is not None
            assert (observation.state.shape, observation.state.dtype) == ((2, spec.state_size), np.float32)
        else:
            assert observation.state is None
    for name, kind in (
        ("reward", np.float32),
        ("terminated", np.bool_),
        ("truncated", np.bool_),
        ("success", np.bool_),
        ("executed_steps", np.int64),
    ):
        column = getattr(result, name)
        assert (column.shape, column.dtype) == ((2,), kind), name
    assert result.executed_steps.tolist() == [H, H]
    assert not result.done.any()


def test_the_spec_survives_json(world: VecEnv) -> None:
    assert EnvSpec.from_dict(json.loads(json.dumps(world.spec.to_dict()))) == world.spec


def test_an_earlier_observation_keeps_its_pixels(world: VecEnv) -> None:
    first = world.reset([0], [11])
    kept = {name: image.copy() for name, image in first.images.items()}
    state = None if first.state is None else first.state.copy()
    for chunk in random_chunks(world, 3):
        world.step_chunk([0], chunk[None])
    world.reset([0], [12])
    assert_equal(first, Observation(kept, first.instruction, state))


def test_a_world_that_draws_where_it_is_told_to_draws_the_same_there(world: VecEnv) -> None:
    if not isinstance(world, DrawsInto):
        pytest.skip(f"{world.spec.suite} hands out arrays of its own")
    chunks = random_chunks(world, 2)
    own = [world.reset([0, 2], [3, 4]), world.step_chunk([0, 2], chunks).observation]
    drawn = []
    for play in (lambda: world.reset([0, 2], [3, 4]), lambda: world.step_chunk([0, 2], chunks).observation):
        # What was there before shows nowhere.
        world.room = {c.name: np.full((2, c.height, c.width, 3), 77, np.uint8) for c in world.spec.cameras}
        drawn.append(play())
        for name, image in drawn[-1].images.items():
            assert np.shares_memory(image, world.room[name]), name
    world.room = None
    for one, other in zip(own, drawn, strict=True):
        assert_equal(one, other)


# --- equal initial states


def test_equal_states_give_equal_episodes_in_any_slot_and_order(world: VecEnv) -> None:
    chunks = random_chunks(world, 2, seed=1)
    # Slot 2 starts 5 beside slot 0's 6, then they change places.
    firsts, lasts = {}, {}
    for slots, states in (([2, 0], [5, 6]), ([2, 0], [6, 5]), ([1], [5])):
        first = world.reset(slots, states)
        for chunk in chunks:
            result = world.step_chunk(slots, np.stack([chunk] * len(slots)))
        for row, (slot, state) in enumerate(zip(slots, states, strict=True)):
            firsts[slot, state] = first.row(row)
            lasts[slot, state] = result.observation.row(row)
    for slot in (0, 1):
        assert_equal(firsts[2, 5], firsts[slot, 5])
        assert_equal(lasts[2, 5], lasts[slot, 5])
    assert_equal(lasts[2, 6], lasts[0, 6])


def test_a_restarted_episode_forgets_what_the_slot_went_through(world: VecEnv, solved: tuple[int, np.ndarray]) -> None:
    chunk = random_chunks(world, 1, seed=2)
    first = world.reset([1], [5])
    result = world.step_chunk([1], chunk)
    # To the end of a solved episode, with all its contacts, and back.
    state, actions = solved
    world.reset([1], [state])
    for part in padded(actions):
        world.step_chunk([1], part[None])
    assert_equal(world.reset([1], [5]), first)
    assert_equal_results(world.step_chunk([1], chunk), result)


def test_a_fresh_instance_plays_the_same_episode(world: VecEnv, build: Build) -> None:
    fresh = build(1)
    chunk = random_chunks(world, 1, seed=3)
    assert_equal(fresh.reset([0], [9]), world.reset([2], [9]))
    assert_equal_results(fresh.step_chunk([0], chunk), world.step_chunk([2], chunk))


def test_an_episode_with_contacts_is_the_same_after_any_past(
    world: VecEnv, build: Build, solved: tuple[int, np.ndarray]
) -> None:
    # A physics engine remembers contacts, targets and when a body fell asleep: it shows in the last bits of some
    # episodes after some others, and a run that was resumed is then another run.
    actions = padded(solved[1])
    plans = [
        (FIRST_TRAINING_STATE + i, actions + np.random.default_rng(i).normal(0, 0.3, actions.shape)) for i in range(6)
    ]

    def play(world: VecEnv, slot: int, state: int, chunks: np.ndarray) -> list[ChunkResult]:
        world.reset([slot], [state])
        results: list[ChunkResult] = []
        for chunk in chunks.astype(np.float32):
            results.append(world.step_chunk([slot], chunk[None]))
            if results[-1].done[0]:
                break
        return results

    fresh = build(1)
    expected = [play(fresh, 0, *plan) for plan in plans]
    for again in range(2):
        for i in np.random.default_rng(again).permutation(len(plans)):
            episode = play(world, 1, *plans[i])
            assert len(episode) == len(expected[i])
            for one, other in zip(episode, expected[i], strict=True):
                assert_equal_results(one, other)


def test_a_slots_neighbours_change_nothing(world: VecEnv) -> None:
    chunks = random_chunks(world, 3, seed=4)
    world.reset([0, 1, 2], [1, 2, 3])
    together = world.step_chunk([0, 1, 2], chunks)
    world.reset([1], [2])
    alone = world.step_chunk([1], chunks[[1]])
    assert_equal(together.observation.row(1), alone.observation)


def test_evaluation_and_training_states_differ(world: VecEnv) -> None:
    assert world.spec.num_evaluation_states <= FIRST_TRAINING_STATE
    states = [0, 1, 2, FIRST_TRAINING_STATE, FIRST_TRAINING_STATE + 1, training_state(0, 0, 0)]
    pictures = set()
    for state in states:
        observation = world.reset([0], [state])
        pictures.add(b"".join(image.tobytes() for image in observation.images.values()))
    assert len(pictures) == len(states)


# --- chunks


def test_a_chunk_is_its_actions_one_by_one_and_its_frame_the_last_of_theirs(world: VecEnv) -> None:
    chunk = random_chunks(world, seed=5)
    world.reset([0, 1], [21, 21])
    whole = world.step_chunk([0], chunk[None])
    for action in chunk:
        single = world.step_chunk([1], action[None, None])
        assert single.executed_steps.tolist() == [1]
    assert_equal(whole.observation, single.observation)


def test_actions_out_of_range_are_clipped(world: VecEnv) -> None:
    wild = 10 * random_chunks(world, seed=6)
    low = np.concatenate([np.full(c.size, c.low, np.float32) for c in world.spec.action])
    high = np.concatenate([np.full(c.size, c.high, np.float32) for c in world.spec.action])
    tame = np.clip(wild, low, high)
    assert (wild != tame).mean() > 0.2
    world.reset([0, 1], [22, 22])
    assert_equal_results(world.step_chunk([0], wild[None]), world.step_chunk([1], tame[None]))


def test_success_terminates_with_reward_one_and_stops_the_chunk(world: VecEnv, solved: tuple[int, np.ndarray]) -> None:
    state, actions = solved
    chunks = padded(actions)
    world.reset([0], [state])
    for part in chunks[:-1]:
        result = world.step_chunk([0], part[None])
        assert not result.done[0]
        assert result.reward[0] == 0
        assert result.executed_steps[0] == H
    result = world.step_chunk([0], chunks[-1][None])
    assert result.terminated[0]
    assert result.success[0]
    assert not result.truncated[0]
    assert result.reward[0] == 1
    assert result.executed_steps[0] == len(actions) % H


def test_an_episode_that_ends_inside_a_chunk_does_not_stop_its_neighbours(
    world: VecEnv, solved: tuple[int, np.ndarray]
) -> None:
    state, actions = solved
    *most, last = padded(actions)
    world.reset([0, 1], [state, 25])
    for part in most:
        world.step_chunk([0], part[None])
    result = world.step_chunk([1, 0], np.stack([still(world)[0], last]))
    assert result.executed_steps.tolist() == [H, len(actions) % H]
    assert result.terminated.tolist() == [False, True]
    assert result.success.tolist() == [False, True]
    assert result.reward.tolist() == [0, 1]
    assert not world.step_chunk([1], still(world)).done[0]


def test_the_step_limit_truncates_inside_a_chunk_and_shows_the_final_frame(world: VecEnv) -> None:
    world.reset([0], [23])
    for _ in range(LIMIT // H):
        result = world.step_chunk([0], still(world))
        assert not result.done[0]
        assert result.executed_steps[0] == H
    result = world.step_chunk([0], still(world))
    assert result.truncated[0]
    assert not result.terminated[0]
    assert not result.success[0]
    assert result.reward[0] == 0
    # 42 = 10 x 4 + 2.
    assert result.executed_steps[0] == 2
    # The bootstrap looks at this frame.
    assert all(image.std() > 1 for image in result.observation.images.values())
    with pytest.raises(RuntimeError, match="slot 0 of .* has no running episode"):
        world.step_chunk([0], still(world))


def test_an_expert_who_solves_at_the_step_limit_has_succeeded(build: Build, solved: tuple[int, np.ndarray]) -> None:
    state, actions = solved
    short = build(1, max_episode_steps=len(actions))
    short.reset([0], [state])
    for part in padded(actions):
        result = short.step_chunk([0], part[None])
    assert result.success[0]
    assert result.terminated[0]
    assert not result.truncated[0]


def test_a_finished_episode_cannot_be_stepped_until_it_restarts(world: VecEnv, solved: tuple[int, np.ndarray]) -> None:
    state, actions = solved
    world.reset([1], [state])
    for part in padded(actions):
        world.step_chunk([1], part[None])
    with pytest.raises(RuntimeError, match="slot 1 of .* has no running episode; reset it first"):
        world.step_chunk([1], still(world))
    world.reset([1], [state])
    assert not world.step_chunk([1], still(world)).done[0]


def test_a_slot_that_never_started_cannot_be_stepped(build: Build) -> None:
    fresh = build(2)
    fresh.reset([0], [0])
    with pytest.raises(RuntimeError, match="slot 1 of .* has no running episode"):
        fresh.step_chunk([1], still(fresh))


# --- experts and films


def test_the_expert_mostly_succeeds_inside_the_action_range(world: VecEnv) -> None:
    assert isinstance(world, Demonstrator)
    low = np.concatenate([np.full(c.size, c.low) for c in world.spec.action])
    high = np.concatenate([np.full(c.size, c.high) for c in world.spec.action])
    episodes = [world.demonstrate(training_state(0, i), seed=i) for i in range(10)]
    assert sum(episode.success for episode in episodes) >= 7
    for episode in episodes:
        length = len(episode.action)
        assert 1 <= length <= LIMIT
        assert (episode.action.dtype, episode.action.shape[1]) == (np.float32, world.spec.action_size)
        assert bool((episode.action >= low).all() and (episode.action <= high).all())
        # A frame before every action, and none after the last.
        assert {name: image.shape[0] for name, image in episode.images.items()} == dict.fromkeys(
            [camera.name for camera in world.spec.cameras], length
        )
        assert episode.state is None or episode.state.shape == (length, world.spec.state_size)


def test_a_demonstration_is_a_function_of_its_state_and_seed(world: VecEnv) -> None:
    assert isinstance(world, Demonstrator)
    first, again, other = (world.demonstrate(FIRST_TRAINING_STATE, seed) for seed in (3, 3, 4))
    assert np.array_equal(first.action, again.action)
    for name in first.images:
        assert np.array_equal(first.images[name], again.images[name])
    assert len(first.action) != len(other.action) or not np.array_equal(first.action, other.action)


def test_a_demonstrations_first_frame_is_the_episodes(world: VecEnv) -> None:
    assert isinstance(world, Demonstrator)
    episode = world.demonstrate(FIRST_TRAINING_STATE + 3, seed=0)
    first = world.reset([0], [FIRST_TRAINING_STATE + 3])
    for name, image in first.images.items():
        assert np.array_equal(episode.images[name][0], image[0])
    assert [episode.instruction] == first.instruction


def test_filming_shows_the_episode_and_does_not_touch_it(world: VecEnv) -> None:
    if not isinstance(world, Filmable):
        pytest.skip("draws no films")
    chunks = random_chunks(world, 2, seed=7)
    frames, results = [], []
    for filmed in (False, True):
        world.reset([0], [24])
        for chunk in chunks:
            if filmed:
                frames.append(world.film(0))
            result = world.step_chunk([0], chunk[None])
        results.append(result)
    assert_equal_results(*results)
    assert frames[0].dtype == np.uint8
    assert frames[0].ndim == 3
    assert frames[0].shape[2] == 3
    assert not np.array_equal(frames[0], frames[1])
    assert all(side % 2 == 0 for side in frames[0].shape[:2]), "video codecs want even sides"


# --- what a user gets wrong


def test_a_configured_instruction_replaces_the_tasks_own(build: Build) -> None:
    assert build(1, instruction="do it").reset([0], [0]).instruction == ["do it"]


def test_an_unknown_option_is_refused_by_name(build: Build) -> None:
    with pytest.raises(ValueError, match=r"suite.options has shadr"):
        build(1, options={"shadr": "x"})


def test_an_unknown_task_is_refused_by_name(build: Build) -> None:
    with pytest.raises(ValueError, match=r"suite.task is 'PushCub-v1'"):
        build(1, task="PushCub-v1")


def test_an_unknown_suite_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"suite.name is 'manskill', which does not exist. Did you mean 'maniskill'"):
        check_suite(SuiteConfig(name="manskill"))
    with pytest.raises(ValueError, match=r"which does not exist. Suites: toy, "):
        make_env(SuiteConfig(name="qqq"), 1)


def test_every_suite_has_a_small_configuration_and_a_yaml() -> None:
    from rlvla.compose import compose, group_choices

    composed = {compose("collect", [f"suite={name}"]).suite.name for name in group_choices("collect")["suite"]}
    assert set(SMALL) | ELSEWHERE == set(SUITES) == composed


# --- conventions are compared


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"size": 3}, "number of action channels"),
        ({"name": "speed"}, "action components"),
        ({"convention": "absolute"}, "action translation: convention"),
        ({"low": -2.0}, "action translation: range"),
    ],
)
def test_every_difference_of_the_actions_is_found(
    make_toy: Callable[..., VecEnv], change: dict[str, Any], field: str
) -> None:
    spec = make_toy(1).spec
    other = replace(spec, action=(replace(spec.action[0], **change),))
    assert [m.field for m in compare_specs(spec, other)] == [field]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"state_names": ("x",)}, "state channels"),
        ({"control_hz": 20.0}, "control frequency (Hz)"),
        ({"chunk_size": 5}, "chunk size H"),
        ({"cameras": ()}, "cameras"),
    ],
)
def test_every_other_difference_is_found(make_toy: Callable[..., VecEnv], change: dict[str, Any], field: str) -> None:
    spec = make_toy(1).spec
    assert [m.field for m in compare_specs(spec, replace(spec, **change))] == [field]


def test_another_task_of_the_same_conventions_is_no_difference(make_toy: Callable[..., VecEnv]) -> None:
    spec = make_toy(1).spec
    require_match(spec, replace(spec, suite="other", task="other", robot="other", max_episode_steps=7))


def test_a_mismatch_prints_both_sides_as_a_table(make_toy: Callable[..., VecEnv]) -> None:
    spec = make_toy(1).spec
    small = replace(spec, cameras=(replace(spec.cameras[0], height=64),), control_hz=20.0)
    with pytest.raises(ValueError, match=r"the policy and the suite use different conventions") as caught:
        require_match(spec, small)
    rows = [line.split() for line in str(caught.value).splitlines()]
    assert ["convention", "policy", "suite"] in rows
    assert ["control", "frequency", "(Hz)", "10.0", "20.0"] in rows
    assert ["camera", "top:", "height", "x", "width", "(32,", "32)", "(64,", "32)"] in rows


# --- ManiSkill alone


@pytest.mark.simulator
class TestManiSkill:
    @pytest.fixture
    def spied(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[VecEnv, list[int]]]:
        """A world that notes every picture it takes of its own accord."""

        def make(**options: Any) -> tuple[VecEnv, list[int]]:
            config = replace(SMALL["maniskill"], options={"camera": CAMERA, **options})
            world: Any = make_env(config, 1)
            pictures: list[int] = []
            take = world._envs[0]._get_obs_sensor_data

            def counted(*args: Any, **kwargs: Any) -> Any:
                pictures.append(1)
                return take(*args, **kwargs)

            monkeypatch.setattr(world._envs[0], "_get_obs_sensor_data", counted)
            return world, pictures

        return make

    def test_a_chunk_takes_one_picture(self, spied: Callable[..., tuple[VecEnv, list[int]]]) -> None:
        world, pictures = spied()
        world.reset([0], [5])
        assert len(pictures) == 1
        for chunk in random_chunks(world, 3):
            world.step_chunk([0], chunk[None])
        assert len(pictures) == 4
        world.close()

    def test_its_frame_is_the_last_of_the_loop_that_renders_every_step(
        self, spied: Callable[..., tuple[VecEnv, list[int]]]
    ) -> None:
        once, _ = spied()
        always, pictures = spied(render_every_step=True)
        for world in (once, always):
            world.reset([0], [5])
        before = len(pictures)
        for chunk in random_chunks(once, 3, seed=8):
            assert_equal_results(once.step_chunk([0], chunk[None]), always.step_chunk([0], chunk[None]))
        assert len(pictures) - before == 3 * H
        once.close()
        always.close()

    def test_an_episode_that_is_solved_takes_no_last_picture(
        self, spied: Callable[..., tuple[VecEnv, list[int]]]
    ) -> None:
        world, pictures = spied()
        assert isinstance(world, Demonstrator)
        episode = world.demonstrate(FIRST_TRAINING_STATE, seed=0)
        assert episode.success
        assert len(pictures) == len(episode.action)
        world.close()

    def test_the_state_holds_nothing_privileged(self) -> None:
        world = make_env(SMALL["maniskill"], 1)
        assert {name.split(".")[0] for name in world.spec.state_names} == {"qpos", "tcp_pose"}
        world.close()

    def test_the_expert_of_pick_cube_solves_five_in_five(self) -> None:
        world = make_env(replace(SMALL["maniskill"], task="PickCube-v1", max_episode_steps=80), 1)
        assert isinstance(world, Demonstrator)
        assert [world.demonstrate(training_state(0, i), seed=i).success for i in range(5)] == [True] * 5
        world.close()

    @pytest.mark.parametrize("task", INSTRUCTIONS)
    def test_every_task_with_an_instruction_starts_and_runs(self, task: str) -> None:
        world = make_env(replace(SMALL["maniskill"], task=task, options={}), 1)
        first = world.reset([0], [0])
        assert first.instruction == [INSTRUCTIONS[task]]
        assert all(image.std() > 1 for image in first.images.values())
        assert world.step_chunk([0], still(world)).executed_steps.tolist() == [H]
        assert_equal(world.reset([0], [0]), first)
        world.close()

    def test_a_task_without_an_expert_says_so(self) -> None:
        world = make_env(replace(SMALL["maniskill"], task="StackCube-v1"), 1)
        assert isinstance(world, Demonstrator)
        with pytest.raises(ValueError, match=r"StackCube-v1 has no scripted expert. Experts: PushCube-v1, PickCube-v1"):
            world.demonstrate(FIRST_TRAINING_STATE, seed=0)
        world.close()

    def test_a_near_miss_of_a_task_or_option_is_suggested(self) -> None:
        with pytest.raises(ValueError, match="Did you mean 'PushCube-v1'"):
            make_env(replace(SMALL["maniskill"], task="PushCub-v1"), 1)
        with pytest.raises(ValueError, match="Did you mean 'shader'"):
            make_env(replace(SMALL["maniskill"], options={"shadr": "x"}), 1)
