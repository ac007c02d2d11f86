"""Scenes that start together, as in one simulation on a GPU: the same episodes as one scene a slot.

No GPU is needed: scenes on the CPU stand side by side behind the face of a batched simulation, so that everything but
the GPU's own physics runs. What PhysX does on a GPU is checked where there is one (docs/how-to/simpler_env.md).
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlvla.rollout import play
from rlvla.workers import LocalEnvs
from rlvla_envs import simpler_env
from rlvla_envs.base import FIRST_TRAINING_STATE, Grouped, SuiteConfig
from rlvla_envs.simpler_rules import Contacts, Situation
from rlvla_envs.simpler_twin import make_twin

pytestmark = [pytest.mark.simulator, pytest.mark.usefixtures("simpler_assets")]


class SideBySide:
    """B scenes on the CPU that answer as one simulation of B scenes."""

    def __init__(self, task: Any, *, num: int, **settings: Any) -> None:
        one = settings | {"sim_backend": "physx_cpu", "render_backend": "cpu"}
        self.task, self.twins = task, [make_twin(task, num=1, **one) for _ in range(num)]
        robot = SimpleNamespace(get_qpos=lambda: torch.cat([t.agent.robot.get_qpos() for t in self.twins]))
        self.agent = SimpleNamespace(robot=robot)

    def start(self, layouts: np.ndarray) -> None:
        for i, twin in enumerate(self.twins):
            twin.start(layouts[i : i + 1])

    def at_rest(self) -> np.ndarray:
        return np.concatenate([twin.at_rest() for twin in self.twins])

    def _step_action(self, actions: np.ndarray) -> None:
        for twin, action in zip(self.twins, actions, strict=True):
            twin._step_action(action)

    def situation(self) -> Situation:
        all_of_them = [twin.situation() for twin in self.twins]

        def contacts() -> Contacts:
            return Contacts(*(np.concatenate(x) for x in zip(*(s.contacts() for s in all_of_them), strict=True)))

        fields = [np.concatenate(x) for x in zip(*(s[:-1] for s in all_of_them), strict=True)]
        return Situation(*fields, contacts=contacts)

    def picture(self) -> np.ndarray:
        return np.concatenate([twin.picture().copy() for twin in self.twins])

    def film(self) -> np.ndarray:
        return np.concatenate([twin.film() for twin in self.twins])

    def close(self) -> None:
        for twin in self.twins:
            twin.close()


def config(*, batched: bool) -> SuiteConfig:
    return SuiteConfig(
        name="simpler_env",
        task="stack_cube+carrot_on_plate",
        image_size=32,
        chunk_size=4,
        max_episode_steps=8,
        options={"sim_backend": "physx_cuda"} if batched else {},
    )


def test_what_ran_on_a_gpu_is_not_mistaken_for_what_ran_on_a_cpu(batch: LocalEnvs) -> None:
    assert not batch.spec.deterministic
    assert "physx_cuda" in batch.spec.variant
    with pytest.raises(ValueError, match="collect with .*physx_cpu"):
        batch.demonstrate([FIRST_TRAINING_STATE], [0])


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalEnvs]:
    monkeypatch.setattr(simpler_env, "make_twin", SideBySide)
    monkeypatch.setattr(simpler_env, "_gpu_is_usable", lambda: True)
    envs = LocalEnvs(config(batched=True), 3)
    yield envs
    envs.close()


def actions(episode: int, decision: int) -> np.ndarray:
    rng = np.random.default_rng([episode, decision])
    return rng.uniform(-0.05, 0.05, (4, 7)).astype(np.float32)


def episodes(envs: Any, states: list[int]) -> dict[tuple[int, int], Any]:
    """Every decision's result and, before it, what was seen."""
    found: dict[tuple[int, int], Any] = {}

    def decide(observation: Any, episode: np.ndarray, decision: np.ndarray) -> np.ndarray:
        for i, key in enumerate(zip(episode.tolist(), decision.tolist(), strict=True)):
            found[key] = [observation.row(i)]
        return np.stack([actions(e, t) for e, t in zip(episode.tolist(), decision.tolist(), strict=True)])

    for turn in play(envs, states, decide):
        for i, key in enumerate(zip(turn.episode.tolist(), turn.decision.tolist(), strict=True)):
            found[key].append(turn.result.take([i]))
    return found


def test_scenes_that_start_together_play_the_episodes_of_scenes_that_do_not(batch: LocalEnvs) -> None:
    # Both tasks, enumerated and training states, more of them than slots and not a multiple.
    states = [0, 25, 1, 26, FIRST_TRAINING_STATE, FIRST_TRAINING_STATE + 1, 2]
    single = LocalEnvs(config(batched=False), 2)
    try:
        apart = episodes(single, states)
    finally:
        single.close()
    together = episodes(batch, states)
    assert apart.keys() == together.keys()
    assert len(together) == 2 * len(states)
    for key, (seen, result) in apart.items():
        other_seen, other = together[key]
        assert np.array_equal(seen.images["3rd_view_camera"], other_seen.images["3rd_view_camera"]), key
        assert np.array_equal(seen.state, other_seen.state), key
        assert seen.instruction == other_seen.instruction
        for field in ("reward", "terminated", "truncated", "success", "executed_steps"):
            assert np.array_equal(getattr(result, field), getattr(other, field)), (key, field)
        assert np.array_equal(result.observation.state, other.observation.state), key
        assert result.metrics == other.metrics


def test_an_episode_that_ends_early_stands_still_and_counts_no_more_steps(
    batch: LocalEnvs, monkeypatch: pytest.MonkeyPatch
) -> None:
    world: Any = batch._env
    # Slot 1 alone is solved, from the second step on.
    solved = iter([[False] * 3, [False, True, False], *[[False] * 3] * 6])

    def strict(_: Situation) -> np.ndarray:
        return np.array(next(solved))

    world.reset([0, 1, 2], [0, 1, 2])
    monkeypatch.setattr(type(world._slots[0].twin.task), "rules", property(lambda _: {"strict": strict}), raising=False)
    for slot in world._slots:
        slot.solved = {"strict": False}
    given: list[np.ndarray] = []
    twin = world._slots[0].twin
    step = twin._step_action
    monkeypatch.setattr(twin, "_step_action", lambda every: (given.append(every.copy()), step(every)))
    first = world.step_chunk([0, 1, 2], np.stack([actions(e, 0) for e in range(3)]))
    assert first.success.tolist() == [False, True, False]
    assert first.executed_steps.tolist() == [4, 2, 4]
    # The third and fourth action of the solved scene were not the policy's.
    assert np.array_equal(given[1][1], actions(1, 0)[1])
    assert all(np.array_equal(given[h][1], simpler_env.HOLD) for h in (2, 3))
    with pytest.raises(RuntimeError, match="slot 1 .* no running episode"):
        world.step_chunk([0, 1], np.stack([actions(e, 1) for e in range(2)]))
    second = world.step_chunk([0, 2], np.stack([actions(e, 1) for e in (0, 2)]))
    assert second.truncated.tolist() == [True, True]
    assert np.array_equal(given[4][1], simpler_env.HOLD)
    assert np.array_equal(given[4][2], actions(2, 1)[0])


def test_a_part_of_the_scenes_cannot_restart_while_others_run(batch: LocalEnvs) -> None:
    world: Any = batch._env
    assert isinstance(world, Grouped)
    assert batch.group_size == 3
    world.reset([0, 1], [0, 1])
    with pytest.raises(RuntimeError, match="while 1 others run"):
        world.reset([0], [2])
    with pytest.raises(RuntimeError, match="episodes of 2 tasks"):
        world.reset([0, 1, 2], [0, 25, 1])


def test_forces_between_pairs_say_what_a_walk_through_the_contacts_says() -> None:
    """The GPU has only the first; on a CPU both can be asked, along an expert's episode."""
    from rlvla_envs.simpler_experts import make_expert
    from rlvla_envs.suites import make_env

    world: Any = make_env(
        SuiteConfig(name="simpler_env", task="stack_cube", image_size=32, chunk_size=1, max_episode_steps=60), 1
    )
    try:
        world.reset([0], [0])
        twin = world._slots[0].twin
        expert = make_expert(twin, np.random.default_rng(0))
        seen = set()
        for _ in range(60):
            done = world.step_chunk([0], np.asarray(expert.act(), np.float32)[None, None]).done[0]
            walked, asked = twin._contacts(), twin._contacts_of_batch()
            assert asked.target_force == pytest.approx(walked.target_force, abs=1e-3, rel=1e-3)
            assert asked.robot.tolist() == walked.robot.tolist()
            assert asked.others.tolist() == walked.others.tolist()
            seen.add((bool(walked.robot[0]), bool(walked.others[0]), bool(walked.target_force[0] > 0)))
            if done:
                break
        # On the table, in the hand, on the other cube.
        assert {(False, True, False), (True, False, False)} <= seen
        assert any(on_target for _, _, on_target in seen)
    finally:
        world.close()
