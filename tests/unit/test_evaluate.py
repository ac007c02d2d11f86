"""Measurements that compare: which states are visited, task by task, and what two evaluations say together."""

from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlvla.config import EvalConfig
from rlvla.evaluate import Evaluation, compare, evaluate, filmed_states, image_donors, smoke_test
from rlvla.trials import TrialLog, evaluation_states
from rlvla.workers import Reply
from rlvla_envs.base import ChunkResult, EnvSpec, Observation

NAMES = ("carrot", "spoon")


class Actor:
    """Acts by the keyed generator alone, so that noise can be told from noise."""

    policy: Any = None

    def decide(self, observation: Observation, rngs: list[np.random.Generator], *, temperature: float) -> Any:
        class Decision:
            action = np.array([[[rng.random()]] for rng in rngs], dtype=np.float32)

        class Thought:
            decision = Decision

        return Thought


class Envs:
    """A world of two tasks that ends at once: carrots succeed on even states, spoons when the action is large."""

    spec = EnvSpec(
        suite="mixed",
        task="all",
        robot="point",
        action=(),
        cameras=(),
        control_hz=5.0,
        chunk_size=1,
        max_episode_steps=4,
        num_evaluation_states=5,
        tasks=NAMES,
        evaluation_states_per_task=(3, 2),
        notes=("stand-in: the carrot",),
    )

    versions = ""

    def __init__(self, num_slots: int, group_size: int = 1) -> None:
        self.num_slots, self.group_size, self.slots_per_worker = num_slots, group_size, group_size
        self.state = np.zeros(num_slots, dtype=np.int64)
        self.visited: list[int] = []

    def begin(self, turn: Any) -> Any:
        return lambda: self.advance(turn)

    def advance(self, turn: Any) -> Reply:
        result = None
        if len(turn.chunk_slots):
            state = self.state[turn.chunk_slots]
            success = np.where(state < 3, state % 2 == 0, turn.chunk_actions[:, 0, 0] > 0.5)
            ones = np.ones(len(state), dtype=np.bool_)
            result = ChunkResult(
                self.look(len(state)),
                success.astype(np.float32),
                ones,
                ~ones,
                success,
                np.ones(len(state), dtype=np.int64),
                {"gentle": state.astype(np.float32)},
            )
        for first in range(0, self.num_slots, self.group_size):
            restarted = (turn.restart_slots // self.group_size) == first // self.group_size
            if self.group_size > 1 and restarted.any():
                # The others of the group have ended, and one task is played in all of it.
                assert not set(turn.chunk_slots // self.group_size) & {first // self.group_size}
                assert len({self.spec.task_of(int(state)) for state in turn.restart_states[restarted]}) == 1
        self.state[turn.restart_slots] = turn.restart_states
        self.visited += turn.restart_states.tolist()
        return Reply(self.look(len(turn.restart_slots)) if len(turn.restart_slots) else None, result)

    @staticmethod
    def look(rows: int) -> Observation:
        return Observation({"top": np.zeros((rows, 2, 2, 3), np.uint8)}, ["go"] * rows)


def measured(num_slots: int = 3, **settings: Any) -> tuple[Evaluation, Envs]:
    envs: Any = Envs(num_slots)
    actor: Any = Actor()
    return evaluate(actor, envs, EvalConfig(**settings), name="x")[0], envs


def test_every_state_is_visited_once_for_each_noise_seed() -> None:
    result, envs = measured(noise_seeds=3)
    assert sorted(envs.visited) == sorted([0, 1, 2, 3, 4] * 3)
    assert result.initial_states == [0, 1, 2, 3, 4] * 3
    assert result.trials == 15
    assert result.by_task["carrot"]["trials"] == 9
    assert result.by_task["carrot"]["successes"] == 6


def test_every_noise_seed_draws_other_noise() -> None:
    # A spoon depends on noise alone: the passes over the same states must not all come out alike.
    outcomes = measured(noise_seeds=8)[0].outcomes
    assert len({tuple(outcomes[i : i + 5]) for i in range(0, 40, 5)}) > 1


@pytest.mark.parametrize("num_slots", [1, 2, 7])
def test_the_number_of_simulators_changes_no_outcome(num_slots: int) -> None:
    assert measured(num_slots, noise_seeds=4)[0].outcomes == measured(3, noise_seeds=4)[0].outcomes


def test_a_task_with_many_states_is_not_visited_more_often_than_its_trials_ask() -> None:
    # Three carrots and two spoons, six trials of each: two visits to a carrot, three to a spoon.
    result, _ = measured(trials=6, noise_seeds=9)
    assert result.initial_states == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 3, 4]
    assert [result.by_task[name]["trials"] for name in NAMES] == [6, 6]
    assert result.first_noise_seed().initial_states == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("stopped_after", [0, 1, 4, 14, 15])
def test_an_evaluation_that_was_stopped_plays_the_other_episodes_only(tmp_path: Path, stopped_after: int) -> None:
    straight, _ = measured(noise_seeds=3)
    actor: Any = Actor()
    settings = EvalConfig(noise_seeds=3)
    first: Any = Envs(2)

    class StopError(Exception):
        pass

    def stop(ended: int) -> None:
        if ended > stopped_after:
            raise StopError

    with suppress(StopError), TrialLog(tmp_path / "log", {"policy": 1}) as log:
        evaluate(actor, first, settings, name="x", log=log, on_episodes=stop)
    # A kill tears the last line.
    (tmp_path / "log").write_text((tmp_path / "log").read_text() + '{"episode": 1')

    second: Any = Envs(5)
    with TrialLog(tmp_path / "log", {"policy": 1}) as log:
        played = list(log.outcomes)
        resumed, _ = evaluate(actor, second, settings, name="x", log=log)
    assert resumed == straight
    assert len(played) == min(stopped_after + 1, 15)
    assert len(second.visited) == 15 - len(played)
    counts = Counter(second.visited) + Counter(straight.initial_states[e] for e in played)
    assert counts == Counter([0, 1, 2, 3, 4] * 3)


def test_a_log_of_another_policy_is_begun_anew(tmp_path: Path) -> None:
    actor: Any = Actor()
    for policy in (1, 2):
        envs: Any = Envs(2)
        with TrialLog(tmp_path / "log", {"policy": policy}) as log:
            evaluate(actor, envs, EvalConfig(), name="x", log=log)
        assert len(envs.visited) == 5


@pytest.mark.parametrize(("num_slots", "group_size"), [(2, 2), (8, 4), (12, 6)])
def test_slots_that_restart_together_give_the_same_outcomes(num_slots: int, group_size: int) -> None:
    envs: Any = Envs(num_slots, group_size)
    actor: Any = Actor()
    grouped, _ = evaluate(actor, envs, EvalConfig(noise_seeds=4), name="x")
    assert grouped == measured(noise_seeds=4)[0]
    assert sorted(envs.visited) == sorted([0, 1, 2, 3, 4] * 4)


def test_the_first_noise_seed_alone_is_the_measurement_with_one() -> None:
    alone = measured(noise_seeds=1)[0]
    assert measured(noise_seeds=4)[0].first_noise_seed() == replace(alone, metrics={}, metrics_by_task={})


def test_what_the_suite_measures_beside_success_is_averaged_by_task_and_its_notes_are_kept() -> None:
    result, _ = measured()
    assert result.metrics == {"gentle": 2.0}
    assert result.metrics_by_task == {"carrot": {"gentle": 1.0}, "spoon": {"gentle": 3.5}}
    assert result.notes == ["stand-in: the carrot"]


def test_a_comparison_counts_each_task_for_itself() -> None:
    before, _ = measured(noise_seeds=2)
    carrots = [i for i, task in enumerate(before.task_index) if task == 0]
    outcomes = [1 if i in carrots else 0 for i in range(before.trials)]
    after = replace(before, outcomes=outcomes)
    table = compare(before, after)["by_task"]
    assert table["carrot"] | {"interval": None, "p_value": None} == {
        "before": 4 / 6,
        "after": 1.0,
        "trials": 6,
        "gained": 2,
        "lost": 0,
        "kept": 4,
        "p_value": None,
        "difference": 1 - 4 / 6,
        "interval": None,
    }
    # Two pairs changed, both for the better: 2 x 0.5^2.
    assert table["carrot"]["p_value"] == pytest.approx(0.5)
    assert table["spoon"]["gained"] == 0


def test_films_take_the_tasks_in_turn() -> None:
    assert filmed_states(Envs.spec, EvalConfig(videos=4)) == [0, 3, 1, 4]
    assert filmed_states(Envs.spec, EvalConfig(videos=9)) == [0, 3, 1, 4, 2]


@pytest.mark.parametrize("num_states", [2, 3, 7])
def test_in_the_probe_an_episode_sees_a_distant_one_of_its_own_task(num_states: int) -> None:
    tasks = [0] * num_states + [1] * 2 * num_states
    donors = image_donors(tasks)
    assert sorted(donors) == list(range(len(tasks)))
    for episode, donor in enumerate(donors):
        assert tasks[donor] == tasks[episode]
        assert abs(donor - episode) >= num_states // 2
        assert donor != episode


def test_fewer_trials_than_states_are_spread_over_each_tasks_list() -> None:
    spec = replace(Envs.spec, num_evaluation_states=16, evaluation_states_per_task=(12, 4))
    assert evaluation_states(spec, 4) == [0, 3, 6, 9, 12, 13, 14, 15]
    assert evaluation_states(spec, 99) == list(range(16))
    assert evaluation_states(replace(spec, tasks=(), evaluation_states_per_task=()), 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", 0.1), ("noise_seeds", 3), ("seed", 1), ("variant", "success=easy"), ("notes", []), ("suite", "x")],
)
def test_measurements_made_differently_are_not_compared(setting: str, value: Any) -> None:
    before, _ = measured()
    with pytest.raises(ValueError, match=f"cannot compare .*{setting}"):
        compare(before, replace(before, **{setting: value}))


class Generated(Envs):
    """The same world with assets that somebody made up."""

    spec = replace(Envs.spec, unscored="its carrot is a box. Fetch the real one.")


def test_a_world_of_generated_assets_gives_no_success_rate_and_plays_nothing_for_one() -> None:
    envs = Generated(2)
    with pytest.raises(ValueError, match="mixed cannot give a success rate here: its carrot is a box. Fetch the real"):
        evaluate(Actor(), envs, EvalConfig(trials=2), name="x")  # type: ignore[arg-type]
    assert not envs.visited


def test_a_smoke_test_plays_every_trial_and_says_nothing_of_success() -> None:
    for kind, reason in ((Envs, None), (Generated, "its carrot is a box. Fetch the real one.")):
        envs = kind(2)
        said = smoke_test(Actor(), envs, EvalConfig(trials=2))  # type: ignore[arg-type]
        # Two of three carrots and both spoons, of one step each.
        assert sorted(envs.visited) == [0, 1, 3, 4]
        assert (said["episodes"], said["env_steps"], said["success"]) == (4, 4, None)
        assert said.get("unscored") == reason
