"""The parts of a rollout's time are those it was spent in, and a trace shows them."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlvla.acting import Actor
from rlvla.clock import INFER, PHYSICS, RENDER, SIMULATORS, Clock, memory_row, trace_of, traced
from rlvla.compose import compose
from rlvla.config import EvalConfig
from rlvla.evaluate import evaluate
from rlvla.hosts import SimulatorHost, Stopwatch
from rlvla.policies.policy import Policy
from rlvla.rollout import play
from rlvla.workers import LocalEnvs
from rlvla_envs.base import Observation, SuiteConfig
from rlvla_envs.toy import ToyEnv

TOY = SuiteConfig(name="toy", task="gate", image_size=32, max_episode_steps=32)


class SlowToy(ToyEnv):
    """A toy whose chunk takes 20 ms, 5 of them for the picture."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.render_s = 0.0

    def step_chunk(self, slots: Any, actions: np.ndarray) -> Any:
        time.sleep(0.02)
        self.render_s += 0.005
        return super().step_chunk(slots, actions)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> LocalEnvs:
    monkeypatch.setattr("rlvla.workers.make_env", SlowToy)
    return LocalEnvs(TOY, 2)


def test_seconds_add_up_by_name() -> None:
    clock = Clock()
    clock.add("a", 1.5)
    clock.add("b", 0.25)
    clock.add("a", 2.0)
    assert clock.seconds == {"a": 3.5, "b": 0.25}


def test_a_row_names_each_part_and_has_nothing_for_what_was_not_done() -> None:
    clock = Clock({INFER: 4.0, SIMULATORS: 3.0, PHYSICS: 2.0, "save": 9.0})
    assert clock.row() == {"time/infer_s": 4, "time/simulators_s": 3, "time/physics_s": 2, "time/render_s": 0}


def test_a_span_that_fails_is_counted() -> None:
    clock = Clock()

    def fail() -> None:
        time.sleep(0.01)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), clock.span("a"):
        fail()
    assert clock.seconds["a"] >= 0.01


def test_the_parts_of_a_rollout_are_what_was_slow(slow: LocalEnvs) -> None:
    clock = Clock()
    rounds = 0

    def decide(observation: Observation, episode: np.ndarray, decision: np.ndarray) -> np.ndarray:
        nonlocal rounds
        rounds += 1
        time.sleep(0.01)
        return np.zeros((len(episode), 8, 2), np.float32)

    started = time.perf_counter()
    for _ in play(slow, [1, 2], decide, clock=clock):
        pass
    took = time.perf_counter() - started
    # Nothing moves: 32 steps in chunks of 8.
    assert rounds == 4
    assert clock.seconds[RENDER] == pytest.approx(0.005 * rounds)
    assert clock.seconds[PHYSICS] >= 0.015 * rounds
    assert clock.seconds[SIMULATORS] >= clock.seconds[PHYSICS] + clock.seconds[RENDER]
    assert clock.seconds[INFER] >= 0.01 * rounds
    assert clock.seconds[INFER] + clock.seconds[SIMULATORS] <= took


def test_an_evaluation_tells_the_clock_what_deciding_and_simulating_took(
    slow: LocalEnvs, make_policy: Callable[..., Policy]
) -> None:
    actor = Actor(make_policy("pi0_toy", slow.spec), block=2, device="cpu")
    clock = Clock()
    evaluate(actor, slow, EvalConfig(trials=2), name="x", clock=clock)
    assert clock.seconds[RENDER] >= 0.005
    assert clock.seconds[INFER] > 0
    assert clock.seconds[SIMULATORS] >= clock.seconds[PHYSICS]


def test_a_simulator_process_says_what_a_round_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlvla.hosts.make_env", SlowToy)
    host = SimulatorHost(TOY, 1)
    host.spec()
    nothing = np.zeros(0, np.int64)
    begin = {"restart_slots": np.array([0]), "restart_states": np.array([3]), "chunk_slots": nothing}
    assert host.advance(begin)["seconds"][1] == 0
    chunk = {"restart_slots": nothing, "chunk_slots": np.array([0]), "chunk_actions": np.zeros((1, 8, 2), np.float32)}
    busy, render = host.advance(chunk)["seconds"]
    assert render == pytest.approx(0.005)
    assert busy >= 0.02


def test_a_world_that_does_not_say_what_its_pictures_cost_has_spent_nothing_on_them() -> None:
    assert Stopwatch(ToyEnv(TOY, 1)).read()[1] == 0


def test_a_trace_holds_the_spans(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with traced(path), Clock().span("infer"):
        torch.ones(3) + 1
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"rlvla/infer", "aten::add"} <= names
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_path_nothing_is_traced(tmp_path: Path) -> None:
    with traced(None):
        torch.ones(3)
    assert not list(tmp_path.iterdir())


def test_memory_is_in_megabytes() -> None:
    # An interpreter with torch: hundreds of MB, not of GB and not of kB.
    assert 100 < memory_row("cpu")["memory/driver_mb"] < 20_000


def test_the_second_iteration_of_a_process_is_traced() -> None:
    folder = Path("run")
    config = compose("train", ["policy=x", "profile=true", "iterations=5"])
    assert [trace_of(config, folder, i, 0) is not None for i in range(5)] == [False, True, False, False, False]
    # One that goes on after three.
    assert [trace_of(config, folder, i, 3) is not None for i in (3, 4)] == [False, True]
    assert (
        trace_of(compose("train", ["policy=x", "profile=true", "iterations=1"]), folder, 0, 0) == folder / "trace.json"
    )
    assert trace_of(compose("train", ["policy=x"]), folder, 1, 0) is None
