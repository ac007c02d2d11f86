"""Meta-World through its own interpreter: what the contract of all suites does not say. See also test_vec_env.py."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlvla_envs.base import FIRST_TRAINING_STATE, Demonstrator, SuiteConfig, VecEnv
from rlvla_envs.metaworld import ACTION
from rlvla_envs.metaworld_tasks import SUITE_TASKS, WORDS
from tests.contract.same import assert_each_simulation_draws_itself, assert_equal

pytestmark = pytest.mark.slow

ENVS = Path(__file__).resolve().parents[2] / "envs"
H = 8
TASKS = "push-v3+drawer-open-v3"
"""Of the first the picture depended on the episode before; the second has a part that moves."""
CONFIG = SuiteConfig(name="metaworld_mt50", task=TASKS, image_size=48, chunk_size=H, max_episode_steps=200)


def ask(python: str, code: str) -> Any:
    """What a program says in that interpreter, as JSON on its last line."""
    environment = {**os.environ, "PYTHONPATH": str(ENVS), "MUJOCO_GL": "osmesa"}
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout
    return json.loads(said.splitlines()[-1])


def test_each_simulation_draws_itself_beside_others_and_after_others_were_closed(build: Callable[..., VecEnv]) -> None:
    tasks = "push-v3+drawer-open-v3+peg-insert-side-v3+window-open-v3"
    assert_each_simulation_draws_itself(lambda slots: build(slots, task=tasks), [0, 50, 100, 150])


def test_the_spec_describes_the_data(world: VecEnv) -> None:
    spec = world.spec
    assert (spec.action, spec.control_hz, spec.num_evaluation_states, spec.robot) == (ACTION, 80.0, 100, "Sawyer")
    first = world.reset([0, 1], [3, 53])
    assert first.instruction == [WORDS["push-v3"], WORDS["drawer-open-v3"]]
    assert first.images["corner2"].shape == (2, 48, 48, 3)
    assert first.images["corner2"].std() > 20, "a picture of nothing"
    assert first.state is not None
    # The hand hangs over the table, the gripper is open.
    assert first.state[:, 3] == pytest.approx([1, 1], abs=0.05)
    assert first.state[0, :3] == pytest.approx([0, 0.6, 0.2], abs=0.02)


def test_a_closed_gripper_is_plus_one(world: VecEnv) -> None:
    opening = {}
    for command in (1, -1):
        world.reset([0], [0])
        actions = np.zeros((1, 20, 4), np.float32)
        actions[..., 3] = command
        state = world.step_chunk([0], actions).observation.state
        assert state is not None
        opening[command] = state[0, 3]
    assert opening[1] < 0.6 < 0.95 < opening[-1]


def test_an_action_moves_the_hand_where_it_says(world: VecEnv) -> None:
    for axis in range(3):
        before = world.reset([0], [0]).state
        actions = np.zeros((1, 10, 4), np.float32)
        actions[..., axis] = 1
        after = world.step_chunk([0], actions).observation.state
        assert before is not None
        assert after is not None
        moved = (after - before)[0, :3]
        assert int(np.argmax(np.abs(moved))) == axis
        # 10 steps of 1 cm, less what the arm lags behind.
        assert 0.03 < moved[axis] < 0.12


def test_frames_drawn_once_a_chunk_are_those_drawn_at_every_step_also_after_another_past(
    world: VecEnv, build: Callable[..., VecEnv]
) -> None:
    # Another process, so equal numbers mean equal states everywhere.
    always = build(1, options={"render_every_step": True})
    assert isinstance(world, Demonstrator)
    for state in (5, 55, FIRST_TRAINING_STATE + 4):
        # A past with contacts, in slot 0's simulation of this task.
        world.demonstrate(FIRST_TRAINING_STATE + world.spec.task_of(state), 0)
        assert_equal(world.reset([0], [state]), always.reset([0], [state]))
        for chunk in np.random.default_rng(state).uniform(-1, 1, (3, 1, H, 4)).astype(np.float32):
            assert_equal(world.step_chunk([0], chunk).observation, always.step_chunk([0], chunk).observation)


def test_a_task_has_its_states_whatever_it_is_mixed_with(world: VecEnv, build: Callable[..., VecEnv]) -> None:
    alone = build(1, task="drawer-open-v3")
    assert_equal(world.reset([1], [50 + 7]), alone.reset([0], [7]))


def test_the_experts_solve_and_stay_in_range(world: VecEnv) -> None:
    assert isinstance(world, Demonstrator)
    episodes = [world.demonstrate(FIRST_TRAINING_STATE + i, seed=i) for i in range(4)]
    assert sum(episode.success for episode in episodes) >= 3
    for episode in episodes:
        assert np.abs(episode.action).max() <= 1
        assert len(episode.images["corner2"]) == len(episode.action)
        # A state before every action, whose hand is where the action before has taken it.
        assert episode.state is not None
        assert np.abs(np.diff(episode.state[:, :3], axis=0)).max() < 0.03


def test_the_names_are_those_of_the_benchmark_and_each_has_an_expert(python: str) -> None:
    found = ask(
        python,
        """
import json
from metaworld import env_dict as d
from metaworld.policies import ENV_POLICY_MAP
sets = {"mt10": d.MT10_V3, "mt50": d.MT50_V3}
for name, one in (("ml10", d.ML10_V3), ("ml45", d.ML45_V3)):
    sets |= {f"{name}_{part}": one[part] for part in ("train", "test")}
print(json.dumps([{name: list(tasks) for name, tasks in sets.items()}, list(ENV_POLICY_MAP)]))
""",
    )
    sets, experts = found
    for name, tasks in sets.items():
        # The benchmark's list of ML45 is in another order than its list of all.
        assert sorted(tasks) == sorted(SUITE_TASKS[f"metaworld_{name}"]), name
    assert tuple(sets["mt50"]) == tuple(WORDS)
    assert tuple(sets["mt10"]) == SUITE_TASKS["metaworld_mt10"]
    assert set(WORDS) <= set(experts)


def test_a_picture_is_the_benchmarks_own_turned_upright_and_shows_the_goal_where_it_is(python: str) -> None:
    size, same, seen, expected, above = ask(
        python,
        """
import json
import numpy as np
from rlvla_envs.metaworld_world import World
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

size = 240
world = World("pick-place-v3", size, "corner2")
picture = world.start_stored(3).images[0]
env = world._env
env.render_mode, env.mujoco_renderer.camera_id = "rgb_array", env.model.camera("corner2").id
env.mujoco_renderer.width = env.mujoco_renderer.height = env.width = env.height = size
own = env.render()
same = own.shape == picture.shape and np.array_equal(own[::-1, ::-1], picture)

def pixel(point):
    # A pinhole looks along its -z, with y up; this one hangs upside-down, so both axes are turned.
    camera = env.data.camera("corner2")
    x, y, z = camera.xmat.reshape(3, 3).T @ (np.asarray(point) - camera.xpos)
    focal = size / 2 / np.tan(np.radians(env.model.camera("corner2").fovy[0]) / 2)
    row, column = size / 2 + focal * y / z, size / 2 - focal * x / z
    return [size - row, size - column]

# The goal is a blue ball, and nothing else is blue.
red, green, blue = (picture[..., i].astype(int) for i in range(3))
rows, columns = np.nonzero((blue > 2 * red + 30) & (blue > 2 * green + 30))
goal = env._target_pos
print(json.dumps([size, bool(same), [rows.mean(), columns.mean()], pixel(goal), pixel(goal + [0, 0, 0.1])]))
""",
    )
    assert same
    assert seen == pytest.approx(expected, abs=1.5)
    assert 0 < above[0] < expected[0] < size, "what is higher is not higher in the picture"


def test_the_first_picture_shows_objects_where_they_are(python: str) -> None:
    # Without care, Meta-World's first picture shows them where they were drawn to be before: up to 20 cm away.
    moved = ask(
        python,
        """
import json
import numpy as np
from rlvla_envs.metaworld_world import World
moved = {}
for task in ("window-close-v3", "peg-insert-side-v3", "coffee-pull-v3", "push-v3"):
    world = World(task, 16, "corner2")
    world.start_drawn(1_000_000)
    before = np.concatenate([world._env.data.site_xpos, world._env.data.geom_xpos])
    world.step(np.array([0, 0, 0, -1.0]), draw=False)
    after = np.concatenate([world._env.data.site_xpos, world._env.data.geom_xpos])
    moved[task] = float(np.abs(after - before).max())
    world.close()
print(json.dumps(moved))
""",
    )
    # Metres; the hand settles by 3 mm, a mug falls by 7.
    assert max(moved.values()) < 0.01, moved


def test_the_nearer_camera_is_another_convention(build: Callable[..., VecEnv], world: VecEnv) -> None:
    near = build(1, options={"camera": "corner4"})
    assert [camera.name for camera in near.spec.cameras] == ["corner4"]
    frames = near.reset([0], [0]).images["corner4"], world.reset([0], [0]).images["corner2"]
    assert not np.array_equal(*frames)


def test_a_library_that_cannot_draw_is_named_with_its_cure(build: Callable[..., VecEnv]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUJOCO_GL", "egl")
        patch.setenv("PYOPENGL_PLATFORM", "nonsense")
        with pytest.raises(RuntimeError, match=r"Meta-World cannot draw here.*libosmesa6"):
            build(1)
